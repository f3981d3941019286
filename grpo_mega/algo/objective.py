"""The policy loss on packed sequences: ratio -> credit -> clipped objective -> aggregate, plus KL and
entropy.

Modules A (ratio) and B (credit weights) are identities here; each innovation plugs in at its marked place.
Everything is per token until `aggregate`, whose denominators are global: counted over all ranks and
micro-batches of an update.

# T packed tokens, B sequences
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from grpo_mega.algo.innovations import check_known
from grpo_mega.monitor.metrics import Metric, Metrics, max_of, mean_of, min_of
from grpo_mega.recipe.blocks import ClipObjective, LossBlock

LOG_RATIO_BOUND = 10.0  # exp(10) = 22,026: beyond it float32 ratios only carry noise
RATIO_BOUNDS = (1e-4, 1e4)
CLAMPED_BEYOND = min(LOG_RATIO_BOUND, math.log(RATIO_BOUNDS[1]))  # 9.21: the tighter of the two


@dataclass(frozen=True, slots=True)
class Denominators:
    """Counted once over the whole update before its first forward pass."""

    tokens: float
    sequences: float


@dataclass(frozen=True, slots=True)
class PolicyLossOutput:
    """`loss` is this micro-batch's part of the update's loss: parts add up to the loss, whatever the
    split."""

    loss: torch.Tensor
    metrics: Metrics
    per_token: torch.Tensor  # T, the objective's loss before aggregation, detached


class PolicyLoss:
    """Clipped GRPO with an optional KL penalty and entropy bonus.

        l = trainer - sampler;  s = exp(clamp(l));  objective = min(A s, A clip(s, 1 - low, 1 + high)), for A
        < 0 at least c A loss = sum_t weight_t (-objective_t + kl_coef KL_t - entropy_coef H_t),  weight_t
        from `aggregate`

    Example: one response token, s = 1.5, A = 1, clip .2 -> objective 1.2, loss -1.2.
    """

    def __init__(self, config: LossBlock | Mapping[str, Any], *, default_norm_length: int | None = None):
        self.config = config if isinstance(config, LossBlock) else LossBlock.model_validate(config)
        check_known(self.config.innovations)
        self.clip = (self.config.objective and self.config.objective.clip) or ClipObjective()
        self.norm_length = self.config.norm_length or default_norm_length
        if self.config.aggregate == "seq-mean-token-sum-norm" and self.norm_length is None:
            raise ValueError("aggregate seq-mean-token-sum-norm needs norm_length")

    def __call__(
        self,
        trainer_logprobs_T: torch.Tensor,
        sampler_logprobs_T: torch.Tensor,
        advantages: torch.Tensor,  # B, one for each sequence, or T
        cu_seqlens: torch.Tensor,
        reference_logprobs_T: torch.Tensor | None = None,
        entropy_T: torch.Tensor | None = None,
        sq_prob_T: torch.Tensor | None = None,  # read by gradient-adaptive weighting
        response_mask_T: torch.Tensor | None = None,
        denominators: Denominators | None = None,
    ) -> PolicyLossOutput:
        mask_T = (
            torch.ones_like(trainer_logprobs_T, dtype=torch.bool)
            if response_mask_T is None
            else response_mask_T
        )
        sequence_T = sequence_index(cu_seqlens, trainer_logprobs_T.shape[0])
        advantages_T = (
            advantages if advantages.shape == trainer_logprobs_T.shape else _spread(advantages, sequence_T)
        )
        denominators = denominators or local_denominators(mask_T, sequence_T)

        log_ratio_T = (trainer_logprobs_T - sampler_logprobs_T).where(mask_T, 0.0)
        ratio_T = torch.exp(log_ratio_T.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)).clamp(*RATIO_BOUNDS)
        # Module A (ema, amic, gspo) transforms ratio_T here; module B (credit weights) multiplies policy_T
        # below.
        policy_T = self._clipped(ratio_T, advantages_T)
        loss_T = policy_T
        metrics = self._metrics(ratio_T, log_ratio_T, advantages_T, policy_T, trainer_logprobs_T, mask_T)
        if self.config.kl.coef:
            if reference_logprobs_T is None:
                raise ValueError("kl.coef is above 0: the KL penalty needs reference_logprobs_T")
            kl_T = kl_penalty(trainer_logprobs_T, reference_logprobs_T, self.config.kl.estimator)
            loss_T = loss_T + self.config.kl.coef * kl_T
            metrics["actor/kl_penalty"] = mean_of(kl_T, mask_T)
            metrics["actor/mean_log_prob_ref"] = mean_of(reference_logprobs_T, mask_T)
        if entropy_T is not None:
            metrics["actor/entropy"] = mean_of(entropy_T, mask_T)
            if self.config.entropy_coef:
                loss_T = loss_T - self.config.entropy_coef * entropy_T
        loss_T = loss_T.where(mask_T, 0.0)
        weight_T = aggregation_weights(
            self.config.aggregate, mask_T, sequence_T, denominators, self.norm_length
        )
        loss = (weight_T * loss_T).sum()
        policy = (weight_T * policy_T.where(mask_T, 0.0)).sum()
        # parts of one sum, so that the reported loss is the optimised one whatever `aggregate` is
        one = torch.ones_like(loss.detach())
        metrics["actor/loss"] = Metric(loss.detach(), one, "sum")
        metrics["actor/policy_loss"] = Metric(policy.detach(), one, "sum")
        return PolicyLossOutput(loss, metrics, loss_T.detach())

    def _clipped(self, ratio_T: torch.Tensor, advantages_T: torch.Tensor) -> torch.Tensor:
        plain_T = advantages_T * ratio_T
        clipped_T = advantages_T * ratio_T.clamp(1 - self.clip.low, 1 + self.clip.high)
        objective_T = torch.minimum(plain_T, clipped_T)
        if self.clip.dual is not None:
            bounded_T = torch.maximum(objective_T, self.clip.dual * advantages_T)
            objective_T = torch.where(advantages_T < 0, bounded_T, objective_T)
        return -objective_T

    def _metrics(
        self,
        ratio_T: torch.Tensor,
        log_ratio_T: torch.Tensor,
        advantages_T: torch.Tensor,
        policy_T: torch.Tensor,
        trainer_logprobs_T: torch.Tensor,
        mask_T: torch.Tensor,
    ) -> dict[str, Metric]:
        ratio_T, log_ratio_T = ratio_T.detach(), log_ratio_T.detach()
        plain_T = -advantages_T * ratio_T
        dual = self.clip.dual
        lower_T = (advantages_T < 0) & (policy_T < plain_T) if dual else torch.zeros_like(mask_T)
        above_T = (advantages_T > 0) & (ratio_T > 1 + self.clip.high)
        below_T = (advantages_T < 0) & (ratio_T < 1 - self.clip.low)
        # k3 of the sampler's against the trainer's distribution: 0 when the two engines agree
        bounded_T = log_ratio_T.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        mismatch_T = torch.expm1(bounded_T) - bounded_T
        return {
            "actor/mean_ratio": mean_of(ratio_T, mask_T),
            "actor/ratio_max": max_of(ratio_T, mask_T),
            "actor/ratio_min": min_of(ratio_T, mask_T),
            "actor/log_ratio_abs_mean": mean_of(log_ratio_T.abs(), mask_T),
            "actor/log_ratio_abs_max": max_of(log_ratio_T.abs(), mask_T),
            "actor/log_ratio_clamped_fraction": mean_of((log_ratio_T.abs() > CLAMPED_BEYOND).float(), mask_T),
            "actor/clip_fraction": mean_of((above_T | below_T).float(), mask_T),
            "actor/clip_fraction_lower": mean_of(lower_T.float(), mask_T),
            "actor/mean_advantage": mean_of(advantages_T, mask_T),
            "actor/mean_log_prob_current": mean_of(trainer_logprobs_T, mask_T),
            "mismatch/k3_kl": mean_of(mismatch_T, mask_T),
        }


def sequence_index(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """The sequence each packed token belongs to.

    Example: cu_seqlens (0, 2, 2, 5) -> 0 0 2 2 2
    """
    return torch.searchsorted(
        cu_seqlens[1:].contiguous(), torch.arange(tokens, device=cu_seqlens.device), right=True
    )


def _spread(per_sequence_B: torch.Tensor, sequence_T: torch.Tensor) -> torch.Tensor:
    """Per-sequence values to tokens; tokens of the padding (a sequence beyond the last) get 0."""
    padded = torch.cat([per_sequence_B, per_sequence_B.new_zeros(1)])
    return padded[sequence_T.clamp(max=per_sequence_B.shape[0])]


def response_lengths(mask_T: torch.Tensor, sequence_T: torch.Tensor) -> torch.Tensor:
    """Number of response tokens of each token's own sequence, at least 1."""
    count = int(sequence_T.max()) + 1 if sequence_T.numel() else 0
    lengths = torch.zeros(count, dtype=torch.float32, device=mask_T.device).index_add_(
        0, sequence_T, mask_T.float()
    )
    return lengths.clamp(min=1)[sequence_T]


