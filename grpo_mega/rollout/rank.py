"""A process among those that sample together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class Rank:
    """This process among those that sample. Rank 0 owns the servers and sends the weights."""

    rank: int = 0
    ranks: int = 1

    @property
    def is_lead(self) -> bool:
        return self.rank == 0

    def lead_says(self, value: ValueT) -> ValueT:
        """Rank 0's value, on every rank."""
        if self.ranks == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def first_trouble(self, trouble: str | None) -> str | None:
        """What some rank says; None when all are content."""
        if self.ranks == 1:
            return trouble
        said: list[str | None] = [None] * self.ranks
        dist.all_gather_object(said, trouble)
        return next((text for text in said if text is not None), None)


ALONE = Rank()
