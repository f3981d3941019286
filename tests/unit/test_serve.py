"""Servers without a trainer, found by a file of addresses; made-up servers, for speed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_mega.errors import UserError
from grpo_mega.ports import free_port
from grpo_mega.recipe import load_recipe
from grpo_mega.rollout.addresses import wait_for_addresses, write_addresses
from grpo_mega.rollout.server import ServerSpec
from tests.commands import run_command
from tests.fake_sglang import FakeServer
from tests.unit.test_server_guard import _group

LONGEST_SECONDS = 150
ROOT = Path(__file__).parents[2]
SERVE = """
import sys
from pathlib import Path
from grpo_mega import launch
from grpo_mega.rollout.server import ServerPool
from grpo_mega.serve import keep_serving
from tests.unit.test_server_guard import ANSWERS, made_up
folder = Path(sys.argv[1])
pool = ServerPool(made_up(folder, ANSWERS), count=2, max_restarts=1)
def say(text):
    if text.startswith("server 1: "):  # the last one; the addresses are written after it
        (folder / "groups").write_text(" ".join(str(s.pid) for s in pool.servers))
    print(text, flush=True)
sys.exit(launch.guarded(lambda: keep_serving(pool, folder / "addresses", say) or 0))
"""


@pytest.fixture
def serving(tmp_path: Path):
    (tmp_path / "addresses").write_text("http://left.over:1\n")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    yield process, tmp_path
    process.kill()
    process.wait()


def _wait_for(condition: Callable[[], bool]) -> None:
    """Longer than a busy machine takes to import everything."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _addresses(folder: Path) -> list[str]:
    path = folder / "addresses"
    return path.read_text().splitlines() if path.exists() else []


def _groups(folder: Path) -> list[int]:
    return [int(pid) for pid in (folder / "groups").read_text().split()]


def _is_up(folder: Path) -> bool:
    return len(_addresses(folder)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_until_a_signal_and_then_nothing_is_left(serving, number: signal.Signals):
    process, folder = serving
    _wait_for(lambda: _is_up(folder))
    assert wait_for_addresses(folder / "addresses", 0) == tuple(_addresses(folder))
    groups = _groups(folder)
    assert all(_group(leader) for leader in groups)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert "server 1: http://127.0.0.1:" in printed
    assert not (folder / "addresses").exists()
    assert not any(_group(leader) for leader in groups)


def test_the_dead_are_started_again_until_it_is_too_often(serving):
    process, folder = serving
    _wait_for(lambda: _is_up(folder))
    before = _addresses(folder)
    os.killpg(_groups(folder)[1], signal.SIGKILL)
    _wait_for(lambda: _is_up(folder) and _addresses(folder) != before)
    after = _addresses(folder)
    assert after[0] == before[0] and after[1] != before[1]
    groups = _groups(folder)
    os.killpg(groups[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode == 2 and "1 restarts were made already" in errors
    assert not (folder / "addresses").exists()
    assert not any(_group(leader) for leader in groups)


def test_a_file_that_comes_later_is_waited_for(tmp_path: Path):
    path = tmp_path / "later" / "addresses"
    with FakeServer() as server:
        writer = threading.Timer(0.3, write_addresses, (path, [server.url]))
        writer.start()
        assert wait_for_addresses(path, 20) == (server.url,)
        writer.join()


def test_what_does_not_come_is_named(tmp_path: Path):
    path = tmp_path / "addresses"
    with pytest.raises(UserError, match="names no servers"):
        wait_for_addresses(path, 0)
    gone = f"http://127.0.0.1:{free_port()}"
    write_addresses(path, [gone])
    with pytest.raises(UserError, match=f"names {gone}, which does not answer"):
        wait_for_addresses(path, 0)
    path.write_text("127.0.0.1:30000\n")
    with pytest.raises(UserError, match="is no address of a server"):
        wait_for_addresses(path, 0)


def test_beyond_loopback_servers_have_a_name_that_others_can_use(tmp_path: Path):
    import socket

    everywhere = ServerSpec("python", tmp_path, "float32", tmp_path, on_gpu=False, host="0.0.0.0")
    assert everywhere.reached_at == socket.gethostname()
    assert everywhere.command(30000, 0).count("0.0.0.0") == 1
    with pytest.raises(UserError, match=r"no server can listen at 203\.0\.113\.9"):
        free_port("203.0.113.9")


def test_servers_of_one_machine_take_gpus_of_their_own(tmp_path: Path):
    spec = ServerSpec("python", tmp_path, "bfloat16", tmp_path, on_gpu=True, tp=2)
    first, second = (spec.command(30000, index) for index in (0, 1))
    assert [c[c.index("--base-gpu-id") + 1] for c in (first, second)] == ["0", "2"]


def test_a_recipe_without_servers_is_refused(tmp_path: Path):
    done = run_command("serve", "recipes/quickstart.yaml")
    assert done.returncode == 2 and "rollout.engine local has no servers" in done.stderr


def test_the_key_is_a_path(tmp_path: Path):
    sglang = "rollout.sglang={mode: external, urls_file: somewhere/addresses}"
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", ["rollout.engine=sglang", sglang]).recipe
    assert recipe.rollout.sglang.urls_file == Path("somewhere/addresses")
