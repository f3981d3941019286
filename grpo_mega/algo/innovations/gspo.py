"""GSPO: one importance ratio for the whole sequence, the geometric mean of its tokens'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from grpo_mega.algo.innovations._base import Level
from grpo_mega.algo.innovations.amic import level_line, level_metrics, trace_level

if TYPE_CHECKING:
    import torch

    from grpo_mega.algo.rows import TokenView
    from grpo_mega.algo.traces import MomentsByName
    from grpo_mega.monitor.metrics import Metric


class Gspo(Level):
    """s_i = exp(mean_t ln w'_t). Without an objective of its own the recipe's clip is 3e-4 / 4e-4.

    Example: ratios 1, 4 -> 2, 2
    """

    tag = "GSPO-GRPO"

    level: Literal["sequence", "token"] = "sequence"
    """token: the same value, but each token's gradient comes from its own ratio: sg[s_i] w'_t / sg[w'_t]."""

    def at_level(self, ratio_RW: torch.Tensor, view: TokenView) -> torch.Tensor:
        mean_B = view.rows.mean(ratio_RW.log()).exp()
        trace_level("gspo", mean_B, ratio_RW, view)
        sequence_RW = view.rows.spread(mean_B).expand_as(ratio_RW)
        if self.level == "sequence":
            return sequence_RW
        return sequence_RW.detach() * (ratio_RW / ratio_RW.detach())

    def metrics(self, moments: MomentsByName) -> dict[str, Metric]:
        return level_metrics("gspo", moments)

    def step_line(self, metrics: Mapping[str, float]) -> str | None:
        return level_line(self.tag, "gspo", metrics)
