"""The tests' own processes: an interrupted run of the tests leaves none behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
LONGEST_SECONDS = 240


def sleep_for_ever(started: Path) -> None:
    started.touch()
    while True:
        time.sleep(60)


def test_ranks_and_their_server_end_with_the_one_who_started_them(tmp_path: Path):
    started = tmp_path / "started"
    code = (
        "from pathlib import Path; from tests.processes import run_ranks; "
        "from tests.parallel.test_processes import sleep_for_ever; "
        f"run_ranks(1, sleep_for_ever, Path({str(started)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ))
    try:
        deadline = time.monotonic() + LONGEST_SECONDS
        while not started.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2  # the server that forks, and the rank
    finally:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    for each in alive:
        each.kill()
    assert not alive
