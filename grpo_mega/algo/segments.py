"""Which part of a structured response each token belongs to: what structured credit is given by.

# T packed tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from grpo_mega.algo.innovations.sca import ANSWER, PROCESS, STRUCTURE, UNPARSED
from grpo_mega.types import PackedBatch


@dataclass(frozen=True, slots=True)
class Markers:
    """Token ids of the four markers, in the order in which they stand in a response."""

    think_begin: tuple[int, ...]
    think_end: tuple[int, ...]
    answer_begin: tuple[int, ...]
    answer_end: tuple[int, ...]


def segments_of_response(token_ids: np.ndarray, markers: Markers) -> np.ndarray:
    """int8 for each token: PROCESS between the think markers, ANSWER between the answer markers, STRUCTURE
    for all others; UNPARSED throughout where the four markers do not stand in their order. The last match
    counts.

    Example: <think> a b </think> <answer> c </answer> end -> S P P S S A S S
    """
    ends = len(token_ids)
    spans: list[tuple[int, int]] = []
    for marker in (markers.answer_end, markers.answer_begin, markers.think_end, markers.think_begin):
        begin = _last(token_ids[:ends], marker)
        if begin is None:
            return np.full(len(token_ids), UNPARSED, np.int8)
        spans.append((begin, begin + len(marker)))
        ends = begin
    (answer_end, _), (_, answer_begin), (think_end, _), (_, think_begin) = spans
    segments = np.full(len(token_ids), STRUCTURE, np.int8)
    segments[think_begin:think_end] = PROCESS
    segments[answer_begin:answer_end] = ANSWER
    return segments


def _last(token_ids: np.ndarray, marker: Sequence[int]) -> int | None:
    """Where the marker last begins."""
    begins = np.flatnonzero(token_ids[: max(len(token_ids) - len(marker) + 1, 0)] == marker[0])
    for begin in begins[::-1].tolist():
        if (token_ids[begin : begin + len(marker)] == np.array(marker)).all():
            return begin
    return None


def batch_segments(batch: PackedBatch, markers: Markers) -> torch.Tensor:
    """Of a packed micro-batch: T, UNPARSED outside responses."""
    tokens_T, mask_T = batch.tokens_T.cpu().numpy(), batch.response_mask_T.cpu().numpy()
    segments_T = np.full(len(tokens_T), UNPARSED, np.int8)
    boundaries = batch.cu_seqlens.tolist()
    for begin, end in pairwise(boundaries):
        places = begin + np.flatnonzero(mask_T[begin:end])
        if len(places):
            segments_T[places] = segments_of_response(tokens_T[places], markers)
    return torch.from_numpy(segments_T).to(batch.tokens_T.device)
