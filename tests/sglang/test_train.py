"""Training with servers as the sampler: rank 0 owns the server, all ranks sample from it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from grpo_mega.checkpoints import complete_checkpoints
from tests import tiny
from tests.beside import beside_others
from tests.processes import run_ranks
from tests.sglang.conftest import assert_all_gone

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
LONGEST_SECONDS = 600
STEPS = 12
WARM_UP = "{sft: {steps: 80, batch_size: 64, lr: 4.0e-3, warmup_steps: 10}}"


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_two_ranks_train_on_what_a_server_samples(layout: dict, sglang_python: str, tmp_path: Path):
    run_dir = tmp_path / "run"
    recipe = tiny.recipe_dict(run_dir, rollout=_rollout(sglang_python, "distributed"), parallel=layout)
    assert run_ranks(2, tiny.train_on_pool, recipe) == [0, 0]
    rows = [row for row in tiny.metrics_of(run_dir) if "reward/mean" in row]
    assert len(rows) == 5
    for row in rows:  # after every step's sync the server samples from what the trainer computes
        assert row["mismatch/abs_max"] < 1e-3
    assert (run_dir / "servers" / "server-0.log").is_file()
    assert not tiny.beyond_overwrite(run_dir)
    assert_all_gone(run_dir)


@beside_others
def test_the_quickstart_with_a_server_gets_better_and_ends_when_it_is_told_to(
    sglang_python: str, tmp_path: Path
):
    """A smaller one. What a server samples is rewarded; at last the run saves, and no server outlives it."""
    run_dir = tmp_path / "run"
    process = _start(
        "recipes/quickstart.yaml",
        "rollout.engine=sglang",
        f"rollout.sglang.python={sglang_python}",
        f"run.dir={run_dir}",
        f"stages=[{WARM_UP}, {{grpo: {{steps: 500}}}}]",
        "train.lr=1.0e-3",
        "eval.samples=64",
        "eval.every=0",
    )
    rows = _after_steps(STEPS, process, run_dir)
    rewards = [row["reward/mean"] for row in rows]
    assert sum(rewards[-3:]) > sum(rewards[:3])
    assert max(row["mismatch/abs_max"] for row in rows) < 1e-3
    _assert_ends(process, signal.SIGTERM, 85, run_dir)
    assert complete_checkpoints(run_dir / "checkpoints")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("asked", "code"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)], ids=["term", "ctrl-c"]
)
def test_no_server_outlives_a_run_that_is_told_to_end(asked, code, sglang_python: str, tmp_path: Path):
    run_dir = tmp_path / "run"
    stages = [{"sft": {"steps": 2, "batch_size": 16}}, {"grpo": {"steps": 500}}]
    recipe = tmp_path / "recipe.yaml"
    rollout = _rollout(sglang_python, "tensor")
    recipe.write_text(yaml.safe_dump(tiny.recipe_dict(run_dir, rollout=rollout, stages=stages)))
    process = _start(str(recipe))
    _after_steps(1, process, run_dir)
    _assert_ends(process, asked, code, run_dir)


def _after_steps(count: int, process: subprocess.Popen[str], run_dir: Path) -> list[dict[str, float]]:
    """The first so many rows of steps that sampled, as soon as they are there."""
    deadline, metrics = time.monotonic() + LONGEST_SECONDS, run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count('"reward/mean"') >= count):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return [row for row in tiny.metrics_of(run_dir) if "reward/mean" in row][:count]


def _assert_ends(process: subprocess.Popen[str], asked: signal.Signals, code: int, run_dir: Path) -> None:
    process.send_signal(asked)
    printed, errors = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode == code, printed + errors
    assert "Traceback" not in printed + errors
    assert_all_gone(run_dir)


def _rollout(sglang_python: str, transport: str) -> dict:
    sglang = {"python": sglang_python, "transport": transport, "timeout_seconds": 60}
    return {"engine": "sglang", "sglang": sglang}


def _start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "grpo_mega", "train", *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("RANK")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell's background job ignores Ctrl-C, and so would all that it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
