"""Servers that are gone, ill or slow: training is not held up, and in the end the server has each row
once."""

from __future__ import annotations

import atexit
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wandb")

from grpo_mega.monitor import wandb_delivery
from grpo_mega.monitor.wandb_sync import WandbSyncManager
from tests import wandb_files
from tests.wandb_life import SETUP_SECONDS, life, wait_for
from tests.wandb_server import WandbServer, wandb_server

FINISH_SECONDS = 60.0
SEND_OFTEN = {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}  # whole seconds; else 15


@pytest.fixture
def server(monkeypatch) -> Iterator[WandbServer]:
    import wandb

    for name in ("WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_DIR", "WANDB_NAME", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    with wandb_server() as healthy:
        for name, value in (healthy.environment() | SEND_OFTEN).items():
            monkeypatch.setenv(name, value)
        yield healthy
        wandb.teardown()


def _manager(folder: Path, *, resumes: bool, **options: Any) -> WandbSyncManager:
    """A life that finds a healthy server."""
    manager = WandbSyncManager(folder, "tests", **options)
    assert manager.setup_wandb_run(resumes, {"lr": 0.1}, wait=SETUP_SECONDS)
    return manager


def _assert_each_step_once(rows: list[dict[str, Any]], steps: range) -> None:
    assert Counter(row["_trainer_step"] for row in rows) == dict.fromkeys(steps, 1)


def _backups(folder: Path) -> list[Path]:
    return list((folder / "wandb_backup").glob("*.json"))


def test_a_healthy_server_gets_each_step_once(tmp_path, server):
    manager = _manager(tmp_path, resumes=False)
    assert manager.get_sync_status()["phase"] == "online"
    assert all(manager.safe_log({"loss": 0.1}, step) for step in range(1, 21))
    assert manager.finish(FINISH_SECONDS)
    _assert_each_step_once(server.all_rows(), range(1, 21))
    assert [row["_wire_step"] for row in server.all_rows()] == list(range(1, 21))
    (run,) = server.runs.values()
    assert run["project"] == "tests"
    assert run["groupName"] == run["name"]
    assert _backups(tmp_path) == []


@pytest.mark.parametrize("illness", ["gone", "error 500"])
def test_a_server_that_is_not_there_at_the_start(tmp_path, server, illness):
    """Everything is kept, nothing waits; a later life delivers it."""
    if illness == "gone":
        server.die()
    else:
        server.health = "error 500"
    with life(tmp_path, {}) as child:
        assert not child.order("setup", False, 0.0)
        assert child.order("log", 1, 20) == [False] * 20
        status = child.order("status")  # the connection is still being tried
        assert (status["phase"], status["pending"], status["connect_failures"]) == ("uninitialised", 20, 0)
        assert not child.order("finish", 0.1)
        assert child.exit(timeout=30) == 0  # wandb alone would hold it for a minute and a half
    assert len(_backups(tmp_path)) == 20
    assert server.all_rows() == []

    if illness == "gone":
        server.revive()
    server.health = "healthy"
    manager = _manager(tmp_path, resumes=True)
    assert all(manager.safe_log({"loss": 0.1}, step) for step in range(11, 26))
    assert manager.finish(FINISH_SECONDS)
    _assert_each_step_once(server.all_rows(), range(1, 26))
    assert _backups(tmp_path) == []


@pytest.mark.slow  # wandb does not give up sooner than after eleven seconds
def test_a_server_that_comes_up_later_in_the_same_life(tmp_path, server, monkeypatch):
    from grpo_mega.monitor import wandb_delivery

    monkeypatch.setattr(wandb_delivery, "RECONNECT_SECONDS", 0.1)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    server.health = "error 500"
    manager = WandbSyncManager(tmp_path, "tests")
    assert not manager.setup_wandb_run(None, {}, wait=0)
    assert [manager.safe_log({"loss": 0.1}, step) for step in range(1, 11)] == [False] * 10
    wait_for(lambda: manager.get_sync_status()["connect_failures"] > 0)
    server.health = "healthy"
    wait_for(lambda: manager.get_sync_status()["phase"] == "online")
    assert manager.safe_log({"loss": 0.1}, 11)
    assert manager.finish(FINISH_SECONDS)
    _assert_each_step_once(server.all_rows(), range(1, 12))


@pytest.mark.parametrize("illness", ["gone", "error 500", "rows refused"])
def test_a_server_that_fails_in_the_middle(tmp_path, server, illness):
    with life(tmp_path, {}) as child:
        assert child.order("setup", False, SETUP_SECONDS)
        assert all(child.order("log", 1, 10))
        wait_for(lambda: len(server.all_rows()) == 10)
        if illness == "gone":
            server.die()
        elif illness == "error 500":
            server.health = "error 500"
        else:
            server.drop_rows = True
        child.order("log", 11, 40)
        assert not child.order("finish", 1.0)
        assert child.exit(timeout=60) == 0
    assert len(server.all_rows()) == 10

    if illness == "gone":
        server.revive()
    server.health, server.drop_rows = "healthy", False
    manager = _manager(tmp_path, resumes=True)
    assert all(manager.safe_log({"loss": 0.1}, step) for step in range(21, 51))
    assert manager.finish(FINISH_SECONDS)
    _assert_each_step_once(server.all_rows(), range(1, 51))
    assert _backups(tmp_path) == []


def test_a_thread_that_is_still_busy_is_waited_for_when_the_interpreter_ends(tmp_path, server, monkeypatch):
    """Else the process may end by a signal, with all its work done."""
    goes_on, begun = threading.Event(), threading.Event()

    def recover(*_: object, **__: object) -> set[object]:
        begun.set()
        goes_on.wait(30)
        return set()

    monkeypatch.setattr(wandb_delivery, "recover", recover)
    manager = WandbSyncManager(tmp_path, "tests")
    assert not manager.setup_wandb_run(False, {}, wait=0.0)
    assert begun.wait(10) and not manager.finish(0.05)
    delivery = manager._delivery
    assert delivery is not None and delivery._thread.is_alive()
    atexit.unregister(delivery._let_thread_end)
    threading.Timer(0.3, goes_on.set).start()
    delivery._let_thread_end()
    assert not delivery._thread.is_alive() and not delivery.attached.is_set()
    assert not server.runs


def test_a_slow_server_holds_up_nobody(tmp_path, server):
    server.health, server.slow_seconds = "slow", 0.3
    manager = WandbSyncManager(tmp_path, "tests")
    manager.setup_wandb_run(None, {}, wait=0)
    assert manager.get_sync_status()["phase"] == "uninitialised"  # it returned before the answer
    for step in range(1, 11):
        manager.safe_log({"loss": 0.1}, step)
    wait_for(lambda: manager.get_sync_status()["phase"] == "online")
    assert manager.safe_log({"loss": 0.1}, 11)
    assert manager.finish(FINISH_SECONDS)
    _assert_each_step_once(server.all_rows(), range(1, 12))


def _killed_after_the_server_had_it_all(folder: Path, server: WandbServer) -> None:
    """Ten rows that the server has, which nobody had asked it about."""
    with life(folder, {}) as child:
        assert child.order("setup", False, SETUP_SECONDS)
        assert all(child.order("log", 1, 10))
        wait_for(lambda: len(server.all_rows()) == 10)
        child.kill()
    assert len(_backups(folder)) == 10


@pytest.mark.parametrize("policy", ["auto", "resume"])
def test_rows_that_only_the_server_has_are_not_sent_again(tmp_path, server, policy):
    _killed_after_the_server_had_it_all(tmp_path, server)
    manager = _manager(tmp_path, resumes=True, policy=policy)
    assert all(manager.safe_log({"loss": 0.1}, step) for step in range(6, 21))
    assert manager.finish(FINISH_SECONDS)
    _assert_each_step_once(server.all_rows(), range(1, 21))
    assert len(server.runs) == (2 if policy == "auto" else 1)
    assert _backups(tmp_path) == []


def test_what_the_server_may_have_waits_until_it_can_be_asked(tmp_path, server, monkeypatch):
    _killed_after_the_server_had_it_all(tmp_path, server)
    with life(tmp_path, {"WANDB_MODE": "offline"}) as child:
        assert child.order("setup", True, SETUP_SECONDS)
        assert all(child.order("log", 6, 20))
        assert child.order("status")["held"] == 10
        assert not child.order("finish", FINISH_SECONDS)  # ten are still owed
        child.exit(timeout=30)
    _assert_each_step_once(wandb_files.all_rows(tmp_path), range(11, 21))
    assert len(_backups(tmp_path)) == 10
    manager = _manager(tmp_path, resumes=True)
    assert manager.finish(FINISH_SECONDS)
    _assert_each_step_once(server.all_rows(), range(1, 11))  # the others are for `wandb sync`
    assert _backups(tmp_path) == []


def test_resume_continues_the_numbering_of_the_servers_rows(tmp_path, server):
    for first in (1, 11):
        manager = _manager(tmp_path, resumes=first > 1, policy="resume")
        assert all(manager.safe_log({"loss": 0.1}, step) for step in range(first, first + 10))
        assert manager.finish(FINISH_SECONDS)
    ((run_id, rows),) = server.rows.items()
    assert [rows[number]["_trainer_step"] for number in range(20)] == list(range(1, 21))
    assert list(server.runs) == [run_id]


def test_an_id_from_the_environment_may_have_rows_of_others(tmp_path, server, monkeypatch):
    """They do not count as ours."""
    monkeypatch.setenv("WANDB_RUN_ID", "shared")
    first = _manager(tmp_path / "somebody else", resumes=False)
    assert all(first.safe_log({"loss": 0.1}, step) for step in range(1, 6))
    assert first.finish(FINISH_SECONDS)
    with life(tmp_path / "ours", {}) as child:
        assert child.order("setup", False, SETUP_SECONDS)
        assert all(child.order("log", 6, 10))
        child.kill()
    assert len(server.all_rows()) == 5  # it was killed before anything was sent
    ours = _manager(tmp_path / "ours", resumes=True)
    assert ours.finish(FINISH_SECONDS)
    _assert_each_step_once(server.all_rows(), range(1, 11))
