"""2.5 Temporal decay: earlier tokens get more of the credit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from grpo_mega.algo.innovations._base import Credit, joined

NEGLIGIBLE = 1e-30
"""A smaller weight is 0."""

if TYPE_CHECKING:
    import torch

    from grpo_mega.algo.rows import TokenView
    from grpo_mega.algo.traces import MomentsByName
    from grpo_mega.monitor.metrics import Metric


class TemporalDecay(Credit):
    """exponential: d_t = gamma^t; lspd: d_t = exp(-alpha ln(1 + t/tau) / ln(1 + (L - 1)/tau)), L = 1 gives 1.

    Example: exponential at gamma .5, L = 2, mean -> 4/3, 2/3
    """

    slot = "how credit is shaped along the sequence"
    tag = "TDW-GRPO"

    mode: Literal["exponential", "lspd"] = "exponential"
    """lspd: a decay in the logarithm of time that ends at e^-alpha whatever the length."""
    gamma: float = Field(default=0.95, gt=0, le=1)
    """exponential: factor per token."""
    alpha: float = Field(default=2.0, ge=0)
    """lspd: the last token's weight is e^-alpha of the first's."""
    tau: float = Field(default=10.0, gt=0)
    """lspd: tokens before the decay sets in."""
    normalize: Literal["mean", "sum", "none"] | None = None
    """mean: the weights of a sequence sum to its length; sum: to 1; null: mean, or sum under legacy."""
    legacy: bool = False
    """The original placement: the weight multiplies the ratio, before the clip."""

    @property
    def inside_ratio(self) -> bool:
        return self.legacy

    @property
    def normalization(self) -> Literal["mean", "sum", "none"]:
        return self.normalize or ("sum" if self.legacy else "mean")

    def weight(self, view: TokenView) -> torch.Tensor:
        rows = view.rows
        length_B = rows.length_B.to(view.trainer_RW.dtype)
        position_RW = rows.position_RW.to(view.trainer_RW.dtype)
        if self.mode == "exponential":
            # gamma^(begin of the row) gamma^(place in it): the first row, which begins at 0, has the places
            weight_RW = self._power(position_RW[:, :1]) * self._power(position_RW[:1])
        else:
            weight_RW = log_scaled_decay(position_RW, rows.spread(length_B), self.alpha, self.tau)
        if self.normalization != "none":
            wanted_B = length_B if self.normalization == "mean" else length_B.clamp(max=1.0)
            weight_RW = weight_RW * rows.spread(wanted_B / rows.sum(weight_RW).clamp(min=1e-30))
        self._trace(weight_RW, view)
        return weight_RW

    def _power(self, exponent: torch.Tensor) -> torch.Tensor:
        """gamma^t; 0 far down the sequence, where numbers too small for their format would be slow."""
        logarithm = exponent * math.log(self.gamma)
        return logarithm.exp().where(logarithm > math.log(NEGLIGIBLE), 0.0)

    def _trace(self, weight_RW: torch.Tensor, view: TokenView) -> None:
        rows, traces = view.rows, view.traces
        last_RW = rows.position_RW == rows.spread(rows.length_B.to(rows.position_RW.dtype)) - 1
        traces.tokens("temporal_decay/weight", weight_RW, shift=1.0, spread=True, extremes=True)
        traces.sequences("temporal_decay/sum", rows.sum(weight_RW))
        traces.sequences("temporal_decay/first", rows.sum(weight_RW.where(rows.position_RW == 0, 0.0)))
        traces.sequences("temporal_decay/last", rows.sum(weight_RW.where(last_RW, 0.0)))

    def metrics(self, moments: MomentsByName) -> dict[str, Metric]:
        weight, lengths = moments["temporal_decay/weight"], moments["length"]
        return {
            "temporal_decay/weight_sum": moments["temporal_decay/sum"].mean(),
            "temporal_decay/weight_mean": weight.mean(),
            "temporal_decay/weight_std": weight.std(),
            "temporal_decay/weight_min": weight.min(),
            "temporal_decay/weight_max": weight.max(),
            "temporal_decay/first_weight": moments["temporal_decay/first"].mean(),
            "temporal_decay/last_weight": moments["temporal_decay/last"].mean(),
            "temporal_decay/avg_sequence_length": lengths.mean(),
            "temporal_decay/num_sequences": lengths.number(),
        }

    def step_line(self, metrics: Mapping[str, float]) -> str | None:
        return joined(
            self.tag,
            "temporal decay",
            metrics,
            first_weight="temporal_decay/first_weight",
            last_weight="temporal_decay/last_weight",
            weight_std="temporal_decay/weight_std",
        )


def log_scaled_decay(position: torch.Tensor, length: torch.Tensor, alpha: float, tau: float) -> torch.Tensor:
    """exp(-alpha ln(1 + t/tau) / ln(1 + (L - 1)/tau)); 1 where L <= 1."""
    # where L <= 1 every t is 0: any divisor gives 1
    whole = ((length - 1.0) / tau).log1p().where(length > 1, math.log(2.0))
    return (-alpha * (position / tau).log1p() / whole).exp()
