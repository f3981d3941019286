"""The guard on the quickstart: what a far too high rate does to a run, and what autopilot makes of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_mega.monitor.jsonl import read_metrics

ROOT = Path(__file__).parents[2]
WARM_UP = "{sft: {steps: 150, batch_size: 128, lr: 2.0e-3, warmup_steps: 20, schedule: linear}}"

pytestmark = pytest.mark.slow


def _train(run_dir: Path, *changes: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "OMP_"))}
    command = [sys.executable, "-m", "grpo_mega", "train", "recipes/quickstart.yaml", "--quiet"]
    return subprocess.run(
        [*command, f"run.dir={run_dir}", *changes],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def warmed_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("warm") / "run"
    done = _train(run_dir, f"stages=[{WARM_UP}]", "eval.at_start=false", "eval.every=0")
    assert done.returncode == 0, done.stderr
    return run_dir


def _go_on(
    warmed_up: Path, run_dir: Path, steps: int, lr: float, *changes: str
) -> subprocess.CompletedProcess[str]:
    shutil.copytree(warmed_up, run_dir)
    stages = f"stages=[{WARM_UP}, {{grpo: {{steps: {steps}, lr: {lr}}}}}]"
    return _train(run_dir, stages, "--resume", "eval.every=50", *changes)


def _events(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def test_a_rate_of_one_walks_through_the_tiers_and_stops_with_a_diagnosis(warmed_up, tmp_path):
    run_dir = tmp_path / "run"
    done = _go_on(warmed_up, run_dir, 20, 1.0)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the guard stopped the run" in done.stderr and "sample train-" in done.stderr
    drifts = [
        r.metrics["guard/drift"]
        for r in read_metrics(run_dir / "metrics.jsonl")
        if "guard/drift" in r.metrics
    ]
    assert (
        drifts[0] > 5 and max(drifts) <= 20
    )  # the step that stopped it is in the diagnosis, not among the steps
    worst = json.loads((run_dir / "diagnosis.json").read_text())["tokens"][0]
    assert abs(worst["trainer"] - worst["sampler"]) > 20 and worst["uid"].startswith("train-")
    assert [e["kind"] for e in _events(run_dir)][-1] == "stop"
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_000150"  # the last good one


def test_under_autopilot_a_rate_ten_times_too_high_reaches_the_normal_pass_rate(warmed_up, tmp_path):
    run_dir = tmp_path / "run"
    done = _go_on(warmed_up, run_dir, 75, 2e-3, "guard.autopilot=true")
    assert done.returncode == 0, done.stderr
    rates = [
        r.metrics["eval_avg_test_pass_rate"]
        for r in read_metrics(run_dir / "metrics.jsonl")
        if "eval_avg_test_pass_rate" in r.metrics
    ]
    assert any(event["kind"] == "intervention" for event in _events(run_dir))
    assert rates[-1] >= 0.88  # .93 to .94 with the rate that the recipe states
