"""A run whose disk really fills: a small file system of its own, mounted as the run's directory.

Mounting needs root; where it is refused these tests fail and say so.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml

from grpo_mega.checkpoints import faults
from grpo_mega.monitor.jsonl import read_metrics
from tests import tiny
from tests.commands import Command

ROOT = Path(__file__).parents[2]
LONGEST_SECONDS = 300
STEPS = 24


@contextmanager
def disk(where: Path, size: str) -> Iterator[Path]:
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.fail(f"this test fills a disk of its own, and may not mount one (be root): {mounted.stderr}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


def start(recipe: Path, *options: str) -> Command:
    return Command("train", recipe, "--quiet", *options)


@contextmanager
def running(recipe: Path, *options: str) -> Iterator[Command]:
    process = start(recipe, *options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], process: Command) -> None:
    deadline = time.monotonic() + LONGEST_SECONDS
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def fill(filler: Path) -> None:
    """To the last page."""
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def steps_in(run: Path) -> list[int]:
    records = read_metrics(run / "metrics.jsonl")
    return [record.step for record in records if "perf/step_seconds" in record.metrics]


def newest(run: Path) -> str:
    latest = run / "checkpoints" / "latest"
    return latest.read_text() if latest.is_file() else ""


def recipe_file(run: Path, **blocks: object) -> Path:
    path = run.with_suffix(".yaml")
    stages = [{"sft": {"steps": 2, "batch_size": 16}}, {"grpo": {"steps": STEPS - 2}}]
    blocks = {"checkpoint": {"every": 4, "keep": 1}, "eval": {"every": 0, "at_start": False}, **blocks}
    path.write_text(yaml.safe_dump(tiny.recipe_dict(run, stages=stages, **blocks)))
    return path


@pytest.mark.slow
def test_a_run_whose_disk_fills_keeps_what_it_had_and_goes_on_when_there_is_room(tmp_path: Path):
    with disk(tmp_path / "run", "32m") as run:
        recipe = recipe_file(run)
        with running(recipe) as process:
            wait_for(lambda: newest(run) > "step_000002", process)  # in the middle of its second stage
            fill(run / "filler")
            told, errors = process.communicate(timeout=LONGEST_SECONDS)
        assert process.returncode == 2, told + errors
        assert "Traceback" not in told + errors, errors
        assert len([line for line in errors.splitlines() if line.startswith("error:")]) == 1, errors
        assert "disk" in errors and str(run) in errors and "remedy:" in errors, errors
        known = steps_in(run)
        assert known == list(range(1, len(known) + 1)) and 6 <= len(known) < STEPS
        assert faults(run / "checkpoints" / newest(run)) == []

        (run / "filler").unlink()
        with running(recipe, "--resume") as process:
            told, errors = process.communicate(timeout=LONGEST_SECONDS)
        assert process.returncode == 0, told + errors
        assert steps_in(run) == list(range(1, STEPS + 1))


def test_a_disk_without_room_for_the_model_is_named(tmp_path: Path):
    with disk(tmp_path / "run", "256k") as run, running(recipe_file(run)) as process:
        told, errors = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode == 2, told + errors
    assert "Traceback" not in errors and "disk: Error while serializing" in errors, errors
    assert str(run) in errors
