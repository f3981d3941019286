"""Each record is in exactly one of wandb's logs, whatever happens to the process. Offline; see
test_wandb_online.py for servers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wandb")

from grpo_mega.monitor import wandb_sync
from grpo_mega.monitor.wandb_ledger import BACKUP_FOLDER, STATE_FILE, Record
from grpo_mega.monitor.wandb_log_file import scan
from grpo_mega.monitor.wandb_sync import WandbSyncManager
from tests import wandb_files
from tests.wandb_life import SETUP_SECONDS, life, metrics, wait_for


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Each test has a wandb of its own, and ends its process."""
    import wandb

    for name in ("WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_DIR", "WANDB_NAME", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb_sync, "_manager", None)
    yield
    wandb.teardown()


def _train(
    folder: Path, steps: range, *, resumes: bool = False, config: dict[str, Any] | None = None, **options: Any
) -> WandbSyncManager:
    """A whole life; `steps` start behind the checkpoint."""
    manager = WandbSyncManager(folder, "tests", **options)
    if resumes:
        manager.update_step_offset(steps[0] - 1)
    assert manager.setup_wandb_run(resumes, {"lr": 0.1} if config is None else config, wait=SETUP_SECONDS)
    for step in steps:
        assert manager.safe_log({"loss": step / 10}, step)
    assert manager.finish()
    return manager


def _keys(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(row["_record"], row["_trainer_step"]) for row in rows]


def _assert_each_step_once(folder: Path, steps: range) -> None:
    rows = wandb_files.all_rows(folder)
    counts = Counter(_keys(rows))
    assert counts == {("train", step): 1 for step in steps}
    assert len({row["_wire_step"] for row in rows}) == len(rows)
    for log in wandb_files.logs(folder):
        wire_steps = [row["_wire_step"] for row in wandb_files.rows(log)]
        assert wire_steps == sorted(wire_steps)


def _backups(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / BACKUP_FOLDER).glob("*.json"))


def _state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE_FILE).read_text())


def test_a_run_logs_every_step_once_and_over_trainer_steps(tmp_path):
    manager = _train(tmp_path, range(1, 51), config={"lr": 0.1, "loss": {"kl": 0.0}})
    _assert_each_step_once(tmp_path, range(1, 51))
    (log,) = wandb_files.logs(tmp_path)
    rows = wandb_files.rows(log)
    assert [row["_wire_step"] for row in rows] == list(range(1, 51))
    assert [row["loss"] for row in rows] == [step / 10 for step in range(1, 51)]
    assert wandb_files.x_axes(log)["*"] == "_trainer_step"
    assert wandb_files.config(log)["loss"] == {"kl": 0.0}
    assert _backups(tmp_path) == []
    state = _state(tmp_path)
    assert (state["project"], state["last_trainer_step"], state["last_wire_step"], state["pending"]) == (
        "tests",
        50,
        50,
        0,
    )
    assert state["delivered"] == {"train": [[1, 50]]}
    assert manager.get_sync_status()["phase"] == "finished"
    assert not manager.safe_log({"loss": 0.0}, 51)


def test_the_wire_step_is_above_the_last_one(tmp_path):
    manager = WandbSyncManager(tmp_path, "tests")
    manager.setup_wandb_run(None, {}, wait=SETUP_SECONDS)
    for step, record in ((1, "train"), (2, "train"), (2, "eval"), (3, "train"), (9, "train"), (4, "eval")):
        manager.safe_log({"x": 0.0}, step, record=record)
    manager.finish()
    # max(trainer step, last + 1): 1, 2, 3, max(3, 4), 9, max(4, 10)
    assert [row["_wire_step"] for row in wandb_files.all_rows(tmp_path)] == [1, 2, 3, 4, 9, 10]


def test_a_resume_doubles_no_row_and_continues_the_wire_steps(tmp_path):
    _train(tmp_path, range(1, 31))
    second = _train(tmp_path, range(21, 41), resumes=True)  # from the checkpoint at 20
    assert second.get_sync_status()["skipped"] == 10
    _assert_each_step_once(tmp_path, range(1, 41))
    # fixed at attach: 30 wire steps before, a checkpoint at 20. Step 31, the first new one, is at 31 + 10.
    assert _state(tmp_path)["offset"] == 10
    assert wandb_files.rows(wandb_files.logs(tmp_path)[1])[0]["_wire_step"] == 41


