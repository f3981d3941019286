"""Servers and their processes end with whoever started them; made-up servers, for speed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from grpo_mega.errors import UserError
from grpo_mega.recipe.rollout_block import SglangBlock
from grpo_mega.rollout.server import (
    PYTHON_VARIABLE,
    ManagedServer,
    ServerPool,
    ServerSpec,
    deterministic_flags,
    server_python,
)

# A server with a child that neither hears SIGTERM nor looks after itself.
SERVER = """
import subprocess, sys
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child]).wait()
"""
TRAINER = """
import sys, time
from pathlib import Path
from grpo_mega.rollout.server import ManagedServer
from tests.unit.test_server_guard import made_up
server = ManagedServer(made_up(Path(sys.argv[1])), 0)
server.start()
print(server.pid, flush=True)
time.sleep(600)
"""


@dataclass(frozen=True)
class MadeUp(ServerSpec):
    script: str = SERVER

    def command(self, port: int, index: int) -> list[str]:
        return [sys.executable, "-c", self.script, str(port)]


def made_up(folder: Path, script: str = SERVER) -> MadeUp:
    return MadeUp(sys.executable, folder, "float32", folder, on_gpu=False, startup_seconds=30, script=script)


ANSWERS = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def _group(leader: int) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_trainer_leaves_nothing(tmp_path: Path, number: int):
    command = [sys.executable, "-c", TRAINER, str(tmp_path)]
    root = Path(__file__).parents[2]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    assert trainer.stdout is not None
    leader = int(trainer.stdout.readline())
    _wait_for(lambda: len(_group(leader)) == 3)  # guard, server, the server's child
    trainer.send_signal(number)
    trainer.wait()
    _wait_for(lambda: not _group(leader))


def test_stop_ends_what_does_not_hear(tmp_path: Path):
    server = ManagedServer(made_up(tmp_path), 0)
    server.start()
    leader = server.pid
    assert leader is not None
    _wait_for(lambda: len(_group(leader)) == 3)
    server.stop(limit_seconds=1)
    assert not server.is_running
    _wait_for(lambda: not _group(leader))


def test_the_dead_are_restarted_so_often_and_no_oftener(tmp_path: Path):
    pool = ServerPool(made_up(tmp_path, ANSWERS), count=2, max_restarts=1)
    pool.start()
    try:
        first = pool.urls
        assert pool.revive() == 0
        assert pool.servers[1].pid is not None
        os.killpg(pool.servers[1].pid, signal.SIGKILL)
        _wait_for(lambda: not pool.servers[1].is_running)
        assert pool.revive() == 1
        assert pool.urls[0] == first[0] and pool.urls[1] != first[1]
        assert pool.servers[0].pid is not None
        os.killpg(pool.servers[0].pid, signal.SIGKILL)
        _wait_for(lambda: not pool.servers[0].is_running)
        with pytest.raises(UserError, match="1 restarts were made already"):
            pool.revive()
        assert not any(server.is_running for server in pool.servers)
    finally:
        pool.stop(limit_seconds=0)


def test_a_server_that_ends_while_starting_shows_its_last_words(tmp_path: Path):
    pool = ServerPool(made_up(tmp_path, "print('no such model'); raise SystemExit(3)"), 1, max_restarts=0)
    with pytest.raises(UserError, match=r"exit code 3 while starting\n(.|\n)*no such model"):
        pool.start()


def test_a_server_is_not_ruled_by_the_trainers_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "GRPO_MEGA_LAUNCH_FOLDER", "PYTHONPATH"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MY_OWN", "kept")
    environment = made_up(tmp_path).environment()
    assert not environment.keys() & {"RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "GRPO_MEGA_LAUNCH_FOLDER"}
    assert "PYTHONPATH" not in environment and environment["MY_OWN"] == "kept"
    assert environment["SGLANG_USE_CPU_ENGINE"] == "1"


def test_the_servers_python_must_be_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    with pytest.raises(UserError, match="no Python"):
        server_python(None)
    with pytest.raises(UserError, match="/nowhere"):
        server_python("/nowhere/python")
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    assert server_python(None) == sys.executable


def test_flags_of_servers_that_repeat():
    both = SglangBlock(deterministic=True, on_policy_target="fsdp")
    assert deterministic_flags(SglangBlock(), on_gpu=False) == ()
    assert deterministic_flags(both, on_gpu=True) == (
        "--enable-deterministic-inference",
        "--rl-on-policy-target",
        "fsdp",
    )
    with pytest.raises(UserError, match="a server on a CPU does not take --enable-deterministic-inference"):
        deterministic_flags(both, on_gpu=False)
