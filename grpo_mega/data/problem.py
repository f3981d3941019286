"""What a source yields, and the law that keeps training and held-out problems apart."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

Split = Literal["train", "eval"]

HELD_OUT_ONE_IN = 4
"""Generated tasks hold out one problem in this many. More would cost the held-out side more rejected draws
(some generators take tens of milliseconds each); fewer would take more away from training."""

SIDES_LAW = "the text of a problem decides whether it is held out, so both sides need enough distinct texts"


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem before tokenisation.

    Example: Problem(text="31524=", answer="12345", teacher_response="12354", meta={"task": "sort_digits"})
    """

    text: str
    answer: str
    teacher_response: str | None = None  # the target of supervised stages
    meta: Mapping[str, object] = field(default_factory=dict)  # "messages": the turns of a conversation


class Source(Protocol):
    """Problems by index; the same index always gives the same problem, in any order and on any rank."""

    def __len__(self) -> int:
        """The number of indices of one epoch."""
        ...

    def problem(self, index: int) -> Problem: ...

    def where(self, index: int) -> str:
        """The place a user can look at: file:line, or the task and index."""
        ...


def stable_hash(*parts: object) -> int:
    """64 bits that depend on the parts alone: the same in every process, unlike `hash`."""
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def side_of(text: str) -> Split:
    """The side a problem may appear on. Its text alone decides: the sides are disjoint whatever the seeds."""
    return "eval" if stable_hash("held-out", text) % HELD_OUT_ONE_IN == 0 else "train"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The remedy for a misspelt name: the nearest known one, or all of them when they are few."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    if len(names) <= 12:
        return f"choose one of: {', '.join(names)}"
    return f"choose one of the {len(names)} known names: {', '.join(names[:12])}, ..."
