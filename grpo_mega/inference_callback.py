"""When to evaluate, and what the evaluations so far have shown.

`EnhancedInferenceCallback` puts both behind the interface of older training scripts; the training loop keeps
the same `EvaluationHistory` itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

PASS_RATE_METRIC = "eval_avg_test_pass_rate"
PROBLEMS_METRIC = "eval_samples_evaluated"

Trend = Literal["improving", "declining", "stable", "unknown"]

RECENT = 5
"""Evaluations that the recent mean and the trend look at."""

STABLE_SLOPE = 0.01
"""A change of the pass rate per evaluation up to this is no trend."""


@dataclass(frozen=True, slots=True)
class EvaluationSummary:
    """Example: EvaluationSummary(total_evaluations=7, last_eval_step=150, recent_avg_pass_rate=.4,
    trend="improving"). None: no evaluation, or none with a pass rate."""

    total_evaluations: int
    last_eval_step: int | None
    recent_avg_pass_rate: float | None  # mean over the last 5
    trend: Trend

    def __getitem__(self, name: str) -> object:
        """Older scripts read it like a dictionary."""
        return asdict(self)[name]


@dataclass(frozen=True, slots=True)
class EvaluationHistory:
    """What is remembered of a run's evaluations; part of its checkpoint.

    Example: EvaluationHistory(total=2, last_step=25, sample_count=8, recent=(.25, .375))
    """

    total: int = 0
    last_step: int | None = None
    sample_count: int = 0  # problems with a pass rate, in the last evaluation
    recent: tuple[float, ...] = ()  # the last pass rates, oldest first

    def has(self, step: int) -> bool:
        """Whether this step was evaluated: no step is twice. Steps before the last one are past."""
        return self.last_step is not None and step <= self.last_step

    def with_evaluation(self, step: int, metrics: Mapping[str, float]) -> EvaluationHistory:
        """The history after one more; an evaluation without a pass rate counts, and changes no mean."""
        if self.has(step):
            raise ValueError(
                f"step {step} was evaluated already: the last evaluation was at {self.last_step}"
            )
        rate = metrics.get(PASS_RATE_METRIC, math.nan)
        return EvaluationHistory(
            total=self.total + 1,
            last_step=step,
            sample_count=int(metrics.get(PROBLEMS_METRIC, 0)),
            recent=self.recent if math.isnan(rate) else (*self.recent, float(rate))[-RECENT:],
        )

    @property
    def trend(self) -> Trend:
        """The sign of the slope of a straight line through the last pass rates, by least squares."""
        if len(self.recent) < 2:
            return "unknown"
        slope = _slope(self.recent)
        if abs(slope) <= STABLE_SLOPE:
            return "stable"
        return "improving" if slope > 0 else "declining"

    def summary(self) -> EvaluationSummary:
        mean = sum(self.recent) / len(self.recent) if self.recent else None
        return EvaluationSummary(self.total, self.last_step, mean, self.trend)

    def metrics(self) -> dict[str, float]:
        """Of the last evaluation; none before the first."""
        if self.last_step is None:
            return {}
        return {
            "inference/step": float(self.last_step),
            "inference/sample_count": float(self.sample_count),
            "inference/evaluation_count": float(self.total),
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> EvaluationHistory:
        return replace(cls(**fields), recent=tuple(fields["recent"]))


class EnhancedInferenceCallback:
    """Evaluate every so many steps, on so many held-out problems, and remember.

    Example:
        if callback.should_evaluate(step):
            callback.on_evaluation(step, parts.evaluate().metrics)
    """

    def __init__(self, eval_every_n_steps: int = 25, max_samples: int = 8, *, at_start: bool = False):
        """`max_samples`: problems of an evaluation, 0 = all. `at_start`: also at step 0."""
        if eval_every_n_steps < 1:
            raise ValueError(f"eval_every_n_steps is {eval_every_n_steps}: it must be at least 1")
        if max_samples < 0:
            raise ValueError(f"max_samples is {max_samples}: it must be at least 0, which means all")
        self.eval_every_n_steps, self.max_samples, self.at_start = eval_every_n_steps, max_samples, at_start
        self.history = EvaluationHistory()

    def should_evaluate(self, step: int) -> bool:
        """Whether `step` is due and was not evaluated yet."""
        is_due = step % self.eval_every_n_steps == 0 if step else self.at_start
        return is_due and not self.history.has(step)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Take in the metrics of an evaluation; what to track besides them."""
        self.history = self.history.with_evaluation(step, metrics)
        return self.metrics()

    def get_evaluation_summary(self) -> EvaluationSummary:
        return self.history.summary()

    def metrics(self) -> dict[str, float]:
        return self.history.metrics()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; plain JSON."""
        return self.history.to_json()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history = EvaluationHistory.from_json(state)


def _slope(values: tuple[float, ...]) -> float:
    """Change per place. Example: (.1, .2, .4): places -1 0 1, (-.1 + .4) / 2 = .15"""
    middle = (len(values) - 1) / 2
    places = [place - middle for place in range(len(values))]
    return sum(x * y for x, y in zip(places, values, strict=True)) / sum(x * x for x in places)
