"""2.4 PTRW: a soft trust region; the further a ratio is from 1, the less its token counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from grpo_mega.algo.innovations._base import Objective, Surrogate, joined

if TYPE_CHECKING:
    import torch

    from grpo_mega.algo.rows import TokenView
    from grpo_mega.algo.traces import MomentsByName
    from grpo_mega.monitor.metrics import Metric


class Ptrw(Surrogate):
    """objective = phi s A with phi = exp(-(s - 1)^2 / (2 sigma^2)), in place of the clip.

    Where following A brings s back towards 1 (A > 0 and s < 1, A < 0 and s > 1) phi is 1.
    Differentiating phi would turn the gradient around beyond s = (1 + sqrt(1 + 4 sigma^2)) / 2, 1.0385 at .2.

    Example: s = 1.2, A = 1, sigma .2 -> phi = e^-.5 = .607, objective .728
    """

    tag = "PTRW-GRPO"

    sigma: float = Field(default=0.2, gt=0)
    """Width of the trust region, in units of the ratio."""
    detach: bool = True
    """phi is a constant to the gradient."""
    keep_corrective: bool = True
    """phi = 1 where the gradient leads back towards 1."""
    legacy: bool = False
    """The original form: s is the sequence's mean ratio, phi is differentiated, nothing is exempt."""

    def objective(self, ratio_RW: torch.Tensor, view: TokenView) -> Objective:
        advantage_RW = view.advantage_RW
        if self.legacy:
            ratio_RW = view.rows.spread(view.rows.mean(ratio_RW)).expand_as(ratio_RW)
        trust_RW = (-(ratio_RW - 1.0).square() / (2.0 * self.sigma**2)).exp()
        if self.detach and not self.legacy:
            trust_RW = trust_RW.detach()
        above_RW, below_RW = ratio_RW > 1.0, ratio_RW < 1.0
        corrective_RW = ((advantage_RW > 0) & below_RW) | ((advantage_RW < 0) & above_RW)
        if self.keep_corrective and not self.legacy:
            trust_RW = trust_RW.where(~corrective_RW, 1.0)
        value_RW = trust_RW * ratio_RW * advantage_RW
        view.traces.tokens("ptrw/trust", trust_RW, shift=1.0, spread=True, extremes=True)
        view.traces.tokens("ptrw/corrective", corrective_RW.float())
        view.traces.tokens("ptrw/loss", -value_RW)
        never_RW = advantage_RW.isnan()
        return Objective(value_RW, cut_RW=never_RW, lower_RW=never_RW)

    def metrics(self, moments: MomentsByName) -> dict[str, Metric]:
        trust = moments["ptrw/trust"]
        return {
            "ptrw/sigma": moments.constant(self.sigma),
            "ptrw/trust_weights_mean": trust.mean(),
            "ptrw/trust_weights_std": trust.std(),
            "ptrw/trust_weights_min": trust.min(),
            "ptrw/trust_weights_max": trust.max(),
            "ptrw/loss_mean": moments["ptrw/loss"].mean(),
            "ptrw/corrective_fraction": moments["ptrw/corrective"].mean(),
        }

    def step_line(self, metrics: Mapping[str, float]) -> str | None:
        return joined(
            self.tag,
            "PTRW",
            metrics,
            trust_mean="ptrw/trust_weights_mean",
            trust_min="ptrw/trust_weights_min",
            corrective_fraction="ptrw/corrective_fraction",
        )
