"""From the sequences each rank made to the micro-batches each rank trains on, with the update's global
denominators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_mega.algo.aggregate import Denominators
from grpo_mega.data.packing import pack, plan_batch
from grpo_mega.engine.device import device
from grpo_mega.engine.exchange import Lengths, exchange, gather_lengths
from grpo_mega.engine.parallel import Layout
from grpo_mega.types import PackedBatch, TrainSequence


@dataclass(frozen=True, slots=True)
class Dealt:
    """This rank's share of an update's sequences, and how long each sequence of the whole update is.

    Example: orders 0 and 2 in one micro-batch, 1 in another: bins = [[s0, s2], [s1]]
    """

    bins: list[list[TrainSequence]]  # by micro-batch
    padded_length: int
    lengths: Lengths


def deal(sequences: Sequence[TrainSequence], layout: Layout, micro_batch_tokens: int) -> Dealt:
    """Balance an update's sequences over data-parallel ranks by tokens, and this rank's over micro-batches. A
    collective.

    The plan depends on the lengths alone, so that it is the same whichever rank generated which sequence.
    """
    lengths = gather_lengths(sequences)
    plan = plan_batch(
        lengths.total,
        layout.dp_size,
        micro_batch_tokens,
        micro_batch_multiple=layout.micro_batch_multiple,
        length_multiple=layout.length_multiple,
    )
    mine = exchange(sequences, plan.rank_of, layout.dp_rank_of_rank)
    bins = [[mine[order] for order in orders] for orders in plan.bins[layout.dp_rank]]
    return Dealt(bins, plan.padded_length, lengths)


def distribute(
    sequences: Sequence[TrainSequence], layout: Layout, micro_batch_tokens: int
) -> tuple[list[PackedBatch], Denominators]:
    """This rank's micro-batches of an update, and its global denominators. A collective."""
    dealt = deal(sequences, layout, micro_batch_tokens)
    batches = [pack(bin_, dealt.padded_length, device()) for bin_ in dealt.bins]
    counts = dealt.lengths.trained.values()
    return batches, Denominators(tokens=sum(counts), sequences=sum(count > 0 for count in counts))