@pytest.mark.slow
def test_killed_twice_every_step_is_logged_once(tmp_path):
    """wandb loses the end of its log each time; backups of the same records fill it up."""
    lost = []
    for first, last in ((1, 37), (31, 64)):
        with life(tmp_path, {"WANDB_MODE": "offline"}) as child:
            assert child.order("setup", first > 1, SETUP_SECONDS)
            assert all(child.order("log", first, last - 6))
            wait_for(lambda seen=first + 3: len(wandb_files.all_rows(tmp_path)) > seen)
            assert all(child.order("log", last - 5, last))
            child.kill()  # at once: wandb writes what fills no block every five seconds
        lost.append(last - len(wandb_files.all_rows(tmp_path)))
    assert all(count > 0 for count in lost), "nothing was lost, so this test tests nothing"
    manager = WandbSyncManager(tmp_path, "tests")
    assert manager.setup_wandb_run(True, {"lr": 0.1}, wait=SETUP_SECONDS)
    assert all(manager.safe_log(metrics(step), step) for step in range(61, 81))
    assert manager.finish()
    _assert_each_step_once(tmp_path, range(1, 81))
    assert _backups(tmp_path) == []
    for row in wandb_files.all_rows(tmp_path):
        values = {name: value for name, value in row.items() if name.startswith("metric/")}
        assert values == pytest.approx(metrics(row["_trainer_step"]))


def test_killed_before_a_single_row_was_on_disk(tmp_path):
    with life(tmp_path, {"WANDB_MODE": "offline"}) as child:
        assert child.order("setup", False, SETUP_SECONDS)
        child.order("log", 1, 3)
        child.kill()
    assert wandb_files.all_rows(tmp_path) == []
    assert _backups(tmp_path) == ["step_000001.json", "step_000002.json", "step_000003.json"]
    _train(tmp_path, range(1, 6), resumes=True)
    _assert_each_step_once(tmp_path, range(1, 6))


def test_a_crash_between_state_and_backup_doubles_nothing(tmp_path):
    """The instant at which a record is both delivered and owed."""
    _train(tmp_path, range(1, 4))
    left_over = Record("train", 2, 2, "metrics", {"loss": 0.2})
    (tmp_path / BACKUP_FOLDER / left_over.file_name).write_text(left_over.to_json())
    _train(tmp_path, range(3, 6), resumes=True)
    _assert_each_step_once(tmp_path, range(1, 6))


def test_values_that_are_no_numbers_survive_a_backup(tmp_path):
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0, "e": "nan"}
    first = WandbSyncManager(tmp_path, "tests")
    assert not first.safe_log(values, 1)  # nobody is connected
    assert first.get_sync_status()["not_finite"] == 3
    backup = json.loads((tmp_path / BACKUP_FOLDER / "step_000001.json").read_text())
    assert backup["payload"] == {"a": "nan", "b": "inf", "c": "-inf", "d": 1.0, "e": "nan"}
    first.finish()
    _train(tmp_path, range(2, 3))
    row = wandb_files.all_rows(tmp_path)[0]
    assert math.isnan(row["a"])
    assert (row["b"], row["c"], row["d"], row["e"]) == (math.inf, -math.inf, 1.0, "nan")


def test_histograms_and_tables_are_rows_of_their_own(tmp_path):
    manager = WandbSyncManager(tmp_path, "tests")
    manager.setup_wandb_run(None, {}, wait=SETUP_SECONDS)
    manager.safe_log({"loss": 1.0}, 7)
    assert manager.log_histograms(7, {"ratio": ([1, 3], [0.0, 0.5, 1.0])})
    assert manager.log_histograms(8, {"fine": ([1] * 1000, list(range(1001)))})  # wandb takes up to 512 bins
    assert manager.log_table("samples", ["prompt", "reward"], [["1+1", 1.0], ["2+2", "none"]], 7)
    assert manager.finish()
    train, histogram, fine, table = wandb_files.all_rows(tmp_path)
    assert [row["_trainer_step"] for row in (train, histogram, table)] == [7, 7, 7]
    assert (histogram["ratio/values"], histogram["ratio/bins"]) == ([1, 3], [0, 0.5, 1])
    assert (fine["fine/values"], fine["fine/bins"]) == ([2] * 500, list(range(0, 1001, 2)))
    assert (table["samples/nrows"], table["samples/ncols"]) == (2, 2)


def test_what_cannot_be_logged_is_refused_and_never_raises(tmp_path):
    manager = WandbSyncManager(tmp_path, "tests")
    manager.setup_wandb_run(None, {}, wait=SETUP_SECONDS)
    assert not manager.safe_log({"x": object()}, 1)
    assert not manager.safe_log(None, 1)  # pyright: ignore[reportArgumentType]
    assert not manager.log_histograms(1, {"h": ([1, 2], [0.0, 1.0])})
    assert manager.get_sync_status()["refused"] == 3
    # wandb itself refuses this one, later: a row of two cells under one column
    manager.log_table("t", ["a"], [[1, 2]], 2)
    wait_for(lambda: manager.get_sync_status()["failures"] == 1)
    assert not manager.safe_log({"loss": 1.0}, 3)  # the last thing known of wandb is a failure
    wait_for(lambda: manager._accepts())
    assert manager.safe_log({"loss": 1.0}, 4)
    assert not manager.finish()
    assert _backups(tmp_path) == ["step_000002.table%2Ft.json"]
    assert _keys(wandb_files.all_rows(tmp_path)) == [("train", 3), ("train", 4)]


