"""2.3 AMIC: one importance ratio for the whole sequence, the arithmetic mean of its tokens'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from grpo_mega.algo.innovations._base import Level, joined

if TYPE_CHECKING:
    import torch

    from grpo_mega.algo.rows import TokenView
    from grpo_mega.algo.traces import MomentsByName
    from grpo_mega.monitor.metrics import Metric


class Amic(Level):
    """s_i = mean_t w'_t, the same at every token of sequence i.

    Example: ratios 1, 2 -> 1.5, 1.5
    """

    tag = "AMIC-GRPO"

    def at_level(self, ratio_RW: torch.Tensor, view: TokenView) -> torch.Tensor:
        mean_B = view.rows.mean(ratio_RW)
        trace_level("amic", mean_B, ratio_RW, view)
        return view.rows.spread(mean_B).expand_as(ratio_RW)

    def metrics(self, moments: MomentsByName) -> dict[str, Metric]:
        return level_metrics("amic", moments)

    def step_line(self, metrics: Mapping[str, float]) -> str | None:
        return level_line(self.tag, "amic", metrics)


def trace_level(name: str, ratio_B: torch.Tensor, ratio_RW: torch.Tensor, view: TokenView) -> None:
    """The sequences' ratios, and how far the tokens' own lie from each other inside a sequence."""
    rows, deviation_RW = view.rows, ratio_RW.detach() - 1.0
    mean_B = rows.mean(deviation_RW)
    variance_B = rows.mean((deviation_RW - rows.spread(mean_B)).square())
    view.traces.sequences(f"{name}/sequence_weights", ratio_B, shift=1.0, spread=True)
    view.traces.sequences(f"{name}/token_variance", variance_B)


def level_metrics(name: str, moments: MomentsByName) -> dict[str, Metric]:
    weights = moments[f"{name}/sequence_weights"]
    return {
        f"{name}/sequence_weights_mean": weights.mean(),
        f"{name}/sequence_weights_std": weights.std(),
        f"{name}/sequence_weights_variance": weights.variance(),
        f"{name}/avg_sequence_length": moments["length"].mean(),
        f"{name}/avg_token_variance": moments[f"{name}/token_variance"].mean(),
    }


def level_line(tag: str, name: str, metrics: Mapping[str, float]) -> str | None:
    return joined(
        tag,
        name.upper(),
        metrics,
        sequence_weight_mean=f"{name}/sequence_weights_mean",
        sequence_weight_std=f"{name}/sequence_weights_std",
        avg_token_variance=f"{name}/avg_token_variance",
    )
