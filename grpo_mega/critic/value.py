"""The value model of PPO: what each token's return was, and a loss that draws the values there.

    A, R from the values before the update (grpo_mega.algo.advantage.gae)
    loss = 1/2 mean max((v - R)^2, (v_c - R)^2), v_c = v within `value_clip` of the value before

The value of a token is that of the state before it is chosen: what the model says at the token in front.

# T packed tokens of one micro-batch, B its sequences
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from grpo_mega.algo.advantage import gae
from grpo_mega.engine.policy import LossTerms, at_own_token
from grpo_mega.monitor.metrics import Metric, mean_of
from grpo_mega.recipe.critic_block import CriticBlock
from grpo_mega.types import PackedBatch


@dataclass(frozen=True, slots=True)
class ValueTargets:
    """Of one micro-batch, aligned with the tokens themselves; constants.

    Example: rewards 0, 1, values .5, .5 at gamma 1, lam .5 -> advantages .25, .5, returns .75, 1
    """

    values_T: torch.Tensor  # before the update
    advantages_T: torch.Tensor  # not yet normalised
    returns_T: torch.Tensor


def token_rewards(batch: PackedBatch, rewards_B: torch.Tensor) -> torch.Tensor:
    """Each sequence's reward at its last response token, 0 elsewhere."""
    rewards_T = torch.zeros_like(batch.sampler_logprobs_T)
    lasts = batch.cu_seqlens[1 : batch.num_sequences + 1].long() - 1
    rewards_T[lasts] = rewards_B.to(rewards_T.dtype)
    return rewards_T * batch.response_mask_T


def token_targets(
    batch: PackedBatch, model_values_T: torch.Tensor, rewards_T: torch.Tensor, block: CriticBlock
) -> ValueTargets:
    """Advantages and returns of the response's tokens; `model_values_T` as `CriticEngine.values` gives
    them."""
    values_T = at_own_token(model_values_T.detach())
    advantages_T, returns_T = gae(
        rewards_T, values_T, batch.cu_seqlens, batch.response_mask_T, block.gamma, block.lam
    )
    return ValueTargets(values_T, advantages_T, returns_T)


def value_loss(
    values_T: torch.Tensor, targets: ValueTargets, mask_T: torch.Tensor, clip: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each token, 0 where the mask is, and which values were clipped to a larger loss.

    Example: value 1, before .5, return 0, clip .2 -> max(1, .7^2) / 2 = .5
    """
    squared_T = (values_T - targets.returns_T).square()
    if clip is None:
        return 0.5 * squared_T.where(mask_T, 0.0), torch.zeros_like(mask_T)
    near_T = targets.values_T + (values_T - targets.values_T).clamp(-clip, clip)
    clipped_T = (near_T - targets.returns_T).square()
    larger_T = (clipped_T > squared_T) & mask_T
    return 0.5 * torch.maximum(squared_T, clipped_T).where(mask_T, 0.0), larger_T


def value_losses(
    batches: Sequence[PackedBatch], targets: Sequence[ValueTargets], tokens: int, block: CriticBlock
) -> Callable[[torch.Tensor, int], LossTerms]:
    """For `CriticEngine.train_step`: the mean over all response tokens of the update, `tokens` of them on all
    ranks. `targets` may be empty on all but the last pipeline stage."""

    def loss(model_values_T: torch.Tensor, index: int) -> LossTerms:
        mask_T, target = batches[index].response_mask_T, targets[index]
        values_T = at_own_token(model_values_T)
        loss_T, clipped_T = value_loss(values_T, target, mask_T, block.value_clip)
        error_T = target.returns_T - values_T.detach()
        metrics = {
            "value/loss": mean_of(loss_T, mask_T),
            "value/mean": mean_of(values_T, mask_T),
            "value/return_mean": mean_of(target.returns_T, mask_T),
            "value/return_variance": _variance(target.returns_T, mask_T),
            "value/error_variance": _variance(error_T, mask_T),
            "value/clip_fraction": mean_of(clipped_T.float(), mask_T),
        }
        return LossTerms(loss_T.sum() / tokens, metrics)

    return loss


def _variance(x_T: torch.Tensor, mask_T: torch.Tensor) -> Metric:
    chosen = x_T.detach().double().where(mask_T, 0.0)
    return Metric(torch.stack([chosen.sum(), chosen.square().sum()]), mask_T.sum(), "variance")


def with_explained_variance(metrics: dict[str, float]) -> dict[str, float]:
    """1 - var(R - v) / var(R): 1 for perfect values, 0 for a constant; left out where all returns are
    equal."""
    spread = metrics.get("value/return_variance", 0.0)
    if not spread:
        return metrics
    return {**metrics, "value/explained_variance": 1.0 - metrics["value/error_variance"] / spread}
