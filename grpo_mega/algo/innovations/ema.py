"""2.1 EMA-smoothed importance weights: the variance of i.i.d. ratios falls by (2 - beta) / beta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from grpo_mega.algo.innovations._base import Smoothing, joined
from grpo_mega.block import Probability

if TYPE_CHECKING:
    import torch

    from grpo_mega.algo.rows import TokenView
    from grpo_mega.algo.traces import MomentsByName, Traces
    from grpo_mega.monitor.metrics import Metric

STILL = 1e-12
"""Variance of ratios below which nothing is there to smooth: on-policy, where they differ from 1 by rounding
only."""


class Ema(Smoothing):
    """Ratios smoothed along each sequence: w'_t = beta w_t + (1 - beta) w'_{t-1}, w'_0 = w_0.

    The gradient flows through the recursion: a token also answers for the ratios after it.

    Example: ratios 1, 2, 2 at beta .5 -> 1, 1.5, 1.75
    """

    tag = "EMA-GRPO"

    beta: Probability = 0.9
    """Weight of the token's own ratio; 1 = no smoothing."""

    @property
    def startup_line(self) -> str:
        return f"[{self.tag}] Actor use_ema_smoothing=True, ema_beta={self.beta:g}"

    def smoothed(self, ratio_RW: torch.Tensor, view: TokenView) -> torch.Tensor:
        first_RW = view.rows.position_RW == 0
        smoothed_RW = view.rows.scan(ratio_RW.where(first_RW, self.beta * ratio_RW), 1.0 - self.beta)
        self._trace(ratio_RW.detach(), smoothed_RW.detach(), view.traces)
        return smoothed_RW

    def _trace(self, ratio_RW: torch.Tensor, smoothed_RW: torch.Tensor, traces: Traces) -> None:
        change_RW = (smoothed_RW - ratio_RW).abs()
        traces.tokens("ema/raw", ratio_RW, shift=1.0, spread=True, extremes=True)
        traces.tokens("ema/smoothed", smoothed_RW, shift=1.0, spread=True, extremes=True)
        traces.tokens("ema/change", change_RW, spread=True)
        traces.tokens("ema/relative_change", change_RW / ratio_RW.abs())

    def metrics(self, moments: MomentsByName) -> dict[str, Metric]:
        raw, smoothed, change = moments["ema/raw"], moments["ema/smoothed"], moments["ema/change"]
        sequences = moments["length"]
        return {
            "ema/use_ema": moments.constant(1.0),
            "ema/beta": moments.constant(self.beta),
            "ema/raw_weights_variance": raw.variance(),
            "ema/raw_weights_mean": raw.mean(),
            "ema/raw_weights_std": raw.std(),
            "ema/smoothed_weights_variance": smoothed.variance(),
            "ema/smoothed_weights_mean": smoothed.mean(),
            "ema/smoothed_weights_std": smoothed.std(),
            "ema/weights_diff_l1": change.mean(),
            "ema/weights_diff_l2": change.root_mean_square(),
            "ema/relative_change_mean": moments["ema/relative_change"].mean(),
            "ema/active_sequences": sequences.number(),
            "ema/raw_weights_min": raw.min(),
            "ema/raw_weights_max": raw.max(),
            "ema/smoothed_weights_min": smoothed.min(),
            "ema/smoothed_weights_max": smoothed.max(),
        }

    def derived(self, metrics: Mapping[str, float]) -> dict[str, float]:
        raw = metrics.get("ema/raw_weights_variance", 0.0)
        smoothed = metrics.get("ema/smoothed_weights_variance", 0.0)
        if raw < STILL:  # the first update on fresh samples: 0/0 is no ratio
            return {}
        spread = metrics["ema/raw_weights_max"] - metrics["ema/raw_weights_min"]
        left = metrics["ema/smoothed_weights_max"] - metrics["ema/smoothed_weights_min"]
        derived = {"ema/smoothing_strength": 1.0 - smoothed / raw, "ema/range_reduction": 1.0 - left / spread}
        if smoothed > 0.0:
            derived["ema/variance_reduction_ratio"] = raw / smoothed
        return derived

    def step_line(self, metrics: Mapping[str, float]) -> str | None:
        return joined(
            self.tag,
            "EMA",
            metrics,
            variance_reduction="ema/variance_reduction_ratio",
            smoothing_strength="ema/smoothing_strength",
        )
