"""Metrics keep their denominators through micro-batches and ranks; a metric over nothing is not a number."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mega.monitor import histogram
from grpo_mega.monitor.metrics import Metric, max_of, mean_of, merge, min_of, reduce

NUMBERS = [[1.0, 2.0, 3.0], [10.0], []]  # three micro-batches, one of them over nothing


def _metric(value: float, denominator: float, reducer="mean") -> Metric:
    return Metric(torch.tensor(value), torch.tensor(denominator), reducer)


def _all_of(values: list[float], mask: list[bool] | None = None) -> dict[str, Metric]:
    """One metric of each reducer over the same numbers."""
    values_T = torch.tensor(values, dtype=torch.float64)
    mask_T = torch.tensor([True] * len(values) if mask is None else mask, dtype=torch.bool)
    return {
        "mean": mean_of(values_T, mask_T),
        "sum": Metric(values_T.where(mask_T, 0.0).sum(), mask_T.sum(), "sum"),
        "max": max_of(values_T, mask_T),
        "min": min_of(values_T, mask_T),
    }


def test_each_reducer_over_unequal_micro_batches():
    # (1 + 2 + 3 + 10) / 4 = 4; the mean of the micro-batches' means, (2 + 10) / 2 = 6, would be biased
    expected = {"mean": 4.0, "sum": 16.0, "max": 10.0, "min": 1.0}
    assert reduce(merge(map(_all_of, NUMBERS))) == expected
    assert reduce(merge(map(_all_of, reversed(NUMBERS)))) == expected


def test_masked_values_do_not_count():
    masked = [-math.inf, 5.0, math.nan, 7.0, math.inf]
    metrics = _all_of(masked, [False, True, False, True, False])
    assert reduce(metrics) == {"mean": 6.0, "sum": 12.0, "max": 7.0, "min": 5.0}


def test_negative_extremes():
    """No hidden 0 takes part."""
    assert reduce(merge(map(_all_of, [[-3.0, -2.0], [-7.0]]))) == {
        "mean": -4.0,
        "sum": -12.0,
        "max": -2.0,
        "min": -7.0,
    }


def test_a_metric_over_nothing_is_left_out():
    assert reduce(_all_of([])) == {}
    assert reduce(_all_of([1.0, 2.0], [False, False])) == {}
    assert reduce(merge([_all_of([]), _all_of([])])) == {}
    assert reduce({}) == {}
    assert merge([]) == {}


def test_a_zero_is_not_nothing():
    assert reduce({"clip": _metric(0.0, 5.0), "none": _metric(0.0, 0.0)}) == {"clip": 0.0}


def test_a_sum_is_not_divided_by_its_denominator():
    assert reduce(merge([{"loss": _metric(0.25, 1.0, "sum")}, {"loss": _metric(0.5, 1.0, "sum")}])) == {
        "loss": 0.75
    }


def test_names_of_only_some_micro_batches_are_kept():
    merged = merge([{"a": _metric(6.0, 3.0)}, {"b": _metric(1.0, 1.0)}, {"a": _metric(0.0, 1.0)}])
    assert reduce(merged) == {"a": 1.5, "b": 1.0}


def test_one_name_with_two_reducers_is_a_bug():
    with pytest.raises(AssertionError):
        merge([{"x": _metric(1.0, 1.0, "mean")}, {"x": _metric(1.0, 1.0, "sum")}])


def test_a_metric_holds_no_graph():
    """A metric kept for the end of the step must not keep every activation with it."""
    values_T = torch.ones(3, requires_grad=True)
    for metric in (make(values_T, values_T > 0) for make in (mean_of, max_of, min_of)):
        assert not metric.value.requires_grad


@settings(deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(-1000, 1000), st.booleans()), max_size=6), max_size=5))
def test_any_split_gives_the_numbers_of_the_whole(batches):
    merged = merge(_all_of([float(v) for v, _ in batch], [kept for _, kept in batch]) for batch in batches)
    kept = [value for batch in batches for value, kept in batch if kept]
    expected = {}
    if kept:
        expected = {"mean": sum(kept) / len(kept), "sum": sum(kept), "max": max(kept), "min": min(kept)}
    assert reduce(merged) == pytest.approx(expected)


def _reduce_on_rank(by_rank: list[list[list[float]]]) -> dict[str, float]:
    import torch.distributed as dist

    from grpo_mega.engine.parallel import initialize_process_group

    initialize_process_group()
    return reduce(merge(map(_all_of, by_rank[dist.get_rank()])), dist.group.WORLD)


@pytest.mark.parametrize(
    ("by_rank", "expected"),
    [
        # (1 + 2 + 3 + 10 + 4) / 5 = 4
        ([NUMBERS, [[4.0]]], {"mean": 4.0, "sum": 20.0, "max": 10.0, "min": 1.0}),
        ([[[-3.0]], [[-5.0, -4.0]]], {"mean": -4.0, "sum": -12.0, "max": -3.0, "min": -5.0}),
        ([[[]], [[8.0, 2.0]]], {"mean": 5.0, "sum": 10.0, "max": 8.0, "min": 2.0}),  # a rank without any
        ([[[]], [[]]], {}),
    ],
)
def test_over_two_ranks(by_rank, expected, ranks):
    assert ranks(2).run(_reduce_on_rank, by_rank) == [expected, expected]


def _reduce_alone() -> dict[str, float]:
    import torch.distributed as dist

    from grpo_mega.engine.parallel import initialize_process_group

    initialize_process_group()
    return reduce(_all_of([float(dist.get_rank())]))


def test_without_a_group_each_rank_speaks_for_itself(ranks):
    assert [metrics["mean"] for metrics in ranks(2).run(_reduce_alone)] == [0.0, 1.0]


def _moments_of(values: list[float]) -> dict[str, Metric]:
    """What adds up to variances, root mean squares and correlations, and histograms of the same numbers."""
    x = torch.tensor(values, dtype=torch.float64)
    y = x**3
    count = torch.tensor(float(len(values)))
    pair = torch.stack([(x - 1).sum(), (x - 1).square().sum()])  # about any constant
    counts = histogram.counts(x, torch.ones_like(x, dtype=torch.bool))
    return {
        "variance": Metric(pair, count, "variance"),
        "std": Metric(pair, count, "std"),
        "rms": Metric(x.square().sum(), count, "rms"),
        "correlation": Metric(torch.stack([x.sum(), y.sum(), x @ x, y @ y, x @ y]), count, "correlation"),
        "p99": Metric(counts, count, "p99"),
        "abs_p99": Metric(counts, count, "abs_p99"),
    }


def test_variances_and_correlations_are_those_of_the_whole():
    """Not means of what each part has: 1, 2, 3 and 10 have mean 4 and variance (9 + 4 + 1 + 36) / 4 =
    12.5."""
    reduced = reduce(merge(map(_moments_of, NUMBERS)))
    x = torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
    assert reduced["variance"] == pytest.approx(12.5)
    assert reduced["std"] == pytest.approx(12.5**0.5)
    assert reduced["rms"] == pytest.approx((114 / 4) ** 0.5)
    assert reduced["correlation"] == pytest.approx(float(torch.corrcoef(torch.stack([x, x**3]))[0, 1]))


@pytest.mark.parametrize("scale", [1e-5, 1e-2, 1.0, 30.0])
def test_quantiles_merge_to_the_width_of_a_bin(scale):
    values = (torch.randn(20000, generator=torch.Generator().manual_seed(0)) * scale).tolist()
    reduced = reduce(merge(_moments_of(values[part::3]) for part in range(3)))
    exact = torch.tensor(values)
    assert reduced["p99"] == pytest.approx(float(exact.quantile(0.99)), rel=0.02)
    assert reduced["abs_p99"] == pytest.approx(float(exact.abs().quantile(0.99)), rel=0.02)


def test_a_quantile_of_zeros_and_of_negative_numbers():
    assert reduce(_moments_of([0.0] * 5))["p99"] == 0.0
    assert reduce(_moments_of([-2.0] * 5))["p99"] == pytest.approx(-2.0, rel=0.02)
    assert reduce(_moments_of([-2.0] * 5))["abs_p99"] == pytest.approx(2.0, rel=0.02)


def test_the_correlation_with_a_constant_is_no_number():
    assert "correlation" not in reduce(_moments_of([2.0, 2.0, 2.0]))


def test_bin_counts_are_drawn_by_powers_of_two():
    values = torch.tensor([1.5, 1.5, 1.0, -3.0, 0.0, 1e-9, 300.0])
    counts = histogram.counts(values, torch.ones(7, dtype=torch.bool)).tolist()
    drawn, edges = histogram.by_octave(counts)
    assert len(edges) == len(drawn) + 1 and edges == sorted(edges)
    found = {(low, high): count for count, low, high in zip(drawn, edges, edges[1:], strict=False) if count}
    assert found == {(-4.0, -2.0): 1, (-(2.0**-24), 2.0**-24): 2, (1.0, 2.0): 3, (128.0, 256.0): 1}


def test_a_histogram_is_no_number_but_is_handed_on():
    counted = Metric(
        histogram.counts(torch.ones(3), torch.ones(3, dtype=torch.bool)), torch.tensor(3), "histogram"
    )
    kept: dict[str, list[float]] = {}
    assert reduce({"reward/distribution": counted}, None, kept) == {}
    assert sum(kept["reward/distribution"]) == 3
