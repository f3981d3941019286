"""The guard in real runs: what one rank's bad numbers do to all, and what a stop explains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_mega.errors import UserError
from tests import tiny
from tests.matrices import by_hand


def _train_with_nan_gradients(recipe: dict[str, Any], updates: list[int]) -> str:
    """Rank 1's gradient gets one nan before the reduction in these updates (from 1, the warm-up's too)."""
    import torch.distributed as dist

    from grpo_mega.engine import schedule

    whole, count = schedule.finalize_model_grads, 0

    def poisoned(chunks: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count in updates and dist.get_rank() == 1:
            next(iter(chunks[0].parameters())).main_grad.view(-1)[0] = torch.nan
        return whole(chunks, *arguments, **options)

    schedule.finalize_model_grads = poisoned
    try:
        tiny.train_on_pool(recipe)
    except UserError as error:
        return str(error)
    finally:
        schedule.finalize_model_grads = whole
    return ""


def _recipe(run_dir: Path, **blocks: object) -> dict[str, Any]:
    return tiny.recipe_dict(run_dir, parallel={"dp": 2}, loss={"kl": {"coef": 0.0}}, **blocks)


def test_a_nan_on_one_rank_skips_the_update_on_all_and_keeps_the_batch(ranks, tmp_path):
    assert ranks(2).run(_train_with_nan_gradients, _recipe(tmp_path), updates=[4]) == ["", ""]
    steps = {line["step"]: line for line in tiny.metrics_of(tmp_path) if "actor/lr" in line}
    assert [steps[step]["actor/update_skipped"] for step in range(3, 8)] == [0, 1, 0, 0, 0]
    assert steps[4]["guard/alarms"] == 1
    batches = torch.load(tmp_path / "replay" / "step_000004_rank_1.pt", weights_only=False)
    assert batches[0]["tokens_T"].dtype == torch.int64 and len(batches[0]["uids"]) > 0


def test_several_in_a_row_stop_the_run_and_the_sample_is_named(ranks, tmp_path):
    recipe = _recipe(tmp_path, guard={"nonfinite_limit": 2})
    said = ranks(2).run(_train_with_nan_gradients, recipe, updates=[4, 5])
    assert said[0] == said[1] and "2 updates in a row were not finite, the last at step 5" in said[0]
    diagnosis = json.loads((tmp_path / "diagnosis.json").read_text())
    assert diagnosis["step"] == 5 and diagnosis["tokens"][0]["uid"].startswith("train-")
    assert (tmp_path / "replay").is_dir() and not tiny.beyond_overwrite(tmp_path)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [e["kind"] for e in events if e["kind"] in ("alarm", "stop")] == ["alarm", "stop"]


def _train_until_stopped(recipe: dict[str, Any]) -> str:
    try:
        tiny.train_on_pool(recipe)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("parallel", [by_hand({"dp": 2}), {"pp": 2}], ids=["dp2", "pp2"])
def test_a_stop_names_sample_and_tokens_with_both_log_probs(parallel, ranks, tmp_path):
    stages = [{"sft": {"steps": 2, "batch_size": 16}}, {"grpo": {"steps": 5, "lr": 1.0, "warmup_steps": 0}}]
    recipe = tiny.recipe_dict(tmp_path, parallel=parallel, stages=stages, guard={"stop_above": 11})
    said = ranks(2).run(_train_until_stopped, recipe)
    assert "the guard stopped the run: the policy's log-probs drifted by" in said[0]
    assert "when sampled" in said[0] and "sample train-" in said[0]
    worst = json.loads((tmp_path / "diagnosis.json").read_text())["tokens"][0]
    assert abs(worst["trainer"] - worst["sampler"]) > 11


def test_under_autopilot_rate_penalty_and_clip_follow_the_tier(ranks, tmp_path):
    tiers = [{"above": 0.001, "lr": 1e-5, "kl_coef": 0.5, "clip": 0.1}]
    guard = {"autopilot": True, "tiers": tiers, "stop_above": None}
    recipe = _recipe(tmp_path, guard=guard)
    ranks(2).run(tiny.train_on_pool, recipe)
    steps = {line["step"]: line for line in tiny.metrics_of(tmp_path) if "actor/lr" in line}
    assert steps[3]["guard/interventions"] == 1 and steps[3]["actor/lr"] > 1e-5
    assert all(steps[step]["actor/lr"] == 1e-5 for step in range(4, 8))
    assert "actor/kl_penalty" not in steps[3] and "actor/kl_penalty" in steps[4]


def test_a_resumed_run_keeps_what_the_guard_has_done(ranks, tmp_path):
    tiers = [{"above": 0.001, "lr": 1e-5, "kl_coef": 0.5, "clip": 0.1}]
    guard = {"autopilot": True, "tiers": tiers, "stop_above": None}
    short, long = (
        _recipe(
            tmp_path / name,
            guard=guard,
            stages=[{"sft": {"steps": 2, "batch_size": 16}}, {"grpo": {"steps": steps}}],
            eval={"every": 0},
        )
        for name, steps in (("short", 3), ("long", 5))
    )
    ranks(2).run(tiny.train_on_pool, long)
    ranks(2).run(tiny.train_on_pool, short)
    ranks(2).run(tiny.train_on_pool, {**short, "stages": long["stages"]}, resume=True)
    extended, whole = (
        [line for line in tiny.metrics_of(tmp_path / name) if "actor/lr" in line]
        for name in ("short", "long")
    )
    assert extended == whole
