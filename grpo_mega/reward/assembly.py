"""The reward of a run: the weighted sum of its components."""

from __future__ import annotations

import math
from collections.abc import Sequence

from grpo_mega.recipe.blocks import RewardItem
from grpo_mega.reward.base import Reward
from grpo_mega.reward.math import MathScorer
from grpo_mega.reward.rule import RuleScorer
from grpo_mega.types import Group, Prompt, Sample, Score


class RewardAssembly:
    """Components in the recipe's order. The second of a kind is called "exact_2", and so on."""

    def __init__(self, items: Sequence[RewardItem]):
        assert items, "a run without a reward has nothing to learn from"
        names: list[str] = []
        for item in items:
            names.append(_unused(item.name, names))
        self._components = [
            (_build(item, name), item.weight) for item, name in zip(items, names, strict=True)
        ]

    def score_groups(self, groups: Sequence[Group]) -> list[tuple[Score, ...]]:
        """One tuple a group, one Score a sample, in the samples' order."""
        return [tuple(self._score(group.prompt, sample) for sample in group.samples) for group in groups]

    def _score(self, prompt: Prompt, sample: Sample) -> Score:
        results = {reward.name: reward.score(prompt, sample) for reward, _ in self._components}
        pass_rates = [result.pass_rate for result in results.values() if result.pass_rate is not None]
        return Score(
            total=sum(weight * results[reward.name].value for reward, weight in self._components),
            components={name: result.value for name, result in results.items()},
            # nan, not 0: where no component speaks of success, an evaluation must not report failure.
            pass_rate=pass_rates[0] if pass_rates else math.nan,
        )


def _build(item: RewardItem, name: str) -> Reward:
    if item.rule is not None:
        return RuleScorer(item.rule, name)
    assert item.math is not None
    return MathScorer(item.math, name)


def _unused(name: str, taken: Sequence[str]) -> str:
    number = 1
    candidate = name
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate
