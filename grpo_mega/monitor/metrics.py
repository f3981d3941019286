"""A metric carries its reducer and its denominator, so that merging micro-batches and ranks cannot bias
it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from grpo_mega.monitor import histogram

Reducer = Literal[
    "mean",
    "sum",
    "max",
    "min",
    "rms",
    "variance",
    "std",
    "correlation",
    "p99",
    "abs_p99",
    "abs_p999",
    "histogram",
]

QUANTILES = {"p99": 0.99, "abs_p99": 0.99, "abs_p999": 0.999}


@dataclass(frozen=True, slots=True)
class Metric:
    """What adds up over micro-batches and ranks, and the count it is over.

    `value` by reducer: mean, rms: the sum of x, of x^2; sum, max, min: itself; variance, std: the sums of x -
    c and of (x - c)^2 for any constant c; correlation: the sums of x, y, x^2, y^2, x y; p99, abs_p99 and
    abs_p999 (of |x|) and histogram (no number, only for trackers that draw): counts of a histogram.

    A metric over nothing (denominator 0) merges like any other and is left out of the result: never a made-up
    number.

    Example: Metric(torch.tensor(6.0), torch.tensor(3.0)) is a mean of 2 over 3 tokens.
    """

    value: torch.Tensor
    denominator: torch.Tensor
    reducer: Reducer = "mean"


Metrics = Mapping[str, Metric]


def mean_of(values: torch.Tensor, mask: torch.Tensor) -> Metric:
    """Mean over the places where mask is true; summed in float64."""
    return Metric(values.detach().where(mask, 0.0).sum(dtype=torch.float64), mask.sum())


def max_of(values: torch.Tensor, mask: torch.Tensor) -> Metric:
    return Metric(_filled(values, mask, -torch.inf).max(), mask.sum(), "max")


def min_of(values: torch.Tensor, mask: torch.Tensor) -> Metric:
    return Metric(_filled(values, mask, torch.inf).min(), mask.sum(), "min")


def correlation_of(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> Metric:
    """Pearson's, over the places where mask is true."""
    x, y = x.detach().double().where(mask, 0.0), y.detach().double().where(mask, 0.0)
    sums = torch.stack([x.sum(), y.sum(), x.square().sum(), y.square().sum(), (x * y).sum()])
    return Metric(sums, mask.sum(), "correlation")


def _filled(values: torch.Tensor, mask: torch.Tensor, filling: float) -> torch.Tensor:
    filler = values.new_tensor([filling])  # keeps an empty batch reducible
    return torch.cat([values.detach().where(mask, filling).flatten(), filler])


def merge(batches: Iterable[Metrics]) -> dict[str, Metric]:
    """Micro-batches of one rank into one."""
    merged: dict[str, Metric] = {}
    for metrics in batches:
        for name, metric in metrics.items():
            merged[name] = _pair(merged[name], metric) if name in merged else metric
    return merged


def _pair(a: Metric, b: Metric) -> Metric:
    assert a.reducer == b.reducer
    combine = {"max": torch.maximum, "min": torch.minimum}.get(a.reducer, torch.add)
    return Metric(combine(a.value, b.value), a.denominator + b.denominator, a.reducer)


def reduce(
    metrics: Metrics,
    group: dist.ProcessGroup | None = None,
    histograms: dict[str, list[float]] | None = None,
) -> dict[str, float]:
    """Over the ranks of `group` (None: this rank alone), as plain numbers. Every rank must bring the same
    names. `histograms` takes the bin counts of those that are made of some."""
    names = sorted(metrics)
    if not names:
        return {}
    values = [metrics[name].value.detach().double().flatten() for name in names]
    counts = [metrics[name].denominator.detach().double().flatten() for name in names]
    signs = [{"max": 1.0, "min": -1.0}.get(metrics[name].reducer, 0.0) for name in names]
    sums = torch.cat([v for v, sign in zip(values, signs, strict=True) if not sign] + counts)
    extremes = torch.cat([v * sign for v, sign in zip(values, signs, strict=True) if sign] or [sums[:0]])
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    summed, tops = iter(sums.tolist()), iter(extremes.tolist())
    reduced = [
        [next(tops) * sign] if sign else [next(summed) for _ in range(value.numel())]
        for value, sign in zip(values, signs, strict=True)
    ]
    if histograms is not None:
        counted = (name for name in names if metrics[name].reducer in (*QUANTILES, "histogram"))
        histograms |= {name: reduced[names.index(name)] for name in counted}
    result = {
        name: _number(metrics[name].reducer, value, next(summed))
        for name, value in zip(names, reduced, strict=True)
    }
    return {name: number for name, number in result.items() if number is not None}


def _number(reducer: Reducer, value: list[float], count: float) -> float | None:
    """None: over nothing, or undefined there (the correlation with a constant)."""
    if not count or reducer == "histogram":
        return None
    if reducer in ("sum", "max", "min"):
        return value[0]
    if reducer in QUANTILES:
        return histogram.quantile(histogram.folded(value) if reducer != "p99" else value, QUANTILES[reducer])
    means = [part / count for part in value]
    if reducer == "mean":
        return means[0]
    if reducer == "rms":
        return math.sqrt(means[0])
    if reducer == "correlation":
        x, y, xx, yy, xy = means
        spread = (xx - x * x) * (yy - y * y)
        return max(-1.0, min(1.0, (xy - x * y) / math.sqrt(spread))) if spread > 0 else None
    variance = max(0.0, means[1] - means[0] ** 2)
    return variance if reducer == "variance" else math.sqrt(variance)
