"""Token-level weightings: one file each; the folder is the registry. No torch here: the CLI asks it too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from grpo_mega.errors import UserError


def available() -> tuple[str, ...]:
    """The names that `loss.innovations` may hold."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))


def check_known(names: Iterable[str]) -> None:
    """A weighting that were silently left out would make a run a different experiment."""
    for name in names:
        if name not in available():
            raise UserError(
                f"there is no innovation {name!r}",
                where=f"loss.innovations.{name}",
                law="each name under loss.innovations is a file in grpo_mega/algo/innovations",
                remedy=f"use one of {', '.join(available())}"
                if available()
                else "remove it: there are none yet",
            )