def local_denominators(mask_T: torch.Tensor, sequence_T: torch.Tensor) -> Denominators:
    """For a single rank with a single micro-batch."""
    return Denominators(tokens=float(mask_T.sum()), sequences=float(sequence_T[mask_T].unique().numel()))


def aggregation_weights(
    aggregate: str,
    mask_T: torch.Tensor,
    sequence_T: torch.Tensor,
    denominators: Denominators,
    norm_length: int | None,
) -> torch.Tensor:
    """What each response token's loss is multiplied by; sums over the update to 1 for the two means."""
    tokens, sequences = max(denominators.tokens, 1.0), max(denominators.sequences, 1.0)
    if aggregate == "token-mean":
        weight_T = torch.full(mask_T.shape, 1.0 / tokens, device=mask_T.device)
    elif aggregate == "seq-mean-token-sum":
        weight_T = torch.full(mask_T.shape, 1.0 / sequences, device=mask_T.device)
    elif aggregate == "seq-mean-token-mean":
        weight_T = 1.0 / (sequences * response_lengths(mask_T, sequence_T))
    else:
        assert norm_length is not None
        weight_T = torch.full(mask_T.shape, 1.0 / (sequences * norm_length), device=mask_T.device)
    return weight_T.where(mask_T, 0.0)


def kl_penalty(
    trainer_logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor, estimator: str
) -> torch.Tensor:
    """Estimators of KL(trainer || reference) from one sampled token; d = reference - trainer, clamped to
    +-10.

    k1 = -d, k2 = d^2 / 2, k3 = e^d - 1 - d (never negative, low variance), abs = |d|
    """
    difference_T = (reference_logprobs_T - trainer_logprobs_T).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if estimator == "k1":
        return -difference_T
    if estimator == "k2":
        return 0.5 * difference_T.square()
    if estimator == "abs":
        return difference_T.abs()
    return torch.expm1(difference_T) - difference_T
