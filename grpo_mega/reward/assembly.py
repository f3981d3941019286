"""The reward of a run: the weighted sum of its components."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from grpo_mega.recipe.reward_blocks import RewardItem
from grpo_mega.reward.base import BatchReward, Reward, RewardResult
from grpo_mega.reward.code import CodeScorer
from grpo_mega.reward.format import FormatScorer
from grpo_mega.reward.math import MathScorer
from grpo_mega.reward.overlong import OverlongScorer
from grpo_mega.reward.rule import RuleScorer
from grpo_mega.reward.verilog import VerilogScorer
from grpo_mega.types import Group, Prompt, Sample, Score


class RewardAssembly:
    """Components in the recipe's order. The second of a kind is called "exact_2", and so on.

    `hidden` are folders that programs in responses must not see: the run's own. `longest` is what a response
    may have of tokens.
    """

    def __init__(self, items: Sequence[RewardItem], hidden: Sequence[Path] = (), longest: int | None = None):
        assert items, "a run without a reward has nothing to learn from"
        judges = [item for item in items if item.discriminator is not None]
        self.discriminator_weight = sum(item.weight for item in judges)
        """Of the critic's score, which is given where the critic is."""
        items = [item for item in items if item.discriminator is None]
        names: list[str] = []
        for item in items:
            names.append(_unused(item.name, names))
        self._components = [
            (_build(item, name, hidden, longest), item.weight)
            for item, name in zip(items, names, strict=True)
        ]

    @property
    def formats(self) -> list[str]:
        """Names of the components that look at a response's form."""
        return [reward.name for reward, _ in self._components if isinstance(reward, FormatScorer)]

    @property
    def weights(self) -> dict[str, float]:
        """By component, in their order; the critic's last."""
        own = {reward.name: weight for reward, weight in self._components}
        return own | ({"discriminator": self.discriminator_weight} if self.discriminator_weight else {})

    def score_groups(self, groups: Sequence[Group]) -> list[tuple[Score, ...]]:
        """One tuple a group, one Score a sample, in the samples' order."""
        pairs = [(group.prompt, sample) for group in groups for sample in group.samples]
        results = {reward.name: _score_all(reward, pairs) for reward, _ in self._components}
        scores: Iterator[Score] = (
            self._sum({name: column[place] for name, column in results.items()})
            for place in range(len(pairs))
        )
        return [tuple(next(scores) for _ in group.samples) for group in groups]

    def _sum(self, results: Mapping[str, RewardResult]) -> Score:
        # The first component that speaks of success, with the tests it counted.
        judged = next((result for result in results.values() if result.pass_rate is not None), None)
        components: dict[str, float] = {}
        for name, result in results.items():
            components[name] = result.value
            components |= {f"{name}/{part}": value for part, value in result.parts.items()}
        return Score(
            total=sum(weight * results[reward.name].value for reward, weight in self._components),
            components=components,
            # nan, not 0: where no component speaks of success, an evaluation must not report failure.
            pass_rate=math.nan if judged is None or judged.pass_rate is None else judged.pass_rate,
            passed_tests=None if judged is None else judged.passed_tests,
            total_tests=None if judged is None else judged.total_tests,
        )


def _score_all(reward: Reward, pairs: Sequence[tuple[Prompt, Sample]]) -> list[RewardResult]:
    if isinstance(reward, BatchReward):
        return reward.score_many(pairs)
    return [reward.score(prompt, sample) for prompt, sample in pairs]


def _build(item: RewardItem, name: str, hidden: Sequence[Path], longest: int | None) -> Reward:
    if item.rule is not None:
        return RuleScorer(item.rule, name)
    if item.math is not None:
        return MathScorer(item.math, name)
    if item.code is not None:
        return CodeScorer(item.code, name, hidden)
    if item.verilog is not None:
        return VerilogScorer(item.verilog, name, hidden)
    if item.overlong is not None:
        assert longest is not None, "the length that penalties refer to"
        return OverlongScorer(item.overlong, name, longest)
    assert item.format is not None
    return FormatScorer(item.format, name)


def _unused(name: str, taken: Sequence[str]) -> str:
    number = 1
    candidate = name
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate
