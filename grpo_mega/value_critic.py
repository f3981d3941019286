"""The value model of PPO in a run: it says what every token's state is worth, the policy's advantages follow
from that, and it learns from the returns.

Every rank calls every method at the same time.

# T packed tokens of one micro-batch
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from grpo_mega.algo.advantage import StepMoments, moments_of
from grpo_mega.algo.aggregate import Denominators
from grpo_mega.critic.engine import CriticEngine
from grpo_mega.critic.value import (
    ValueTargets,
    token_rewards,
    token_targets,
    value_losses,
    with_explained_variance,
)
from grpo_mega.engine.device import device
from grpo_mega.parts import Parts, start_from_policy
from grpo_mega.types import PackedBatch


@dataclass(frozen=True, slots=True)
class ValuedUpdate:
    """The micro-batches of one optimizer step with their advantages, and what the values are drawn to. Only
    the last pipeline stage has either."""

    batches: list[PackedBatch]
    targets: list[ValueTargets]


class ValueCritic:
    """valued = critic.assess(updates); metrics = critic.learn(valued, counts)

    `state` goes into checkpoints; the weights are the engine's.
    """

    def __init__(self, parts: Parts, engine: CriticEngine, state: Mapping[str, Any] | None = None):
        self._parts, self._engine, self._block = parts, engine, parts.recipe.critic
        self._steps: int = (state or {}).get("steps", 0)

    @property
    def alone_for(self) -> int:
        """So many first steps of a grpo stage move the critic only."""
        return self._block.critic_warmup_steps

    @property
    def state(self) -> dict[str, Any]:
        return {"steps": self._steps}

    @property
    def is_new(self) -> bool:
        """Whether the critic has not learnt anything yet."""
        return self._steps == 0

    def start(self) -> None:
        """As its first stage begins: the weights that the recipe wants it to start from."""
        start_from_policy(self._engine, self._parts)

    def assess(self, updates: Sequence[Sequence[PackedBatch]]) -> tuple[list[ValuedUpdate], dict[str, float]]:
        """Advantages of every response token of the step, under the values before any of its updates. Of the
        whole step they have mean 0 and std 1, unless the recipe leaves them as they are."""
        targets = [
            [
                token_targets(batch, values_T, token_rewards(batch, batch.rewards_B), self._block)
                for batch, values_T in zip(batches, self._engine.values(batches), strict=False)
            ]
            for batches in updates
        ]
        moments = self._moments(updates, targets)
        valued = [self._valued(*each, moments) for each in zip(updates, targets, strict=True)]
        return valued, {"value/advantage_mean": moments.mean, "value/advantage_std": moments.std}

    def learn(self, valued: Sequence[ValuedUpdate], counts: Sequence[Denominators]) -> dict[str, float]:
        """One optimizer step for each of the policy's; what is reported is the last one's."""
        self._steps += 1
        metrics: dict[str, float] = {}
        skipped = 0.0
        for update, count in zip(valued, counts, strict=True):
            loss = value_losses(update.batches, update.targets, int(count.tokens), self._block)
            measured, made = self._engine.train_step(update.batches, loss, self._block.lr)
            metrics = with_explained_variance(self._engine.reduce_metrics(measured))
            metrics["value/grad_norm"] = made.grad_norm
            skipped = max(skipped, float(not made.applied))
        return metrics | {"value/lr": self._block.lr, "value/update_skipped": skipped}

    def _moments(
        self, updates: Sequence[Sequence[PackedBatch]], targets: Sequence[Sequence[ValueTargets]]
    ) -> StepMoments:
        """Of the advantages of all response tokens of the step, on every rank. Of the ranks that hold the
        same share of them one adds it up."""
        layout, mine = self._engine.layout, StepMoments(0.0, 0.0, 0.0)
        if layout.is_last_stage and layout.tp_rank == 0 and layout.cp_rank == 0:
            for batches, found in zip(updates, targets, strict=True):
                for batch, target in zip(batches, found, strict=True):
                    mine += moments_of(target.advantages_T, batch.response_mask_T)
        sums = torch.tensor([mine.count, mine.total, mine.squares], dtype=torch.float64, device=device())
        dist.all_reduce(sums)
        return StepMoments(*sums.tolist())

    def _valued(
        self, batches: Sequence[PackedBatch], targets: list[ValueTargets], moments: StepMoments
    ) -> ValuedUpdate:
        if not targets:  # a pipeline stage before the last, which computes no loss
            return ValuedUpdate(list(batches), targets)
        given = [
            replace(batch, advantages_T=self._normalised(target, batch, moments))
            for batch, target in zip(batches, targets, strict=True)
        ]
        return ValuedUpdate(given, targets)

    def _normalised(self, target: ValueTargets, batch: PackedBatch, moments: StepMoments) -> torch.Tensor:
        advantage = self._parts.recipe.advantage
        if not advantage.normalize_std:
            return target.advantages_T
        if moments.std == 0.0:
            return torch.zeros_like(target.advantages_T)
        scaled_T = (target.advantages_T.double() - moments.mean) / (moments.std + advantage.epsilon)
        return scaled_T.where(batch.response_mask_T, 0.0).float()