def test_uncommitted_values_go_with_the_next_record(tmp_path):
    manager = WandbSyncManager(tmp_path, "tests")
    manager.setup_wandb_run(None, {}, wait=SETUP_SECONDS)
    manager.safe_log({"a": 1.0}, 1, commit=False)
    manager.safe_log({"b": 2.0}, 1)
    manager.safe_log({"c": 3.0}, commit=False)
    manager.finish()
    rows = wandb_files.all_rows(tmp_path)
    assert [{name: row[name] for name in row if name in "abc"} for row in rows] == [
        {"a": 1, "b": 2},
        {"c": 3},
    ]


def test_auto_links_a_new_run_to_the_old_one(tmp_path):
    for life_number in range(3):
        _train(tmp_path, range(10 * life_number + 1, 10 * life_number + 11), resumes=life_number > 0)
    logs = sorted(wandb_files.logs(tmp_path), key=lambda log: wandb_files.rows(log)[0]["_trainer_step"])
    ids = [wandb_files.run_record(log).run_id for log in logs]
    assert len(set(ids)) == 3
    assert [wandb_files.run_record(log).run_group for log in logs] == [ids[0]] * 3
    resumed_from = [wandb_files.config(log).get("resumed_from") for log in logs]
    assert resumed_from == [None, ids[0], ids[1]]
    _assert_each_step_once(tmp_path, range(1, 31))


def test_resume_continues_the_recorded_run(tmp_path):
    _train(tmp_path, range(1, 11))
    _train(tmp_path, range(6, 16), resumes=True, policy="resume")
    records = [wandb_files.run_record(log) for log in wandb_files.logs(tmp_path)]
    assert len({record.run_id for record in records}) == 1
    _assert_each_step_once(tmp_path, range(1, 16))


def test_new_starts_a_run_of_its_own_that_holds_the_repeated_steps_too(tmp_path):
    _train(tmp_path, range(1, 11))
    _train(tmp_path, range(6, 16), resumes=True, policy="new")
    first, second = sorted(wandb_files.logs(tmp_path), key=lambda log: len(wandb_files.config(log)))
    records = [wandb_files.run_record(log) for log in (first, second)]
    assert records[0].run_id != records[1].run_id
    assert records[0].run_group != records[1].run_group
    steps = sorted([row["_trainer_step"] for row in wandb_files.rows(log)] for log in (first, second))
    assert steps == [list(range(1, 11)), list(range(6, 16))]
    assert "resumed_from" not in wandb_files.config(first) | wandb_files.config(second)


def test_a_training_started_over_is_logged_from_its_beginning(tmp_path):
    _train(tmp_path, range(1, 4))
    _train(tmp_path, range(1, 4))
    assert Counter(_keys(wandb_files.all_rows(tmp_path))) == {("train", step): 2 for step in range(1, 4)}


@pytest.mark.parametrize("same_config", [True, False])
def test_what_an_abandoned_training_owed(tmp_path, same_config):
    """A training with other numbers must not get the old ones mixed in."""
    first = WandbSyncManager(tmp_path, "tests")
    first._ledger.state.config_digest = "of another recipe"  # pyright: ignore[reportOptionalMemberAccess]
    if same_config:
        first._ledger.state.config_digest = ""  # pyright: ignore[reportOptionalMemberAccess]
    first.safe_log({"loss": 100.0}, 1)
    first.finish()
    _train(tmp_path, range(1, 4))
    _assert_each_step_once(tmp_path, range(1, 4))
    assert wandb_files.all_rows(tmp_path)[0]["loss"] == (100.0 if same_config else 0.1)
    abandoned = tmp_path / BACKUP_FOLDER / "abandoned" / "step_000001.json"
    assert abandoned.exists() != same_config


