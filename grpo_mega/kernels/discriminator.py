"""The discriminator's ranking loss on pairs of scores: a teacher's and a student's answer to the same prompt.

# P pairs of this rank
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

EPSILON = 1e-8
"""Added to the batch's standard deviation."""


@dataclass(frozen=True, slots=True)
class RankingOptions:
    """What shapes the loss; the scores' unit is that of the value head."""

    temperature: float = 5.0
    margin: float = 0.0  # the difference that counts as no preference
    batch_norm: bool = True
    regularisation_threshold: float = 3.0  # scores beyond it, of either sign, are drawn back
    regularisation_weight: float = 0.01
    label_smoothing: float = 0.0  # share of pairs taken to be the other way round
    ranking_weight: float = 1.0
    gap_penalty: float = 0.0
    gap_max: float = 5.0  # a difference beyond it is penalised


@dataclass(frozen=True, slots=True)
class RankingOutput:
    """`loss` is this rank's part: parts add up over ranks."""

    loss: torch.Tensor
    ranking: torch.Tensor  # detached parts of it
    regularisation: torch.Tensor
    difference_P: torch.Tensor  # as the loss saw it, normalised where batch_norm is on; detached
    batch_mean: torch.Tensor
    batch_std: torch.Tensor


def discriminator_loss(
    teacher_P: torch.Tensor,
    student_P: torch.Tensor,
    options: RankingOptions,
    group: dist.ProcessGroup | None = None,
) -> RankingOutput:
    """ranking_weight mean softplus(-(d - margin) / tau) + weight (mean relu(|T| - theta)^2 + mean relu(|S| -
    theta)^2) + gap_penalty mean relu(d - gap_max)

    d = T - S, each less the mean and divided by (std + 1e-8) of all scores of both sides over all ranks of
    `group` under batch_norm; means are over all pairs of all ranks. The statistics carry their gradient
    across ranks.

    Example: T = 1, S = -1, tau 1, no batch norm, no regularisation -> softplus(-2) = .1269
    """
    if teacher_P.dtype != torch.float64:
        teacher_P, student_P = teacher_P.float(), student_P.float()
    one = torch.ones((), device=teacher_P.device, dtype=teacher_P.dtype)
    pairs = _over_ranks(one * teacher_P.shape[0], group).clamp(min=1.0)
    both = torch.cat([teacher_P, student_P])
    mean = _over_ranks(both.sum(), group) / (2 * pairs)
    variance = _over_ranks((both - mean).square().sum(), group) / (2 * pairs)
    std = variance.clamp(min=1e-24).sqrt()
    difference_P = teacher_P - student_P
    if options.batch_norm:
        difference_P = difference_P / (std + EPSILON)
    logit_P = (difference_P - options.margin) / options.temperature
    smoothing = options.label_smoothing
    ranking = ((1 - smoothing) * F.softplus(-logit_P) + smoothing * F.softplus(logit_P)).sum() / pairs
    beyond = (both.abs() - options.regularisation_threshold).relu().square().sum() / pairs
    regularisation = options.regularisation_weight * beyond
    gap = (difference_P - options.gap_max).relu().sum() / pairs
    return RankingOutput(
        loss=options.ranking_weight * ranking + regularisation + options.gap_penalty * gap,
        ranking=ranking.detach(),
        regularisation=regularisation.detach(),
        difference_P=difference_P.detach(),
        batch_mean=mean.detach(),
        batch_std=std.detach(),
    )


def _over_ranks(value: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is None or dist.get_world_size(group) == 1:
        return value
    summed: Any = _SumOverRanks.apply(value, group)
    return summed


class _SumOverRanks(torch.autograd.Function):
    """Every rank's loss depends on every rank's scores: gradients are summed as values are."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
