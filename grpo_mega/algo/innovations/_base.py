"""What an innovation is: a block of options that acts at one place of the policy loss. No torch here.

An innovation is one file in this folder with one class: the file's name is its name in recipes, the class's
fields are its options there. It derives from the base class of the place where it acts:

    Smoothing   ratio -> ratio      along the tokens, before anything else
    Level       ratio -> ratio      what the objective sees: the token's own ratio, or the sequence's
    Credit      -> weight           multiplies the objective of each token; a constant to the gradient
    Surrogate   ratio -> objective  in place of the clip

All tensors are rows of W valid tokens (grpo_mega.algo.rows): prompts, padding and masked tokens are not
there, and `view.rows` sums, scans and spreads over sequences. The shipped files name torch for type checkers
only, so that a recipe is read without it.

# R rows, W tokens of a row, B sequences
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from grpo_mega.block import Block

if TYPE_CHECKING:
    import torch

    from grpo_mega.algo.rows import TokenView
    from grpo_mega.algo.traces import MomentsByName
    from grpo_mega.monitor.metrics import Metric


class Objective(NamedTuple):
    """What is maximised at each token, and where its gradient was cut."""

    value_RW: torch.Tensor
    cut_RW: torch.Tensor  # bool: clipped, no gradient
    lower_RW: torch.Tensor  # bool: cut by the bound for negative advantages


class Innovation(Block):
    """Options and arithmetic of one innovation."""

    slot: ClassVar[str | None] = None
    """Of those that name the same slot a recipe picks at most one."""
    tag: ClassVar[str] = "INNOVATION"
    """What its log lines begin with."""

    @property
    def startup_line(self) -> str:
        """Printed once when a run begins: the options in use."""
        options = ", ".join(f"{name}={_plain(value)}" for name, value in self.model_dump().items())
        return f"[{self.tag}] Actor {options or 'on'}"

    def step_line(self, metrics: Mapping[str, float]) -> str | None:
        """Printed after every step, from its reduced metrics; None: nothing to say."""
        return None

    def metrics(self, moments: MomentsByName) -> dict[str, Metric]:
        """What it did to this micro-batch; each metric carries its own denominator."""
        return {}

    def derived(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Numbers that follow from reduced metrics, such as ratios of variances."""
        return {}


class Smoothing(Innovation):
    slot = "the smoothing of the ratio"

    def smoothed(self, ratio_RW: torch.Tensor, view: TokenView) -> torch.Tensor:
        raise NotImplementedError


class Level(Innovation):
    slot = "the level of the ratio"

    def at_level(self, ratio_RW: torch.Tensor, view: TokenView) -> torch.Tensor:
        raise NotImplementedError


class Credit(Innovation):
    @property
    def inside_ratio(self) -> bool:
        """The original placement: the weight multiplies the ratio, and moves tokens across the clip range."""
        return False

    def weight(self, view: TokenView) -> torch.Tensor:
        raise NotImplementedError


class Surrogate(Innovation):
    slot = "the objective"
    clip_ranges: ClassVar[tuple[str, ...]] = ()
    """Options that say how far the ratio may go before its gradient is cut."""

    def narrowed(self, limit: float) -> Surrogate:
        """With every clip range at most `limit`."""
        return self.model_copy(update={name: min(getattr(self, name), limit) for name in self.clip_ranges})

    def objective(self, ratio_RW: torch.Tensor, view: TokenView) -> Objective:
        raise NotImplementedError


def _plain(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def joined(tag: str, what: str, metrics: Mapping[str, float], **names: str) -> str | None:
    """A step line of the metrics that are there.

    Example: joined("EMA-GRPO", "EMA", m, variance_reduction="ema/variance_reduction_ratio")
             -> "[EMA-GRPO] Added EMA metrics: variance_reduction=1.3456"
    """
    shown = [f"{label}={metrics[name]:.4f}" for label, name in names.items() if name in metrics]
    return f"[{tag}] Added {what} metrics: {', '.join(shown)}" if shown else None
