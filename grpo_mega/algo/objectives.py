"""The objectives a recipe selects by `loss.objective`: what takes the ratio and the advantage to a number. No
torch here: the recipe holds these blocks.

# R rows, W tokens of a row
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from grpo_mega.algo.innovations._base import Objective, Surrogate
from grpo_mega.algo.innovations._clip import pessimistic

if TYPE_CHECKING:
    import torch

    from grpo_mega.algo.rows import TokenView


SMALLEST = 1e-37
"""A ratio that decay weights inside it have brought below this counts as this: 0 has no logarithm."""


class ClipObjective(Surrogate):
    """PPO: min(A s, A clip(s, 1 - low, 1 + high)); for A < 0 at least dual A.

    Example: s = 1.5, A = 1 -> 1.2; s = 5, A = -1 -> -3
    """

    clip_ranges = ("low", "high")

    low: float = Field(default=0.2, gt=0, lt=1)
    high: float = Field(default=0.2, gt=0)
    """.28 is clip-higher."""
    dual: float | None = Field(default=3.0, gt=1)
    """Lower bound of the objective for negative advantages, in multiples of the advantage; null = off."""

    def objective(self, ratio_RW: torch.Tensor, view: TokenView) -> Objective:
        return pessimistic(ratio_RW, view.advantage_RW, self.low, self.high, self.dual)


class CispoObjective(Surrogate):
    """CISPO: sg[clip(s, min_ratio, max_ratio)] A log p. The ratio only weighs; no token loses its gradient.

    Example: s = 6, A = 1, log p = -2 -> 5 x 1 x -2 = -10
    """

    min_ratio: float = Field(default=0.0, ge=0)
    max_ratio: float = Field(default=5.0, gt=0)

    def objective(self, ratio_RW: torch.Tensor, view: TokenView) -> Objective:
        weight_RW = ratio_RW.detach().clamp(self.min_ratio, self.max_ratio)
        never_RW = view.rows.valid_RW & ~view.rows.valid_RW
        return Objective(weight_RW * view.advantage_RW * view.trainer_RW, never_RW, never_RW)


class GmpoObjective(Surrogate):
    """GMPO: A exp(mean_t q_t), q_t = ln s_t clipped pessimistically to [-low, high] by the sign of A.

    Example: ratios 1, e at A = 1, range .4 -> exp((0 + .4) / 2) = 1.221
    """

    clip_ranges = ("low", "high")

    low: float = Field(default=0.4, gt=0)
    """Range of the log-ratio below 0."""
    high: float = Field(default=0.4, gt=0)
    """Range of the log-ratio above 0."""

    def objective(self, ratio_RW: torch.Tensor, view: TokenView) -> Objective:
        rows, advantage_RW = view.rows, view.advantage_RW
        log_RW = ratio_RW.clamp(min=SMALLEST).log()
        above_RW, below_RW = log_RW > self.high, log_RW < -self.low
        cut_RW = (above_RW & (advantage_RW > 0)) | (below_RW & (advantage_RW < 0))
        kept_RW = log_RW.clamp(-self.low, self.high).where(cut_RW, log_RW)
        mean_B = rows.mean(kept_RW).exp()
        return Objective(rows.spread(mean_B) * advantage_RW, cut_RW, cut_RW & ~cut_RW)
