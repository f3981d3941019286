"""Histograms of real numbers over many magnitudes that add up over micro-batches and ranks: quantiles come
from them.

A bin is a sign, an exponent of two and six leading bits of the mantissa, read off the float32 itself: every
bin is at most 1/64 of its numbers wide, and counting costs a shift and an addition for each number.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

SHIFT = 17  # of the 23 bits of the mantissa six are kept
_EXPONENT_OF_ONE = 127 << 23
SMALLEST = (_EXPONENT_OF_ONE - (24 << 23)) >> SHIFT  # 2^-24: below it lies rounding, counted as 0
_LARGEST = (_EXPONENT_OF_ONE + (8 << 23)) >> SHIFT  # 2^8: above any log-ratio that still means something
SIDE = _LARGEST - SMALLEST  # bins of each sign
BINS = 2 * SIDE + 1


def counts(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How many of the masked values fall into each bin, from the most negative to the largest."""
    values = values.float()
    magnitude = (values.abs().view(torch.int32) >> SHIFT) - SMALLEST + 1
    magnitude = magnitude.clamp(0, SIDE)
    bin_ = torch.where(values < 0, -magnitude, magnitude) + SIDE
    empty = torch.zeros(BINS, dtype=torch.int32, device=values.device)
    return empty.scatter_add(0, bin_.flatten().long(), mask.flatten().int())


def folded(bin_counts: Sequence[float]) -> list[float]:
    """Of the numbers' absolute values: what was negative is counted at the same distance from 0."""
    negative = reversed(bin_counts[:SIDE])
    positive = [a + b for a, b in zip(bin_counts[SIDE + 1 :], negative, strict=True)]
    return [0.0] * SIDE + [bin_counts[SIDE]] + positive


def quantile(bin_counts: Sequence[float], share: float) -> float:
    """The middle of the first bin below whose end at least this share of all numbers lies.

    Example: 99 zeros and one 5 at share .99 -> 0.0, at share .995 -> 5.03
    """
    wanted = share * sum(bin_counts)
    index = next(i for i, total in enumerate(accumulate(bin_counts)) if total >= wanted)
    place = abs(index - SIDE)
    if place == 0:
        return 0.0
    bits = torch.tensor([place - 1 + SMALLEST, place + SMALLEST], dtype=torch.int32) << SHIFT
    middle = float(bits.view(torch.float32).mean())
    return middle if index > SIDE else -middle


def by_octave(bin_counts: Sequence[float]) -> tuple[list[int], list[float]]:
    """Counts and edges of one bin for each power of two: few enough to look at. What lies below 2^-24 is one
    bin.

    Example: three numbers of 1.5 -> 3 between the edges 1 and 2
    """
    negative, middle, positive = bin_counts[:SIDE], bin_counts[SIDE], bin_counts[SIDE + 1 :]
    wide = 1 << (23 - SHIFT)
    rising = [int(sum(positive[start : start + wide])) for start in range(0, SIDE, wide)]
    falling = [int(sum(negative[start : start + wide])) for start in range(0, SIDE, wide)]
    ends = [2.0**exponent for exponent in range(-24, -24 + len(rising) + 1)]
    return [*falling, int(middle), *rising], [*(-end for end in reversed(ends)), *ends]
