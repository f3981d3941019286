"""Whatever is killed, of the tests or of a run, leaves no process behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests import tiny
from tests.processes import die, run_ranks

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


def _killed_while_it_saves(recipe: dict, note: Path) -> None:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from grpo_mega.engine.saver import Saver

    def write(*_: object, **__: object) -> None:
        note.write_text(str(os.getpid()))
        sleep_for_ever(note.with_suffix(".written"))

    def save(*arguments: Any, **options: Any) -> None:
        whole(*arguments, **options)
        while not note.with_suffix(".written").exists():
            time.sleep(0.02)
        die()

    whole, Saver.save = Saver.save, save  # type: ignore[assignment]
    FileSystemWriterAsync.write_preloaded_data = staticmethod(write)
    tiny.train_on_pool(recipe)


def test_the_writers_of_a_checkpoint_end_with_a_killed_rank(tmp_path: Path):
    """Megatron's own among them, which would wait for an answer for ever."""
    note = tmp_path / "writer"
    stages = [{"sft": {"steps": 1, "batch_size": 4}}, {"grpo": {"steps": 1}}]
    recipe = tiny.recipe_dict(tmp_path / "run", stages=stages, eval={"every": 0}, checkpoint={"every": 1})
    assert run_ranks(1, _killed_while_it_saves, recipe, note) != [0]
    writer = int(note.read_text())
    deadline = time.monotonic() + 30
    try:
        while psutil.pid_exists(writer):
            assert time.monotonic() < deadline, "Megatron's writer outlives the rank"
            time.sleep(0.05)
    finally:
        if psutil.pid_exists(writer):
            psutil.Process(writer).kill()
