"""What is reported of rewards: rules on form, the critic's part, and the correlation with length."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_mega.monitor.metrics import merge, reduce
from grpo_mega.recipe.reward_blocks import RewardItem
from grpo_mega.reward.assembly import RewardAssembly
from grpo_mega.reward.report import CRITIC, reward_report
from grpo_mega.types import Group, Prompt, Sample, Score

RESPONSES = ("fine words here", "fine words here", "<think>fine words</think>", "no")
"""The reference is as long as the first; the third leaks its thinking (-.4) and is too long: 25 characters,
1.67 times the reference; the last is too short (-.3): 2 / 15."""


def scored(*items: RewardItem, responses=RESPONSES) -> tuple[RewardAssembly, list[Score]]:
    rewards = RewardAssembly(items)
    prompt = Prompt("p", 0, "say it", (1,), answer="fine words here")
    samples = tuple(
        Sample(f"p/{i}", i, (1,) * len(text), (0.0,) * len(text), text, "stop")
        for i, text in enumerate(responses)
    )
    return rewards, [score for group in rewards.score_groups([Group(prompt, samples)]) for score in group]


def report(rewards: RewardAssembly, scores: list[Score], lengths: list[int]) -> dict[str, float]:
    """Over two parts, as of two ranks, the second with a single sample."""
    places = torch.tensor(lengths, dtype=torch.float64)
    parts = [
        reward_report(scores[part], places[part], rewards.weights, rewards.formats)
        for part in (slice(0, -1), slice(-1, None))
    ]
    return reduce(merge(parts))


def test_each_rule_of_a_format_reward_has_its_share() -> None:
    form = RewardItem.model_validate({"format": {"expect_json": False}, "weight": 0.3})
    rewards, scores = scored(form)
    metrics = report(rewards, scores, [3, 3, 3, 3])
    too_long = scores[2].components["format/too_long"]
    values = [0.0, 0.0, -0.4 + too_long, -0.3]
    assert -0.6 < too_long < 0
    assert metrics["format/reward_avg"] == pytest.approx(sum(values) / 4)
    assert (metrics["format/reward_min"], metrics["format/reward_max"]) == (pytest.approx(min(values)), 0.0)
    assert metrics["format/penalty_ratio"] == 0.5
    shares = {name: value for name, value in metrics.items() if name.endswith("_ratio") and value}
    assert shares == {
        "format/penalty_ratio": 0.5,
        "format/thinking_leak_ratio": 0.25,
        "format/too_long_ratio": 0.25,
        "format/too_short_ratio": 0.25,
    }
    assert metrics["reward/format_contribution_mean"] == pytest.approx(0.3 * sum(values) / 4)
    assert metrics["reward/combined_mean"] == pytest.approx(0.3 * sum(values) / 4)


def test_the_critics_part_is_there_only_where_it_has_scored() -> None:
    items = [RewardItem.model_validate({"discriminator": {}}), RewardItem.model_validate({"rule": {}})]
    rewards, scores = scored(*items)
    assert not {name for name in report(rewards, scores, [1, 2, 3, 4]) if "discriminator" in name}
    given = [
        Score(score.total + critic, {**score.components, CRITIC: critic}, score.pass_rate)
        for score, critic in zip(scores, (2.0, -1.0, 0.0, 4.0), strict=True)
    ]
    metrics = report(rewards, given, [1, 2, 3, 4])
    assert metrics["reward/discriminator_mean"] == pytest.approx(1.25)
    assert (metrics["reward/discriminator_min"], metrics["reward/discriminator_max"]) == (-1.0, 4.0)
    # the rule gives 1, 1, 0, 0 beside it
    assert metrics["reward/combined_mean"] == pytest.approx((3 + 0 + 0 + 4) / 4)
    assert "reward/format_contribution_mean" not in metrics


def test_the_correlation_of_reward_and_length_by_hand() -> None:
    """x = 1 1 0 0, y = 4 2 1 1: centred x is +-.5, centred y 2 0 -1 -1: 2 / sqrt(1 * 6)."""
    rewards, scores = scored(RewardItem.model_validate({"rule": {}}))
    assert report(rewards, scores, [4, 2, 1, 1])["reward/length_corr"] == pytest.approx(2 / math.sqrt(6))
    assert "reward/length_corr" not in report(rewards, scores, [2, 2, 2, 2])  # nothing to go by


def test_a_second_format_reward_has_its_own_name() -> None:
    form = RewardItem.model_validate({"format": {"expect_json": False}})
    second = RewardItem.model_validate({"format": {"expect_json": True}, "weight": 2.0})
    rewards, scores = scored(form, second)
    metrics = report(rewards, scores, [1, 2, 3, 4])
    assert metrics["format/json_missing_ratio"] == 0.0 and metrics["format_2/json_missing_ratio"] == 1.0
    assert metrics["reward/format_contribution_mean"] == pytest.approx(metrics["reward/combined_mean"])
