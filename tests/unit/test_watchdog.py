"""The watchdog ends a process that hangs, and no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import sys, time
from pathlib import Path
from grpo_mega.watchdog import Watchdog
folder, how = Path(sys.argv[1]), sys.argv[2]
watchdog = Watchdog(1.0 / 60, folder, rank=3)
watchdog.start()
print("up", flush=True)
def hang():
    time.sleep(60)
for step in range(8):
    time.sleep(0.25)
    watchdog.tick()
if how == "hangs":
    hang()
watchdog.stop()
if how == "stops":
    time.sleep(1.5)
"""


def _start(folder: Path, how: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


def test_a_hang_leaves_a_stack_and_asks_for_another_start(tmp_path: Path):
    process = _start(tmp_path / "stacks", "hangs")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 85
    stack = (tmp_path / "stacks" / "rank_3.txt").read_text()
    assert stack.startswith("rank 3: nothing finished in 0.0166667 minutes (guard.hang_minutes)")
    assert "in hang" in stack and "remedy: " not in stack
    assert said == stack.splitlines(keepends=True)[0]


@pytest.mark.parametrize("how", ["works", "stops"])
def test_a_run_that_ticks_or_is_over_is_left_alone(tmp_path: Path, how: str):
    process = _start(tmp_path, how)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said, list(tmp_path.iterdir())) == (0, "", [])


def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path: Path):
    process = _start(tmp_path, "works")
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")


def test_zero_is_off(tmp_path: Path):
    from grpo_mega.watchdog import Watchdog

    watchdog = Watchdog(0, tmp_path, rank=0)
    watchdog.start()
    watchdog.tick()
    watchdog.stop()
    assert not list(tmp_path.iterdir())
