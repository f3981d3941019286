"""The groups that a step trains on: those sampled for it, or those that a scheduler chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from grpo_mega.collect import Rollouts, counted_and_trained, sample_groups, score_groups
from grpo_mega.data.stream import PromptStream
from grpo_mega.engine.device import device
from grpo_mega.monitor.metrics import Metric, max_of, mean_of, reduce
from grpo_mega.parts import Parts
from grpo_mega.recipe.rollout_block import Truncated
from grpo_mega.rollout.pending import Pending
from grpo_mega.rollout.replay import Origin
from grpo_mega.rollout.scheduler import GroupScheduler
from grpo_mega.rollout.sglang import SglangEngine
from grpo_mega.types import Group, Prompt, Score, ScoredGroup


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step trains on, before its advantages."""

    rollouts: Rollouts
    scores: list[tuple[Score, ...]]
    count: int  # groups, on all ranks
    sampled: list[ScoredGroup] | None  # for this step, on this rank; None: those it trains on
    metrics: dict[str, float]


def draw_step(source: StepSource, step: int, remaining: int, scheduler: GroupScheduler[Begun]) -> Drawn:
    """The step's groups with what they earned. `remaining` steps of the stage follow."""
    parts, stage_index = source.parts, source.stage_index
    recipe = parts.recipe
    block = recipe.rollout
    if not scheduler.is_selective:
        with source.phase("rollout"):
            rollouts = sample_groups(parts, source.prompts, stage_index, step, block.group_size)
        with source.phase("reward"):
            scores = score_groups(parts, rollouts)
        return Drawn(rollouts, scores, block.prompts_per_step, None, {})
    collected = scheduler.collect(source, step, remaining)
    groups = [scored.group for scored in collected.groups]
    origin = Origin(recipe.seed, stage_index, step, block.prompts_per_step, block.group_size)
    metrics = reduce(age_metrics(groups, source.updates), dist.group.WORLD)
    return Drawn(
        Rollouts(origin, collected.places, groups),
        [scored.scores for scored in collected.groups],
        collected.count,
        collected.sampled,
        collected.metrics | metrics,
    )


@dataclass(frozen=True, slots=True)
class Begun:
    """Groups of this rank that servers are sampling."""

    positions: list[int]
    pending: Pending

    def cancel(self) -> None:
        self.pending.cancel()


@dataclass(eq=False)
class StepSource:
    """Where a step's scheduler draws groups from: sampled by the policy's sampler, scored by the recipe's
    rewards. `phase` times both."""

    parts: Parts
    prompts: PromptStream
    stage_index: int
    phase: Callable[[str], AbstractContextManager[None]]

    @property
    def updates(self) -> int:
        return self.parts.sampler.updates

    def prompt(self, position: int) -> Prompt:
        return self.prompts.prompts_at(position, 1)[0]

    def sample(self, first: int, count: int) -> list[ScoredGroup]:
        inputs = self.parts.inputs
        with self.phase("rollout"):
            share = self._share(first, count)
            groups = self.parts.sampler.generate(
                [prompt for _, prompt in share],
                self.parts.recipe.rollout.group_size,
                inputs.sampling,
                inputs.stage_seed(self.stage_index),
            )
        return self._scored([position for position, _ in share], groups)

    def begin(self, first: int, count: int) -> Begun:
        sampler, inputs = self.parts.sampler, self.parts.inputs
        assert isinstance(sampler, SglangEngine), "a law of the recipe"
        share = self._share(first, count)
        pending = sampler.begin(
            [prompt for _, prompt in share],
            self.parts.recipe.rollout.group_size,
            inputs.sampling,
            inputs.stage_seed(self.stage_index),
        )
        return Begun([position for position, _ in share], pending)

    def finish(self, work: Begun) -> list[ScoredGroup]:
        sampler = self.parts.sampler
        assert isinstance(sampler, SglangEngine), "a law of the recipe"
        with self.phase("rollout"):
            groups = sampler.finish(work.pending)
        return self._scored(work.positions, groups)

    def _share(self, first: int, count: int) -> list[tuple[int, Prompt]]:
        """This rank's, with their positions."""
        batch, layout = self.prompts.prompts_at(first, count), self.parts.layout
        share = self.parts.sampler.share(batch, layout.rank, layout.world_size)
        return [(first + place, prompt) for place, prompt in share]

    def _scored(self, positions: Sequence[int], groups: Sequence[Group]) -> list[ScoredGroup]:
        with self.phase("reward"):
            scores = self.parts.inputs.rewards.score_groups(groups)
        return [ScoredGroup(*made) for made in zip(positions, groups, scores, strict=True)]

    def good(self, first: int, count: int, mine: Sequence[ScoredGroup]) -> list[bool]:
        """All ranks learn it; a sum in which each group is counted by the rank that has it."""
        found = torch.zeros(count, dtype=torch.int64, device=device())
        for scored in mine:
            found[scored.position - first] = teaches(scored, self.parts.recipe.rollout.truncated)
        dist.all_reduce(found)
        return [number > 0 for number in found.tolist()]


def states_of_ranks(scheduler: GroupScheduler[Begun], parts: Parts) -> list[dict[str, Any]]:
    """What a checkpoint keeps of it, on rank 0. A collective."""
    mine, layout = scheduler.own_state(parts.sampler.updates), parts.layout
    states: list[dict[str, Any]] = [mine] * layout.world_size
    dist.gather_object(mine, states if layout.rank == 0 else None)
    return states


def teaches(scored: ScoredGroup, truncated: Truncated) -> bool:
    """Whether some sample is trained on, and those it is compared with earned something else."""
    counted, trained = counted_and_trained(scored.group, truncated)
    totals = {score.total for score, counts in zip(scored.scores, counted, strict=True) if counts}
    return bool(trained.any()) and len(totals) > 1


def age_metrics(groups: Sequence[Group], updates: int) -> dict[str, Metric]:
    """How far behind the sampler's `updates` the tokens are, and how many samples span an update."""
    samples = [sample for group in groups for sample in group.samples]
    behind = _tensor([updates - version for sample in samples for version in sample.versions])
    partial = _tensor([len(set(sample.versions)) > 1 for sample in samples])
    each_token = torch.ones_like(behind, dtype=torch.bool)
    return {
        "rollout/staleness_mean": mean_of(behind, each_token),
        "rollout/staleness_max": max_of(behind, each_token),
        "rollout/partial_fraction": mean_of(partial, torch.ones_like(partial, dtype=torch.bool)),
    }


def _tensor(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64, device=device())
