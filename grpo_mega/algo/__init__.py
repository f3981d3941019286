"""The algorithm's own arithmetic: advantages, objectives and weightings.

from grpo_mega.algo import PolicyLoss
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_mega.algo.objective import PolicyLoss

__all__ = ["PolicyLoss"]


def __getattr__(name: str) -> Any:
    """PolicyLoss brings torch along, which reading a recipe does not need."""
    if name == "PolicyLoss":
        from grpo_mega.algo.objective import PolicyLoss

        return PolicyLoss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
