"""From the sequences each rank made to the micro-batches each rank trains on, with the update's global
denominators."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mega.algo.aggregate import Denominators
from grpo_mega.data.packing import pack, plan_batch
from grpo_mega.engine.device import device
from grpo_mega.engine.exchange import exchange, gather_lengths
from grpo_mega.engine.parallel import Layout
from grpo_mega.types import PackedBatch, TrainSequence


def distribute(
    sequences: Sequence[TrainSequence], layout: Layout, micro_batch_tokens: int
) -> tuple[list[PackedBatch], Denominators]:
    """Balance an update's sequences over data-parallel ranks by tokens and pack this rank's share. A
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
    batches = [
        pack([mine[order] for order in orders], plan.padded_length, device())
        for orders in plan.bins[layout.dp_rank]
    ]
    counts = lengths.response.values()
    return batches, Denominators(tokens=sum(counts), sequences=sum(count > 0 for count in counts))
