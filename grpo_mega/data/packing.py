"""From sequences to micro-batches: balanced over data-parallel ranks by tokens, packed end to end, all of one
length.

Every function is pure, so that all ranks compute the same plan from the same lengths without talking.

# T packed tokens of one micro-batch, B sequences of one micro-batch
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from grpo_mega.types import PackedBatch, TrainSequence


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Which data-parallel rank takes which sequences in which micro-batch.

    Every rank has the same number of micro-batches and every micro-batch the same length: pipelines then
    exchange tensors of one shape, and experts that exchange tokens across ranks never wait for a rank that
    has finished.

    Example: lengths {0: 5, 1: 3, 2: 4}, two ranks, at most 8 tokens -> bins ((0,),), ((1, 2),), padded_length
    7
    """

    bins: tuple[tuple[tuple[int, ...], ...], ...]  # [rank][micro-batch] -> orders
    padded_length: int

    @property
    def rank_of(self) -> dict[int, int]:
        return {order: rank for rank, bins in enumerate(self.bins) for bin_ in bins for order in bin_}


def plan_batch(
    lengths: Mapping[int, int],
    ranks: int,
    max_tokens: int,
    *,
    micro_batch_multiple: int = 1,
    length_multiple: int = 1,
) -> BatchPlan:
    """Balance sequences (order -> length) over ranks, then over as few micro-batches of at most max_tokens as
    fit.

    A sequence longer than max_tokens gets a micro-batch of its own. `micro_batch_multiple`: interleaved
    pipelines want whole rounds; `length_multiple`: sequence parallelism splits a micro-batch evenly.
    """
    shares = _spread_evenly(lengths, ranks)
    fewest = max(_fewest_bins([lengths[order] for order in share], max_tokens) for share in shares)
    count = _round_up(max(1, fewest), micro_batch_multiple)
    while True:
        bins = [_spread_evenly({order: lengths[order] for order in share}, count) for share in shares]
        if all(_fits(bin_, lengths, max_tokens) for rank_bins in bins for bin_ in rank_bins):
            break
        count += micro_batch_multiple
    longest = max(sum(lengths[order] for order in bin_) for rank_bins in bins for bin_ in rank_bins)
    return BatchPlan(
        bins=tuple(tuple(tuple(sorted(bin_)) for bin_ in rank_bins) for rank_bins in bins),
        padded_length=_round_up(max(longest, 1), length_multiple),
    )


def _fewest_bins(lengths: Sequence[int], max_tokens: int) -> int:
    """No packing needs fewer: one for each sequence that is too long, enough for the tokens of the rest."""
    fitting = [length for length in lengths if length <= max_tokens]
    return len(lengths) - len(fitting) + -(-sum(fitting) // max_tokens)


def _fits(bin_: Sequence[int], lengths: Mapping[int, int], max_tokens: int) -> bool:
    return len(bin_) <= 1 or sum(lengths[order] for order in bin_) <= max_tokens


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _spread_evenly(lengths: Mapping[int, int], parts: int) -> list[list[int]]:
    """Longest first, each to the part with the fewest tokens so far (ties: fewest sequences, then first)."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, 0, part) for part in range(parts)]
    for order in sorted(lengths, key=lambda order: (-lengths[order], order)):
        tokens, count, part = loads[0]
        shares[part].append(order)
        heapq.heapreplace(loads, (tokens + lengths[order], count + 1, part))
    return shares


def pack(sequences: Sequence[TrainSequence], padded_length: int, device: torch.device) -> PackedBatch:
    """Lay sequences end to end and pad to `padded_length`. No sequences at all gives a batch of padding
    only."""
    tokens_T = np.zeros(padded_length, np.int64)
    targets_T = np.zeros(padded_length, np.int64)
    positions_T = np.zeros(padded_length, np.int64)
    mask_T = np.zeros(padded_length, bool)
    logprobs_T = np.zeros(padded_length, np.float32)
    boundaries = [0]
    for sequence in sequences:
        start, stop = boundaries[-1], boundaries[-1] + sequence.length
        tokens_T[start:stop] = sequence.token_ids
        targets_T[start : stop - 1] = sequence.token_ids[1:]
        positions_T[start:stop] = np.arange(sequence.length)
        mask_T[start + sequence.prompt_length : stop] = True if sequence.trained is None else sequence.trained
        if sequence.sampler_logprobs.size:
            logprobs_T[start + sequence.prompt_length : stop] = sequence.sampler_logprobs
        boundaries.append(stop)
    used = boundaries[-1]
    if used < padded_length:
        positions_T[used:] = np.arange(padded_length - used)
        boundaries.append(padded_length)
    return PackedBatch(
        tokens_T=torch.from_numpy(tokens_T).to(device),
        targets_T=torch.from_numpy(targets_T).to(device),
        positions_T=torch.from_numpy(positions_T).to(device),
        response_mask_T=torch.from_numpy(mask_T).to(device),
        sampler_logprobs_T=torch.from_numpy(logprobs_T).to(device),
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32, device=device),
        advantages_B=torch.tensor([s.advantage for s in sequences], dtype=torch.float32, device=device),
        rewards_B=torch.tensor([s.reward for s in sequences], dtype=torch.float32, device=device),
        num_sequences=len(sequences),
        max_seqlen=int(np.diff(boundaries).max()),
        uids=tuple(sequence.uid for sequence in sequences),
    )
