"""The discriminator: a critic engine, its loss over pairs, and the reward that it gives.

# N distinct sequences of the step
"""

from __future__ import annotations

import torch

from grpo_mega.critic.engine import CriticEngine
from grpo_mega.critic.health import Remedies
from grpo_mega.critic.pairs import PairBatch
from grpo_mega.critic.ranking import DiscriminatorState, PairScores, judge, pair_scores
from grpo_mega.critic.report import pair_metrics
from grpo_mega.engine.policy import LossTerms
from grpo_mega.recipe.critic_block import CriticBlock


class Discriminator:
    """A critic engine with its loss.

    Example:
        pairs = distribute_pairs(places, answer_pairs, layout, tokens, eos_ids, block.score)
        scores = discriminator.score(pairs)
        reward_of_place = discriminator.reward_of(pairs, scores)
        metrics = discriminator.update(pairs, scores, remedies)
    """

    def __init__(self, engine: CriticEngine, block: CriticBlock, state: DiscriminatorState | None = None):
        self.engine, self.block = engine, block
        self.state = state or DiscriminatorState()

    def score(self, pairs: PairBatch) -> PairScores:
        """Under the current weights. A collective; the same on every rank."""
        raw_N = self.engine.score(pairs.batches, pairs.count)
        return pair_scores(raw_N, pairs, length_mix=self.block.length_mix)

    def reward_of(self, pairs: PairBatch, scores: PairScores) -> dict[int, float]:
        """Of every pair's place the student's score: the same number that loss and metrics see."""
        return dict(zip(pairs.places_P, scores.student_P.tolist(), strict=True))

    def update(
        self, pairs: PairBatch, scores: PairScores, remedies: Remedies | None = None
    ) -> dict[str, float]:
        """One optimizer step on pairs that were scored under the current weights: what it measured before
        them, on every rank."""
        remedies = remedies or Remedies()
        raw_N = scores.raw_N.detach().requires_grad_()
        judged = judge(
            pair_scores(raw_N, pairs, length_mix=self.block.length_mix), self.block, self.state, remedies
        )
        (gradient_N,) = torch.autograd.grad(judged.loss, raw_N)
        gradients = [scored.token_gradients(gradient_N) for scored in pairs.batches]

        def linear(values_T: torch.Tensor, index: int) -> LossTerms:
            return LossTerms((gradients[index] * values_T).sum(), {})

        lr, clip = remedies.lr(self.block.lr), remedies.grad_clip or self.block.grad_clip
        batches = [scored.batch for scored in pairs.batches]
        _, update = self.engine.train_step(batches, linear, lr, grad_clip=clip)
        metrics = pair_metrics("critic", pairs, scores, judged)
        metrics |= {"critic/lr": lr, "critic/update_skipped": float(not update.applied)}
        metrics["critic/grad_norm"] = update.grad_norm
        if update.applied:
            self.state = judged.state
            metrics["critic/grad_norm_after_clip"] = min(update.grad_norm, clip)
        return metrics

    def measure(self, pairs: PairBatch, prefix: str, remedies: Remedies | None = None) -> dict[str, float]:
        """The same numbers of any pairs, without an update."""
        scores = self.score(pairs)
        return pair_metrics(prefix, pairs, scores, judge(scores, self.block, self.state, remedies))
