"""The watchdog ends a process that hangs, and no other."""

from __future__ import annotations

import os
import re
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
folder, how, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
watchdog = Watchdog(MINUTES, folder, rank, world_size=4)
watchdog.start()
print("up", flush=True)
def hang():
    time.sleep(60)
def score():
    time.sleep(60)
for step in range(8):
    time.sleep(0.25)
    watchdog.tick()
if how == "hangs":
    score() if rank == 2 else hang()
watchdog.stop()
if how == "stops":
    time.sleep(1.5)
"""


def _start(folder: Path, how: str, rank: int = 3, minutes: float = 1 / 60) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.replace("MINUTES", str(minutes)), str(folder), how, str(rank)],
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
    message = "rank 3: nothing finished in 0.0166667 minutes (guard.hang_minutes)"
    assert stack.splitlines()[1].startswith(message) and said.startswith(message)
    assert "in hang" in stack
    assert str(tmp_path / "stacks") in said


def test_who_is_missing_and_who_is_elsewhere_is_named(tmp_path: Path):
    """Of four ranks two wait in one place, rank 2 is in another, and rank 1 stands still."""
    (tmp_path / "rank_1.txt").write_text("somewhere\n")
    os.utime(tmp_path / "rank_1.txt", (0, 0))  # its stack of an earlier hang
    ranks = [_start(tmp_path, "hangs", rank, minutes=0.1) for rank in (0, 2, 3)]
    for process in ranks:
        _, said = process.communicate(timeout=120)
        lines = said.splitlines()
        assert lines[1] == "  rank 1: missing; left no stack: the process or its node stands still"
        assert re.fullmatch(r"  rank 2: <string>:\d+ in score", lines[2])
        assert re.fullmatch(r"  ranks 0, 3: <string>:\d+ in hang", lines[3])


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

    watchdog = Watchdog(0, tmp_path, rank=0, world_size=1)
    watchdog.start()
    watchdog.tick()
    watchdog.stop()
    assert not list(tmp_path.iterdir())