def test_the_environment_has_its_say(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, value in {"RUN_ID": "mine", "PROJECT": "other", "DIR": str(elsewhere), "NAME": "named"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    _train(tmp_path / "run", range(1, 4))
    (log,) = wandb_files.logs(elsewhere)
    record = wandb_files.run_record(log)
    assert (record.run_id, record.project, record.display_name) == ("mine", "other", "named")
    _train(tmp_path / "run", range(3, 6), resumes=True)
    _assert_each_step_once(elsewhere, range(1, 6))


def test_disabled_means_disabled(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    manager = WandbSyncManager(tmp_path, "tests")
    assert not manager.setup_wandb_run(None, {})
    assert not manager.safe_log({"x": 1.0}, 1)
    assert not manager.finish()
    assert wandb_files.logs(tmp_path) == []
    assert _backups(tmp_path) == []


def test_a_second_process_does_not_touch_the_folder(tmp_path):
    """Two writers would each replay the backups of the other."""
    first = WandbSyncManager(tmp_path, "tests")
    first.safe_log({"loss": 0.1}, 1)
    with life(tmp_path, {}) as child:
        assert not child.order("setup", True, 0.0)
        assert child.order("log", 1, 2) == [False, False]
        assert "another process" in child.order("status")["last_error"]
        assert not child.order("finish")
    same_process = WandbSyncManager(tmp_path, "tests")
    assert not same_process.setup_wandb_run(True, {})
    assert not same_process.safe_log({"loss": 0.1}, 2)
    assert _backups(tmp_path) == ["step_000001.json"]
    first.finish()
    _train(tmp_path, range(1, 4), resumes=True)
    _assert_each_step_once(tmp_path, range(1, 4))


def test_a_foreign_row_in_our_run_does_no_harm(tmp_path):
    import wandb

    manager = WandbSyncManager(tmp_path, "tests")
    assert manager.setup_wandb_run(None, {}, wait=SETUP_SECONDS)
    assert wandb.run is not None
    for step in range(1, 6):
        manager.safe_log({"loss": 0.1}, step)
        wandb.run.log({"theirs": 1.0}, step=100 * step)  # makes wandb drop what has a smaller step=
    assert manager.finish()
    ours = [row for row in wandb_files.all_rows(tmp_path) if "_record" in row]
    assert _keys(ours) == [("train", step) for step in range(1, 6)]


def test_the_functions_speak_to_one_manager(tmp_path):
    assert wandb_sync.get_wandb_sync_manager() is None
    assert not wandb_sync.safe_wandb_log({"x": 1.0}, 1)
    wandb_sync.update_wandb_step_offset(3)
    manager = wandb_sync.initialize_wandb_sync_manager(tmp_path, "tests", "a run")
    assert wandb_sync.initialize_wandb_sync_manager(tmp_path, "tests") is manager
    assert wandb_sync.get_wandb_sync_manager() is manager
    assert manager.setup_wandb_run(None, {}, wait=SETUP_SECONDS)
    assert wandb_sync.safe_wandb_log({"x": 1.0}, 1)
    assert wandb_sync.safe_wandb_log({"x": 2.0})  # the step after the last
    assert manager.finish()
    assert _keys(wandb_files.all_rows(tmp_path)) == [("train", 1), ("train", 2)]


def test_a_damaged_state_file_stops_tracking_and_not_training(tmp_path):
    (tmp_path / STATE_FILE).write_text("{")
    manager = WandbSyncManager(tmp_path, "tests")
    assert not manager.setup_wandb_run(None, {})
    assert not manager.safe_log({"x": 1.0}, 1)
    assert "JSONDecodeError" in manager.get_sync_status()["last_error"]


def test_a_log_is_read_piece_by_piece_wherever_it_is_cut(tmp_path):
    manager = WandbSyncManager(tmp_path, "tests")
    manager.setup_wandb_run(None, {}, wait=SETUP_SECONDS)
    for step in range(1, 40):
        manager.safe_log(metrics(step), step)
    manager.finish()
    (log,) = wandb_files.logs(tmp_path)
    content = log.read_bytes()
    assert len(content) > 2 * 32768  # several blocks
    cut_log = tmp_path / "cut.wandb"
    for cut in (0, 3, 7, 12, 20000, 32760, 32768, 32770, 32775, 50001, 65536, len(content)):
        cut_log.write_bytes(content[:cut])
        begun = scan(cut_log)
        cut_log.write_bytes(content)
        rest = scan(cut_log, begun.end)
        steps = [row.trainer_step for row in (*begun.rows, *rest.rows)]
        assert steps == list(range(1, 40)), cut


def test_no_wandb_process_is_left(tmp_path):
    code = (
        "import sys, psutil; from grpo_mega.monitor.wandb_sync import WandbSyncManager as M;"
        "m = M(sys.argv[1], 'tests'); m.setup_wandb_run(None, {}, wait=60); m.safe_log({'x': 1.0}, 1);"
        "print([p.pid for p in psutil.Process().children() if 'wandb' in p.name()])"
    )  # no finish(): the process simply ends
    command = [sys.executable, "-c", code, str(tmp_path)]
    import psutil

    (pid,) = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    _assert_each_step_once(tmp_path, range(1, 2))
    assert _backups(tmp_path) == []
