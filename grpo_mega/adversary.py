"""The discriminator in a run: it judges the policy's answers against a teacher's, rewards the policy by its
score, and learns from the same pairs.

Every rank calls every method at the same time: scores and losses are over all pairs of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from grpo_mega.collect import Rollouts
from grpo_mega.critic.audit import AuditSet, audit_metrics, first_pairs, is_due
from grpo_mega.critic.details import write_details
from grpo_mega.critic.discriminator import Discriminator
from grpo_mega.critic.engine import CriticEngine
from grpo_mega.critic.health import CriticHealthMonitor, CriticVerdict, HealthState
from grpo_mega.critic.pairs import AnswerPair, PairBatch, distribute_pairs
from grpo_mega.critic.ranking import DiscriminatorState, PairScores
from grpo_mega.data.stream import PromptStream
from grpo_mega.parts import Parts, start_from_policy
from grpo_mega.types import Score

COMPONENT = "discriminator"
"""The name of its score among the rewards."""
AUDIT_FILE = "critic_audit.json"


@dataclass(frozen=True, slots=True)
class Judged:
    """The step's pairs with their scores, under the weights before the step's update."""

    orders: list[int]  # of the pairs this rank made
    made: list[AnswerPair]
    pairs: PairBatch
    scores: PairScores
    reward_of: Mapping[int, float]  # by order; of all ranks' samples


class Adversary:
    """adversary.judge(rollouts, prompts); adversary.rewarded(scores, ...); adversary.learn(judged)

    `tell` hears of what its health monitor found. `state` goes into checkpoints; the weights are the
    engine's.
    """

    def __init__(
        self,
        parts: Parts,
        engine: CriticEngine,
        tell: Callable[[int, CriticVerdict], None],
        state: Mapping[str, Any] | None = None,
    ):
        self._parts, self._block, self._tell = parts, parts.recipe.critic, tell
        self._eos_ids = parts.inputs.sampling.stop_ids
        self._audit_file: Path = parts.run_dir / AUDIT_FILE
        known = state or {}
        ranking = DiscriminatorState.from_json(known["ranking"]) if known else None
        health = HealthState.from_json(known["health"]) if known else None
        self._discriminator = Discriminator(engine, self._block, ranking)
        self._health = CriticHealthMonitor(self._block.health, health)
        self._steps: int = known.get("steps", 0)
        self._audit = AuditSet.load(self._audit_file) if self._steps and self._block.audit.pairs else None

    @property
    def alone_for(self) -> int:
        """So many first steps of an adversarial stage move the critic only."""
        return self._block.critic_warmup_steps

    @property
    def state(self) -> dict[str, Any]:
        return {
            "steps": self._steps,
            "ranking": self._discriminator.state.to_json(),
            "health": self._health.state.to_json(),
        }

    @property
    def is_new(self) -> bool:
        """Whether the critic has not learnt anything yet."""
        return self._steps == 0

    def start(self) -> None:
        """As its first stage begins: the weights that the recipe wants it to start from."""
        start_from_policy(self._discriminator.engine, self._parts)

    def judge(self, rollouts: Rollouts, prompts: PromptStream) -> Judged:
        """Score every sample and the teacher's answer to its prompt."""
        made = [
            AnswerPair(
                uid=sample.uid,
                prompt_ids=group.prompt.token_ids,
                teacher_ids=teacher_ids,
                student_ids=sample.response_ids,
                prompt=group.prompt.text,
                teacher=group.prompt.teacher_response or "",
                student=sample.text,
            )
            for group in rollouts.groups
            for teacher_ids in (prompts.teacher_tokens(group.prompt),)
            for sample in group.samples
        ]
        orders = rollouts.orders
        tokens = self._parts.recipe.train.micro_batch_tokens
        pairs = distribute_pairs(orders, made, self._parts.layout, tokens, self._eos_ids, self._block.score)
        scores = self._discriminator.score(pairs)
        return Judged(orders, made, pairs, scores, self._discriminator.reward_of(pairs, scores))

    def rewarded(
        self, scores: Sequence[tuple[Score, ...]], rollouts: Rollouts, judged: Judged
    ) -> list[tuple[Score, ...]]:
        """The samples' scores with the critic's among them."""
        weight = self._parts.inputs.rewards.discriminator_weight
        orders = iter(rollouts.orders)
        return [
            tuple(_with_critic(score, judged.reward_of[next(orders)], weight) for score in group)
            for group in scores
        ]

    def learn(self, judged: Judged) -> dict[str, float]:
        """One update of the critic on the pairs, and what is measured around it."""
        self._steps += 1
        metrics = self._discriminator.update(judged.pairs, judged.scores, self._health.remedies)
        verdict = self._health.observe(self._steps, metrics)
        self._tell(self._steps, verdict)
        metrics |= verdict.metrics
        if self._block.audit.pairs and self._audit is None:
            self._audit = self._draw_audit(judged)
        if self._audit is not None and is_due(self._block.audit, self._steps):
            tokens = self._parts.recipe.train.micro_batch_tokens
            metrics |= audit_metrics(
                self._discriminator, self._audit, tokens, self._eos_ids, self._health.remedies
            )
        if self._block.details_every and self._steps % self._block.details_every == 0:
            write_details(
                self._parts.run_dir,
                judged.orders,
                judged.made,
                judged.pairs,
                judged.scores,
                metrics,
                self._eos_ids,
                step=self._steps,
                count=self._block.details_pairs,
            )
        return metrics

    def _draw_audit(self, judged: Judged) -> AuditSet:
        """From the first step's pairs, the same on every rank and whatever the layout."""
        gathered: list[list[tuple[int, AnswerPair]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, list(zip(judged.orders, judged.made, strict=True)))
        audit = first_pairs([pair for part in gathered for pair in part], self._block.audit.pairs)
        if self._parts.is_lead:
            audit.save(self._audit_file)
        dist.barrier()
        return audit


def _with_critic(score: Score, given: float, weight: float) -> Score:
    components = {**score.components, COMPONENT: given}
    return replace(score, total=score.total + weight * given, components=components)
