"""The quickstart as README starts it: it learns; and the guard on it, at rates that are far too high."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_mega.monitor.jsonl import read_metrics
from tests.commands import LONGEST_SECONDS, ROOT, run_command, users_environment

pytestmark = pytest.mark.slow
RECIPE = "recipes/quickstart.yaml"
WARM_UP = "{sft: {steps: 150, batch_size: 128, lr: 2.0e-3, warmup_steps: 20, schedule: linear}}"


def _quickstart(run_dir: Path, *changes: str) -> Path:
    """In processes that were started and not forked."""
    done = subprocess.run(
        [sys.executable, "-m", "grpo_mega", "train", RECIPE, f"run.dir={run_dir}", "--quiet", *changes],
        cwd=ROOT,
        env=users_environment(),
        capture_output=True,
        text=True,
        timeout=3 * LONGEST_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return run_dir


def _pass_rates(run_dir: Path) -> dict[tuple[str, int], float]:
    """By stage and step of the stage."""
    return {
        (record.stage, record.stage_step): record.metrics["eval_avg_test_pass_rate"]
        for record in read_metrics(run_dir / "metrics.jsonl")
        if "eval_avg_test_pass_rate" in record.metrics
    }


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The warm-up and the first 15 of its 100 steps."""
    run_dir = tmp_path_factory.mktemp("quickstart") / "run"
    return _quickstart(run_dir, "stages.grpo.steps=15", "eval.at_start=false")


def test_it_begins_to_learn(started: Path):
    """From near .5 after the warm-up; a policy that does not learn stays within .05 of where it was."""
    rates = _pass_rates(started)
    before, after = rates["sft", 150], rates["grpo", 15]
    assert 0.3 <= before <= 0.65
    assert after >= before + 0.12


@pytest.mark.exhaustive
def test_it_learns_to_sort(tmp_path: Path):
    """What the README promises: from near .5 after the warm-up to at least .85, at least .2 more."""
    rates = _pass_rates(_quickstart(tmp_path / "run"))
    before, after = rates["sft", 150], rates["grpo", 100]
    assert 0.3 <= before <= 0.65
    assert after >= max(0.85, before + 0.2)


def _go_on(
    started: Path, run_dir: Path, steps: int, lr: float, *changes: str
) -> subprocess.CompletedProcess[str]:
    """From the end of the warm-up."""
    shutil.copytree(started, run_dir)
    (run_dir / "checkpoints" / "latest").write_text("step_000150")
    stages = f"stages=[{WARM_UP}, {{grpo: {{steps: {steps}, lr: {lr}}}}}]"
    given = (f"run.dir={run_dir}", stages, "eval.every=50", *changes)
    return run_command("train", RECIPE, "--resume", "--quiet", *given)


def _events(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def test_a_rate_of_one_walks_through_the_tiers_and_stops_with_a_diagnosis(started: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    done = _go_on(started, run_dir, 20, 1.0)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the guard stopped the run" in done.stderr and "sample train-" in done.stderr
    drifts = [
        record.metrics["guard/drift"]
        for record in read_metrics(run_dir / "metrics.jsonl")
        if "guard/drift" in record.metrics
    ]
    # the step that stopped it is in the diagnosis, not among the steps
    assert drifts[0] > 5 and max(drifts) <= 20
    worst = json.loads((run_dir / "diagnosis.json").read_text())["tokens"][0]
    assert abs(worst["trainer"] - worst["sampler"]) > 20 and worst["uid"].startswith("train-")
    assert [event["kind"] for event in _events(run_dir)][-1] == "stop"
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_000150"  # the last good one


@pytest.mark.parametrize(
    ("steps", "at_least"),
    [(25, 0.6), pytest.param(75, 0.88, marks=pytest.mark.exhaustive)],
)
def test_under_autopilot_a_rate_ten_times_too_high_learns_all_the_same(
    steps: int, at_least: float, started: Path, tmp_path: Path
):
    """After 75 steps .88 at least: .93 to .94 with the rate that the recipe states."""
    run_dir = tmp_path / "run"
    done = _go_on(started, run_dir, steps, 2e-3, "guard.autopilot=true")
    assert done.returncode == 0, done.stderr
    assert any(event["kind"] == "intervention" for event in _events(run_dir))
    assert _pass_rates(run_dir)["grpo", steps] >= at_least
