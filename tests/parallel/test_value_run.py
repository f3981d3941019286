"""Whole runs of PPO: a value model beside the policy, the same on any layout, through a kill, learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny
from tests.critic import LAYOUTS, build
from tests.matrices import by_hand
from tests.parallel.test_kill_and_resume import arm
from tests.processes import run_ranks
from tests.ranks import RankPool


def recipe_of(run_dir: Path, **blocks: object) -> dict[str, Any]:
    given: dict[str, Any] = {
        "stages": [{"sft": {"steps": 2, "batch_size": 16}}, {"grpo": {"steps": 5}}],
        "advantage": {"estimator": "gae"},
        "critic": {"kind": "value", "lr": 1e-3, "grad_clip": 1.0, "gamma": 0.9, "lam": 0.8},
    }
    return tiny.recipe_dict(run_dir, layers=4, **{**given, **blocks})


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    ranks(1).run(tiny.train_on_pool, recipe_of(run_dir))
    return run_dir


def steps_of(run_dir: Path) -> dict[Any, dict[str, float]]:
    return {
        line["step"]: line
        for line in tiny.metrics_of(run_dir)
        if "actor/loss" in line or "value/loss" in line
    }


def test_values_are_learnt_and_advantages_are_those_of_tokens(alone):
    steps = steps_of(alone)
    assert sorted(steps) == [3, 4, 5, 6, 7]  # not in the supervised stage
    for line in steps.values():
        assert line["value/loss"] > 0 and line["value/lr"] == 1e-3 and line["value/update_skipped"] == 0
        # over the step's tokens they have mean 0 and std 1; a group's would differ between samples alone
        assert line["actor/mean_advantage"] == pytest.approx(0.0, abs=1e-5)
        assert line["actor/std_advantage"] == pytest.approx(1.0, abs=1e-4)
        assert line["value/advantage_std"] > 0
    assert steps[7]["value/loss"] < steps[3]["value/loss"]


@pytest.mark.parametrize(
    "parallel",
    [by_hand({"dp": 2}), {"tp": 2}, {"pp": 2}, by_hand({"cp": 2}), by_hand({"tp": 2, "pp": 2})],
    ids=["dp2", "tp2", "pp2", "cp2", "tp2-pp2"],
)
def test_the_layout_changes_nothing(parallel, alone, ranks, tmp_path):
    size = 4 if len(parallel) == 2 else 2
    ranks(size).run(tiny.train_on_pool, recipe_of(tmp_path / "run", parallel=parallel))
    lines, reference = tiny.metrics_of(tmp_path / "run"), tiny.metrics_of(alone)
    assert [line["step"] for line in lines] == [line["step"] for line in reference]
    for line, expected in zip(lines, reference, strict=True):
        # Adam's first steps are as long for a tiny gradient as for a large one: rounding shows later
        assert line == pytest.approx(expected, rel=5e-3, abs=2e-3), f"step {line['step']}"


def assessed(directory: Path, options: dict[str, Any]) -> dict[tuple[int, int], list[float]]:
    """By order of the sequence: its tokens' values, returns and advantages, from the last stage."""
    from grpo_mega.batching import distribute
    from grpo_mega.critic.value import token_rewards, token_targets
    from grpo_mega.recipe.critic_block import CriticBlock

    block = CriticBlock(kind="value", head_std=0.5, gamma=0.9, lam=0.8)
    engine = build(directory, options, block)
    sequences = tiny.random_sequences(8)[engine.layout.rank :: engine.layout.world_size]
    batches, _ = distribute(sequences, engine.layout, 48)
    found: dict[Any, list[float]] = {}
    for batch, values_T in zip(batches, engine.values(batches), strict=False):
        targets = token_targets(batch, values_T, token_rewards(batch, batch.rewards_B), block)
        bounds = batch.cu_seqlens.tolist()
        for uid, begin, end in zip(batch.uids, bounds, bounds[1:], strict=False):
            rows = (targets.values_T, targets.returns_T, targets.advantages_T)
            mask = batch.response_mask_T[begin:end]
            found[uid] = [row[begin:end][mask].tolist() for row in rows]
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save_model("qwen2", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("layout", ["dp2", "tp2-sp", "pp2", "cp2"])
def test_values_returns_and_advantages_of_every_token_on_every_layout(layout, model, ranks):
    expected = ranks(1).run(assessed, model, {})[0]
    seen: dict[Any, list[float]] = {}
    for part in ranks(2).run(assessed, model, LAYOUTS[layout]):
        seen |= part
    assert seen.keys() == expected.keys() and len(seen) == 8
    for uid, rows in expected.items():
        for row, own in zip(rows, seen[uid], strict=True):
            assert own == pytest.approx(row, rel=1e-4, abs=2e-5)


def test_returns_are_what_the_definition_says(model, ranks):
    """R_t = A_t + V_t with A_t = sum_k (gamma lam)^k delta_{t+k}, and the reward on the last token: float64
    loops over each sequence alone."""
    rewards = {sequence.uid: sequence.reward for sequence in tiny.random_sequences(8)}
    assert len(set(rewards.values())) == 8
    for uid, (values, returns, advantages) in ranks(1).run(assessed, model, {})[0].items():
        count = len(values)
        reward = [0.0] * (count - 1) + [rewards[uid]]
        ahead = [*values[1:], 0.0]
        delta = [r + 0.9 * n - v for r, n, v in zip(reward, ahead, values, strict=True)]
        for t in range(count):
            advantage = sum((0.9 * 0.8) ** (k - t) * delta[k] for k in range(t, count))
            assert advantages[t] == pytest.approx(advantage, abs=1e-5)
            assert returns[t] == pytest.approx(advantage + values[t], abs=1e-5)


def train(recipe: dict[str, Any], kill: tuple[str, int] | None, resume: bool) -> None:
    if kill:
        arm(*kill)
    tiny.train_on_pool(recipe, resume=resume)


def test_killed_it_goes_on_with_the_critic_it_had(tmp_path):
    whole, broken = (
        recipe_of(tmp_path / name, parallel={"dp": 2}, checkpoint={"every": 1, "keep": 9})
        for name in ("whole", "broken")
    )
    assert run_ranks(2, train, whole, None, False) == [0, 0]
    kill = ("grpo_mega.value_critic:ValueCritic.learn", 3)
    assert -9 in run_ranks(2, train, broken, kill, False)
    assert run_ranks(2, train, broken, None, True) == [0, 0]
    assert tiny.metrics_of(tmp_path / "broken") == tiny.metrics_of(tmp_path / "whole")


def test_exactly_so_many_first_steps_move_the_critic_only_and_updates_share_its_values(ranks, tmp_path):
    critic = {"kind": "value", "lr": 1e-3, "grad_clip": 1.0, "critic_warmup_steps": 2}
    train_block = {"updates_per_batch": 2}
    ranks(1).run(tiny.train_on_pool, recipe_of(tmp_path, critic=critic, train=train_block))
    steps = steps_of(tmp_path)
    assert ["actor/loss" in steps[step] for step in range(3, 8)] == [False, False, True, True, True]
    assert all("value/loss" in line for line in steps.values())


@pytest.mark.exhaustive
def test_groups_of_one_learn_what_earns_a_reward(ranks, tmp_path):
    """From nothing: any of five digits is worth 1. The values come to explain the returns."""
    recipe = recipe_of(
        tmp_path,
        stages=[{"grpo": {"steps": 40}}],
        rollout={"prompts_per_step": 64, "group_size": 1},
        reward=[{"rule": {"kind": "regex", "pattern": "^[0-4]"}}],
        critic={"kind": "value", "lr": 2e-3, "grad_clip": 1.0, "critic_warmup_steps": 3},
        train={"lr": 3e-3, "micro_batch_tokens": 2048},
        eval={"every": 0},
    )
    ranks(1).run(tiny.train_on_pool, recipe)
    steps = [line for line in tiny.metrics_of(tmp_path) if "value/loss" in line]
    early, late = (np.mean([line["reward/mean"] for line in part]) for part in (steps[:5], steps[-5:]))
    assert late > early + 0.4, (early, late)
    assert steps[-1]["value/loss"] < steps[0]["value/loss"]
    assert "group/zero_std_fraction" not in steps[0]  # of one sample there is nothing to compare


@pytest.mark.parametrize("size", [by_hand(1), 2])
def test_a_checkpoint_without_a_critic_is_no_checkpoint_of_a_run_with_one(size, ranks, tmp_path):
    """Every rank says so, and none waits for another in a collective."""
    options = {"parallel": {"dp": size}, "stages": [{"grpo": {"steps": 1}}], "eval": {"every": 0}}
    plain = recipe_of(tmp_path, **options, critic={"kind": "none"}, advantage={"estimator": "grpo"})
    ranks(size).run(tiny.train_on_pool, plain)
    pool = RankPool(size)
    try:
        with pytest.raises(AssertionError) as failure:
            pool.run(tiny.train_on_pool, recipe_of(tmp_path, **options), resume=True)
    finally:
        pool.close()
    for rank in range(size):
        assert f"rank {rank}: " in str(failure.value)
    assert str(failure.value).count("UserError: step_000001 holds no critic, and this recipe has one") == size
    assert "critic.kind=none" in str(failure.value)


def _refused(**blocks: object) -> str:
    return tiny.refusal(recipe_of(Path("run"), **blocks))


def test_recipes_that_cannot_be_are_refused():
    assert "set critic.kind (it is none) to value" in _refused(critic={"kind": "none"})
    assert "advantage.estimator gae alone" in _refused(advantage={"estimator": "grpo"})
    assert "add a grpo stage" in _refused(stages=[{"sft": {"steps": 1}}])
