"""Samples kept by one command and trained on by another, as a user does it."""

from __future__ import annotations

from pathlib import Path

from tests import tiny
from tests.e2e.test_train import _assert_one_message, _recipe_file, _run


def test_sampled_by_one_command_and_trained_on_by_another(tmp_path: Path):
    recipe, kept = _recipe_file(tmp_path, stages=[{"grpo": {"steps": 2}}]), tmp_path / "kept"
    sampled = _run("train", recipe, "--rollout-only", "--dump-rollouts", kept)
    assert sampled.returncode == 0, sampled.stderr
    rewards = [line["reward/mean"] for line in tiny.metrics_of(tmp_path / "run")]
    trained = _run("train", recipe, f"run.dir={tmp_path / 'trained'}", "--replay-rollouts", kept)
    assert trained.returncode == 0, trained.stderr
    assert "nothing is sampled" in trained.stdout
    steps = tiny.metrics_of(tmp_path / "trained")
    assert [line["reward/mean"] for line in steps] == rewards and steps[1]["actor/grad_norm"] > 0
    assert (tmp_path / "trained" / "hf" / "model.safetensors").is_file()
    other = _run("train", recipe, "seed=1", f"run.dir={tmp_path / 'b'}", "--replay-rollouts", kept)
    _assert_one_message(other, "stage_0_step_000000")
    longer = _run(
        "train", recipe, "stages.0.grpo.steps=3", f"run.dir={tmp_path / 'c'}", "--replay-rollouts", kept
    )
    _assert_one_message(longer, "stage_0_step_000002")
    again = _run("train", recipe, f"run.dir={tmp_path / 'd'}", "--dump-rollouts", kept)
    _assert_one_message(again, "holds rollouts already")
    assert not (tmp_path / "d").exists()
