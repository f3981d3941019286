"""The pessimistic clip, shared by the PPO objective and asymmetric clipping.

# R rows, W tokens of a row
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo_mega.algo.innovations._base import Objective

if TYPE_CHECKING:
    import torch


def pessimistic(
    ratio_RW: torch.Tensor,
    advantage_RW: torch.Tensor,
    low: float | torch.Tensor,
    high: float | torch.Tensor,
    dual: float | None,
) -> Objective:
    """min(A s, A clip(s, 1 - low, 1 + high)), for A < 0 at least dual A; the gradient is cut where s does not
    count."""
    top: Any = 1.0 + high
    bottom: Any = 1.0 - low
    above_RW, below_RW = ratio_RW > top, ratio_RW < bottom
    cut_RW = (above_RW & (advantage_RW > 0)) | (below_RW & (advantage_RW < 0))
    kept_RW = ratio_RW.clamp(bottom, top).where(cut_RW, ratio_RW)
    lower_RW = cut_RW & ~cut_RW
    if dual is not None:
        lower_RW = (advantage_RW < 0) & (ratio_RW > dual)
        kept_RW = kept_RW.where(~lower_RW, dual)
    return Objective(kept_RW * advantage_RW, cut_RW, lower_RW)
