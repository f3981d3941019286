"""A metric carries its reducer and its denominator, so that merging micro-batches and ranks cannot bias
it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

Reducer = Literal["mean", "sum", "max", "min"]


@dataclass(frozen=True, slots=True)
class Metric:
    """`value` is the numerator of a mean, or the sum, maximum or minimum itself; `denominator` counts what it
    is over.

    A metric over nothing (denominator 0) merges like any other and is left out of the result: never a made-up
    number.

    Example: Metric(torch.tensor(6.0), torch.tensor(3.0)) is a mean of 2 over 3 tokens.
    """

    value: torch.Tensor
    denominator: torch.Tensor
    reducer: Reducer = "mean"


Metrics = Mapping[str, Metric]


def mean_of(values: torch.Tensor, mask: torch.Tensor) -> Metric:
    """Mean over the places where mask is true."""
    return Metric(values.detach().where(mask, 0.0).sum(), mask.sum())


def max_of(values: torch.Tensor, mask: torch.Tensor) -> Metric:
    return Metric(_filled(values, mask, -torch.inf).max(), mask.sum(), "max")


def min_of(values: torch.Tensor, mask: torch.Tensor) -> Metric:
    return Metric(_filled(values, mask, torch.inf).min(), mask.sum(), "min")


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
    combine = {"mean": torch.add, "sum": torch.add, "max": torch.maximum, "min": torch.minimum}[a.reducer]
    return Metric(combine(a.value, b.value), a.denominator + b.denominator, a.reducer)


def reduce(metrics: Metrics, group: dist.ProcessGroup | None = None) -> dict[str, float]:
    """Over the ranks of `group` (None: this rank alone), as plain numbers. Every rank must bring the same
    names."""
    names = sorted(metrics)
    if not names:
        return {}
    device = metrics[names[0]].value.device
    sums = torch.zeros(2, len(names), dtype=torch.float64, device=device)
    extremes = torch.full((len(names),), -torch.inf, dtype=torch.float64, device=device)
    for column, name in enumerate(names):
        metric = metrics[name]
        sums[1, column] = metric.denominator
        if metric.reducer in ("mean", "sum"):
            sums[0, column] = metric.value
        else:
            extremes[column] = metric.value if metric.reducer == "max" else -metric.value
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    totals, counts, tops = sums[0].tolist(), sums[1].tolist(), extremes.tolist()
    result = {}
    for name, total, count, top in zip(names, totals, counts, tops, strict=True):
        if count:
            reducer = metrics[name].reducer
            result[name] = {"mean": total / count, "sum": total, "max": top, "min": -top}[reducer]
    return result
