"""2.2 Gradient-adaptive weighting: more credit for the tokens the policy is least sure of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from grpo_mega.algo.innovations._base import Credit, joined

if TYPE_CHECKING:
    import torch

    from grpo_mega.algo.rows import TokenView
    from grpo_mega.algo.traces import MomentsByName
    from grpo_mega.monitor.metrics import Metric


class GradientAdaptive(Credit):
    """c_t = L softmax(g_t / temperature) over each sequence's L tokens, at most max_weight; L = 1 gives 1.

    Example: g = 0, ln 3 at temperature 1 -> .5, 1.5
    """

    tag = "GA-GRPO"

    temperature: float = Field(default=1.0, gt=0)
    """Small: few tokens get all the credit; large: all get 1."""
    norm: Literal["logp", "logit"] = "logp"
    """What stands for a token's gradient norm. logp: |log p|; logit: the norm of d(-log p)/d(logits),
    sqrt(1 - 2 p + sum of p^2 over the vocabulary)."""
    max_weight: float = Field(default=10.0, gt=0)
    legacy: bool = False
    """The original placement: the weight multiplies the ratio, before the clip."""

    @property
    def inside_ratio(self) -> bool:
        return self.legacy

    def weight(self, view: TokenView) -> torch.Tensor:
        rows = view.rows
        norm_RW = self.gradient_norm(view)
        logit_RW = norm_RW / self.temperature
        top_B = rows.max(logit_RW)
        unnormalised_RW = (logit_RW - rows.spread(top_B)).exp().where(rows.valid_RW, 0.0)
        length_B = rows.length_B.to(logit_RW.dtype)
        share_R1 = rows.spread(length_B / rows.sum(unnormalised_RW).clamp(min=1.0))
        uncapped_RW = unnormalised_RW * share_R1
        weight_RW = uncapped_RW.clamp(max=self.max_weight).where(rows.spread(length_B) > 1, 1.0)
        view.traces.tokens("gradient_adaptive/norm", norm_RW, extremes=True)
        view.traces.tokens("gradient_adaptive/weight", weight_RW, shift=1.0, spread=True)
        view.traces.tokens("gradient_adaptive/capped", (uncapped_RW > self.max_weight).float())
        return weight_RW

    def gradient_norm(self, view: TokenView) -> torch.Tensor:
        logprob_RW = view.trainer_RW.detach()
        if self.norm == "logp":
            return logprob_RW.abs()
        if view.sq_prob_RW is None:
            raise ValueError(
                "gradient_adaptive with norm: logit needs sq_prob_T, the sum of squared probabilities"
            )
        return (1.0 - 2.0 * logprob_RW.exp() + view.sq_prob_RW).clamp(min=0.0).sqrt()

    def metrics(self, moments: MomentsByName) -> dict[str, Metric]:
        norm, weight = moments["gradient_adaptive/norm"], moments["gradient_adaptive/weight"]
        return {
            "gradient_adaptive/avg_gradient_norm": norm.mean(),
            "gradient_adaptive/max_gradient_norm": norm.max(),
            "gradient_adaptive/min_gradient_norm": norm.min(),
            "gradient_adaptive/weight_mean": weight.mean(),
            "gradient_adaptive/weight_variance": weight.variance(),
            "gradient_adaptive/capped_fraction": moments["gradient_adaptive/capped"].mean(),
            "gradient_adaptive/temperature": moments.constant(self.temperature),
        }

    def step_line(self, metrics: Mapping[str, float]) -> str | None:
        return joined(
            self.tag,
            "gradient-adaptive",
            metrics,
            avg_gradient_norm="gradient_adaptive/avg_gradient_norm",
            weight_variance="gradient_adaptive/weight_variance",
            capped_fraction="gradient_adaptive/capped_fraction",
        )
