"""2.6 Asymmetric clipping: another range for what is encouraged than for what is discouraged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from grpo_mega.algo.innovations._base import Objective, Surrogate, joined
from grpo_mega.algo.innovations._clip import pessimistic

if TYPE_CHECKING:
    import torch

    from grpo_mega.algo.rows import TokenView
    from grpo_mega.algo.traces import MomentsByName, Traces
    from grpo_mega.monitor.metrics import Metric


class Asymmetric(Surrogate):
    """min(A s, A clip(s, 1 - e, 1 + e)), e = clip_pos for A > 0 and clip_neg for A <= 0; at least dual A for
    A < 0.

    Example: s = 1.4, A = 1 -> 1.3; s = 1.4, A = -1 -> -1.4; s = .8, A = -1 -> -.9
    """

    tag = "ASYM-GRPO"
    clip_ranges = ("clip_pos", "clip_neg")

    clip_pos: float = Field(default=0.3, gt=0, lt=1)
    """Range of the ratio for positive advantages."""
    clip_neg: float = Field(default=0.1, gt=0, lt=1)
    """Range of the ratio for negative ones."""
    dual: float | None = Field(default=3.0, gt=1)
    """Lower bound of the objective for negative advantages, in multiples of the advantage; null = off."""
    legacy: bool = False
    """The original form: A clip(s) without the minimum, which also cuts the gradients that lead back to 1."""

    def objective(self, ratio_RW: torch.Tensor, view: TokenView) -> Objective:
        advantage_RW = view.advantage_RW
        positive_RW = advantage_RW > 0
        range_RW = (advantage_RW * 0 + self.clip_neg).where(~positive_RW, self.clip_pos)
        if self.legacy:
            clipped_RW = ratio_RW.clamp(1.0 - range_RW, 1.0 + range_RW)
            outside_RW = clipped_RW != ratio_RW
            objective = Objective(advantage_RW * clipped_RW, outside_RW, outside_RW & ~outside_RW)
        else:
            objective = pessimistic(ratio_RW, advantage_RW, range_RW, range_RW, self.dual)
        self._trace(positive_RW, objective.cut_RW, view.traces)
        return objective

    def _trace(self, positive_RW: torch.Tensor, cut_RW: torch.Tensor, traces: Traces) -> None:
        traces.tokens("asymmetric/positive", positive_RW.float())
        traces.tokens("asymmetric/positive_cut", (positive_RW & cut_RW).float())
        traces.tokens("asymmetric/negative_cut", (~positive_RW & cut_RW).float())

    def metrics(self, moments: MomentsByName) -> dict[str, Metric]:
        positive = moments["asymmetric/positive"]
        positive_cut, negative_cut = moments["asymmetric/positive_cut"], moments["asymmetric/negative_cut"]
        return {
            "asymmetric/pos_advantage_ratio": positive.mean(),
            "asymmetric/neg_advantage_ratio": positive.rest().mean(),
            "asymmetric/pos_clipped_ratio": positive_cut.mean(),
            "asymmetric/neg_clipped_ratio": negative_cut.mean(),
            "asymmetric/clip_ratio_pos": positive_cut.share_of(positive),
            "asymmetric/clip_ratio_neg": negative_cut.share_of(positive.rest()),
        }

    def step_line(self, metrics: Mapping[str, float]) -> str | None:
        return joined(
            self.tag,
            "asymmetric clipping",
            metrics,
            clip_ratio_pos="asymmetric/clip_ratio_pos",
            clip_ratio_neg="asymmetric/clip_ratio_neg",
        )
