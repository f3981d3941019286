"""Advantages: how much better a sample is than what was to be expected.

    of a sample   from its group's rewards, by `advantage.estimator`; numpy, float64
    of a token    from a critic's values, by generalised advantage estimation; torch, on any device

# G samples of one group, N samples of any groups, T packed tokens, R rows, W tokens of a row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from grpo_mega.algo.rows import rows_of
from grpo_mega.recipe.blocks import AdvantageBlock

EQUAL = 1e-13
"""Variance over mean square up to which the samples of a step count as equal: sums of a million equal rewards
are rounded by less, and rewards that differ do so by more."""


def group_advantages(rewards_G: np.ndarray | Sequence[float], block: AdvantageBlock) -> np.ndarray:
    """Of one group's samples, in float64.

        grpo                 (r - mean(r)) / (std(r) + epsilon); normalize_std off: no division
        dr_grpo              r - mean(r)
        rloo                 r - mean of the others = G / (G - 1) (r - mean(r))
        gae                  0: advantages are its tokens' own, by a value model
        reinforce_plus_plus  r, or r - mean(r) with group_baseline; `normalised` then compares all of the step

    std is the population's, sqrt(mean((r - mean)^2)): the group is all there is to normalise, not a sample of
    something larger, and a normalised group then has mean square 1 (up to epsilon) whatever its size.
    Libraries that divide by G - 1 get advantages smaller by sqrt((G - 1) / G): 6% at G = 8.

    Where a mean is subtracted, equal rewards give exactly 0: rounding would leave noise for a division to
    magnify.

    Example: rewards 1, 0, 0, 0 -> grpo 1.73, -.58 ...; dr_grpo .75, -.25 ...; rloo 1, -.33 ...
    """
    rewards_G = np.asarray(rewards_G, dtype=np.float64)
    assert rewards_G.ndim == 1 and rewards_G.size >= 1, rewards_G.shape
    assert np.isfinite(rewards_G).all(), rewards_G
    if block.estimator == "gae":
        return np.zeros_like(rewards_G)
    if block.estimator == "reinforce_plus_plus" and not block.group_baseline:
        return rewards_G.copy()
    equal = (rewards_G == rewards_G[0]).all()
    centred_G = np.zeros_like(rewards_G) if equal else rewards_G - rewards_G.mean()
    match block.estimator:
        case "grpo" if block.normalize_std:
            return centred_G / (np.sqrt(np.mean(centred_G**2)) + block.epsilon)
        case "rloo":
            assert rewards_G.size >= 2, "a sample alone has no others: the recipe wants groups of 2 or more"
            return centred_G * (rewards_G.size / (rewards_G.size - 1))
        case _:
            return centred_G


@dataclass(frozen=True, slots=True)
class StepMoments:
    """What normalising over a step needs to know of its samples. Sums: ranks add theirs up.

    Example: of([1, 2]) + of([3]) == StepMoments(count=3.0, total=6.0, squares=14.0)
    """

    count: float
    total: float
    squares: float

    @classmethod
    def of(cls, values_N: np.ndarray | Sequence[float]) -> StepMoments:
        values_N = np.asarray(values_N, dtype=np.float64)
        return cls(float(values_N.size), float(values_N.sum()), float((values_N**2).sum()))

    def __add__(self, other: StepMoments) -> StepMoments:
        return StepMoments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def std(self) -> float:
        """The population's; exactly 0 for equal samples."""
        mean_square = self.squares / self.count
        variance = mean_square - self.mean**2
        return float(np.sqrt(variance)) if variance > EQUAL * mean_square else 0.0


def moments_of(values_T: torch.Tensor, mask_T: torch.Tensor) -> StepMoments:
    """Of the values where the mask is true."""
    chosen = values_T.detach().double().where(mask_T, 0.0)
    return StepMoments(float(mask_T.sum()), float(chosen.sum()), float(chosen.square().sum()))


def normalised(values_N: np.ndarray, moments: StepMoments, block: AdvantageBlock) -> np.ndarray:
    """(A - mean) / (std + epsilon) with mean and std over the whole step; normalize_std off: no division.
    Equal samples give exactly 0."""
    if moments.std == 0.0:
        return np.zeros_like(values_N, dtype=np.float64)
    centred_N = np.asarray(values_N, dtype=np.float64) - moments.mean
    return centred_N / (moments.std + block.epsilon) if block.normalize_std else centred_N


@torch.no_grad()
def gae(
    rewards_T: torch.Tensor,
    values_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    valid_T: torch.Tensor,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation along each packed sequence's valid tokens: (advantages_T, returns_T),
    both constants, 0 at tokens that are not valid.

        delta_t = r_t + gamma V_{t+1} - V_t       A_t = delta_t + gamma lam A_{t+1}       return_t = A_t + V_t

    t + 1 is the next valid token; after the last one V and A are 0.

    Example: r = 0, 1 and V = .5, .5 at gamma 1, lam .5 -> delta 0, .5; A = .25, .5; returns .75, 1
    """
    backwards = _Backwards(cu_seqlens, valid_T)
    values_RW = backwards.of_tokens(values_T)
    rewards_RW = backwards.of_tokens(rewards_T.to(values_T.dtype))
    delta_RW = rewards_RW + gamma * backwards.next(values_RW) - values_RW
    advantages_RW = backwards.rows.scan(delta_RW, gamma * lam)
    return backwards.to_tokens(advantages_RW), backwards.to_tokens(advantages_RW + values_RW)


class _Backwards:
    """Rows of valid tokens from each sequence's last to its first: scans then run from the end.

    The whole packing is turned around, its last sequence first; what lies beyond the last boundary is left
    out.
    """

    def __init__(self, cu_seqlens: torch.Tensor, valid_T: torch.Tensor) -> None:
        self.tokens, self.beyond = int(cu_seqlens[-1]), valid_T.shape[0] - int(cu_seqlens[-1])
        self.rows = rows_of(self.tokens - cu_seqlens.flip(0), valid_T[: self.tokens].flip(0))

    def of_tokens(self, values_T: torch.Tensor) -> torch.Tensor:
        return self.rows.of_tokens(values_T[: self.tokens].flip(0))

    def to_tokens(self, values_RW: torch.Tensor) -> torch.Tensor:
        turned_T = self.rows.to_tokens(values_RW).flip(0)
        return torch.cat([turned_T, turned_T.new_zeros(self.beyond)])

    def next(self, values_RW: torch.Tensor) -> torch.Tensor:
        """Each token's successor, 0 for the last: a sequence fills its rows without gaps, so that it stands
        one place before in the flattened rectangle."""
        before_RW = values_RW.flatten().roll(1).view_as(values_RW)
        return before_RW.where(self.rows.position_RW > 0, 0.0)
