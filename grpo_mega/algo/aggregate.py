"""From per-token losses to one number: denominators are those of the whole update.

# R rows, W tokens of a row
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grpo_mega.algo.rows import Rows


@dataclass(frozen=True, slots=True)
class Denominators:
    """Counted once over all ranks and micro-batches of an update, before its first forward pass."""

    tokens: float
    sequences: float  # those with at least one response token


def local_denominators(rows: Rows) -> Denominators:
    """For a single rank with a single micro-batch."""
    return Denominators(float(rows.length_B.sum()), float((rows.length_B > 0).sum()))


def aggregation_weights(
    aggregate: str, rows: Rows, counts_2: torch.Tensor, norm_length: int | None
) -> torch.Tensor:
    """What each token's loss is multiplied by, R x 1; sums over the update to 1 for the two means.

    `counts_2`: tokens and sequences of the whole update, each at least 1.
    """
    tokens, sequences = counts_2.unbind()
    length_R1 = rows.spread(rows.length_B.clamp(min=1)).to(counts_2.dtype)
    if aggregate == "token-mean":
        return torch.ones_like(length_R1) / tokens
    if aggregate == "seq-mean-token-sum":
        return torch.ones_like(length_R1) / sequences
    if aggregate == "seq-mean-token-mean":
        return 1.0 / (sequences * length_R1)
    assert norm_length is not None
    return torch.ones_like(length_R1) / (sequences * norm_length)


def check_norm_length(aggregate: str, norm_length: int | None) -> None:
    if aggregate == "seq-mean-token-sum-norm" and norm_length is None:
        raise ValueError(
            "aggregate seq-mean-token-sum-norm needs norm_length, for example the longest response"
        )
