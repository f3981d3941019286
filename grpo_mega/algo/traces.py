"""What happened inside the loss, as sums that merge: the material metrics are made of.

# R rows, W tokens of a row, B sequences
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from grpo_mega.monitor.metrics import Metric


@dataclass(frozen=True)
class Moments:
    """Sums over tokens (or sequences) of x - shift and its square, and the extremes of x where they were
    asked for.

    All sums are in float64: a variance is the small difference of two large sums, and float32 sums would also
    change with the width of a processor's vectors. The shift (1 for ratios) keeps variances of numbers near
    it exact.
    """

    count: torch.Tensor
    total: torch.Tensor
    shift: float = 0.0
    squares: torch.Tensor | None = None
    lowest: torch.Tensor | None = None
    highest: torch.Tensor | None = None

    def mean(self) -> Metric:
        total = self.total + self.shift * self.count if self.shift else self.total
        return Metric(total, self.count)

    def root_mean_square(self) -> Metric:
        assert self.shift == 0.0
        return Metric(_recorded(self.squares, "spread"), self.count, "rms")

    def number(self) -> Metric:
        """How many there are."""
        return Metric(self.count, torch.ones_like(self.count), "sum")

    def rest(self) -> Moments:
        """Of 1 - x, for numbers that are 0 or 1."""
        return Moments(self.count, self.count - self.total)

    def share_of(self, whole: Moments) -> Metric:
        """Of two numbers that are 0 or 1: where this is 1, among the places where `whole` is."""
        return Metric(self.total, whole.total)

    def variance(self) -> Metric:
        return Metric(self._first_two(), self.count, "variance")

    def std(self) -> Metric:
        return Metric(self._first_two(), self.count, "std")

    def min(self) -> Metric:
        return Metric(_recorded(self.lowest, "extremes"), self.count, "min")

    def max(self) -> Metric:
        return Metric(_recorded(self.highest, "extremes"), self.count, "max")

    def _first_two(self) -> torch.Tensor:
        return torch.stack([self.total, _recorded(self.squares, "spread")])


def _recorded(value: torch.Tensor | None, option: str) -> torch.Tensor:
    assert value is not None, f"record it with {option}=True"
    return value


def correlation(first: Moments, second: Moments, product: Moments) -> Metric:
    """Pearson's correlation of x and y from their moments and those of x y."""
    squares = [_recorded(part.squares, "spread") for part in (first, second)]
    sums = torch.stack([first.total, second.total, *squares, product.total])
    return Metric(sums, first.count, "correlation")


class Traces:
    """Named numbers over valid tokens and over sequences that have any: recorded as the loss is computed,
    summed together at its end.

    A row's sums are made where its values are at hand; what remains is one small sum over rows for all of
    them.

    Example:
        traces.tokens("ema/raw", ratio_RW, shift=1.0, spread=True)
        moments = traces.moments()["ema/raw"]
    """

    def __init__(self, valid_RW: torch.Tensor, length_B: torch.Tensor):
        self.valid_RW = valid_RW
        self.length_B = length_B  # valid tokens of each sequence
        self._rows: dict[str, Partials] = {}
        self._sequences: dict[str, Partials] = {}

    def tokens(
        self,
        name: str,
        values_RW: torch.Tensor,
        shift: float = 0.0,
        *,
        spread: bool = False,
        extremes: bool = False,
    ) -> None:
        """Record a number of every token (or of every row: it broadcasts). `spread` for variances, `extremes`
        for minimum and maximum."""
        self._rows[name] = Partials.of(values_RW, self.valid_RW, shift, spread, extremes)

    def sequences(
        self, name: str, values_B: torch.Tensor, shift: float = 0.0, *, spread: bool = False
    ) -> None:
        """Record a number of every sequence that has tokens."""
        there_B1 = (self.length_B > 0)[:, None]
        self._sequences[name] = Partials.of(values_B[:, None], there_B1, shift, spread, False)

    def moments(self) -> MomentsByName:
        """Everything recorded so far, and the sequences' lengths as "length"."""
        self.sequences("length", self.length_B.to(torch.float32))
        token_count = self.valid_RW.sum(1, dtype=torch.float64).sum()
        sequence_count = (self.length_B > 0).sum(dtype=torch.float64)
        return MomentsByName({**_summed(self._rows, token_count), **_summed(self._sequences, sequence_count)})


class MomentsByName(dict[str, Moments]):
    """What an innovation makes its metrics from."""

    def constant(self, value: float) -> Metric:
        """An option of the run, reported as a number: its mean over anything is itself."""
        one = torch.ones_like(self["length"].count)
        return Metric(one * value, one)


@dataclass(frozen=True)
class Partials:
    """Sums (float64) and extremes of each row."""

    total_R: torch.Tensor
    shift: float
    squares_R: torch.Tensor | None
    lowest_R: torch.Tensor | None
    highest_R: torch.Tensor | None

    @classmethod
    def of(
        cls, values: torch.Tensor, valid: torch.Tensor, shift: float, spread: bool, extremes: bool
    ) -> Partials:
        values = values.detach().expand_as(valid)
        wide = values.double()
        shifted = (wide - shift if shift else wide).where(valid, 0.0)
        return cls(
            shifted.sum(1),
            shift,
            shifted.square().sum(1) if spread else None,
            values.where(valid, torch.inf).amin(1) if extremes else None,
            values.where(valid, -torch.inf).amax(1) if extremes else None,
        )


def _summed(rows: dict[str, Partials], count: torch.Tensor) -> dict[str, Moments]:
    """Over rows, all names at once."""
    parts = list(rows.values())
    totals = _over_rows([p.total_R for p in parts], "sum")
    squares = _over_rows([p.squares_R for p in parts], "sum")
    lowest = _over_rows([p.lowest_R for p in parts], "amin")
    highest = _over_rows([p.highest_R for p in parts], "amax")
    result = {}
    for name, part, total, square, low, high in zip(
        rows, parts, totals, squares, lowest, highest, strict=True
    ):
        assert total is not None
        result[name] = Moments(count, total, part.shift, square, low, high)
    return result


def _over_rows(
    parts: list[torch.Tensor | None], how: Literal["sum", "amin", "amax"]
) -> list[torch.Tensor | None]:
    """One reduction for all that are there."""
    there = [part for part in parts if part is not None]
    if not there:
        return parts
    stacked_NR = torch.stack(there)
    if how == "sum":
        reduced_N = stacked_NR.sum(1)
    else:
        reduced_N = stacked_NR.amin(1) if how == "amin" else stacked_NR.amax(1)
    values = iter(reduced_N.unbind())
    return [None if part is None else next(values) for part in parts]
