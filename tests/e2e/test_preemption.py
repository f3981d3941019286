"""A run that is asked to leave saves, exits with 85, and goes on as if nothing had happened."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import yaml

from grpo_mega.checkpoints import complete_checkpoints
from tests import tiny
from tests.commands import Command, users_environment
from tests.matrices import by_hand

ROOT = Path(__file__).parents[2]
LONGEST_SECONDS = 300
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "grpo_mega")
OWN = ()  # forked


def _start(command: Sequence[str], folder: Path, *options: str, dp: int) -> subprocess.Popen[str] | Command:
    recipe = folder / "recipe.yaml"
    # long enough that a test which is slow to look does not find a finished run
    stages = [{"sft": {"steps": 2, "batch_size": 16}}, {"grpo": {"steps": 10}}]
    blocks = {"parallel": {"dp": dp}, "stages": stages, "eval": {"every": 12}}
    recipe.write_text(yaml.safe_dump(tiny.recipe_dict(folder / "run", **blocks)))
    if not command:
        return Command("train", recipe, *options)
    return subprocess.Popen(
        [*command, "train", str(recipe), *options],
        cwd=ROOT,
        env=users_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _after_step(step: int, run_dir: Path, process: subprocess.Popen[str] | Command) -> None:
    deadline = time.monotonic() + LONGEST_SECONDS
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = _start(OWN, folder, dp=2)
    _, errors = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode == 0, errors
    return folder / "run"


@pytest.mark.parametrize(
    ("command", "asked", "dp", "code"),
    [
        (OWN, signal.SIGUSR1, 2, 85),
        (OWN, signal.SIGTERM, 1, 85),
        by_hand(TORCHRUN, signal.SIGTERM, 2, 1),  # torchrun's own code; its ranks leave with 85
    ],
    ids=["own-usr1", "alone-term", "torchrun-term"],
)
def test_asked_to_leave_it_saves_and_goes_on(command, asked, dp, code, undisturbed, tmp_path):
    process = _start(command, tmp_path, dp=dp)
    run_dir = tmp_path / "run"
    _after_step(3, run_dir, process)
    members = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(asked)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == code, printed + errors
    assert "saved after step" in printed and "Traceback" not in (errors if command is OWN else "")
    _, alive = psutil.wait_procs(members, timeout=30)
    assert not alive
    assert int(complete_checkpoints(run_dir / "checkpoints")[-1].name[5:]) >= 3
    again = _start(OWN, tmp_path, "--resume", dp=dp)
    _, errors = again.communicate(timeout=LONGEST_SECONDS)
    assert again.returncode == 0, errors
    if dp == 2:
        assert tiny.metrics_of(run_dir) == tiny.metrics_of(undisturbed)
