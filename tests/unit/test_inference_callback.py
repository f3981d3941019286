"""When evaluations are due, that no step is evaluated twice, and what the history says of them."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_mega.inference_callback import EnhancedInferenceCallback, EvaluationHistory, EvaluationSummary


def metrics(rate: float | None, problems: int = 8) -> dict[str, float]:
    if rate is None:
        return {"eval_response_length": 3.0}
    return {"eval_avg_test_pass_rate": rate, "eval_samples_evaluated": float(problems)}


def history(*rates: float | None) -> EvaluationHistory:
    result = EvaluationHistory()
    for number, rate in enumerate(rates, start=1):
        result = result.with_evaluation(25 * number, metrics(rate))
    return result


def test_the_defaults_are_those_of_older_scripts():
    callback = EnhancedInferenceCallback()
    assert (callback.eval_every_n_steps, callback.max_samples) == (25, 8)
    assert [step for step in range(80) if callback.should_evaluate(step)] == [25, 50, 75]


def test_step_0_is_evaluated_if_asked():
    assert EnhancedInferenceCallback(at_start=True).should_evaluate(0)


def test_no_step_is_evaluated_twice():
    callback = EnhancedInferenceCallback(eval_every_n_steps=2)
    assert callback.should_evaluate(2)
    callback.on_evaluation(2, metrics(0.5))
    assert not callback.should_evaluate(2)
    with pytest.raises(ValueError, match="step 2 was evaluated already"):
        callback.on_evaluation(2, metrics(0.5))
    assert callback.should_evaluate(4)
    assert callback.get_evaluation_summary().total_evaluations == 1


@pytest.mark.parametrize(("every", "samples"), [(0, 8), (-1, 8), (25, -1)])
def test_senseless_numbers_are_refused(every, samples):
    with pytest.raises(ValueError, match="it must be at least"):
        EnhancedInferenceCallback(every, samples)


def test_the_summary_by_hand():
    callback = EnhancedInferenceCallback(eval_every_n_steps=10)
    assert callback.get_evaluation_summary() == EvaluationSummary(0, None, None, "unknown")
    for number, rate in enumerate((0.9, 0.1, 0.2, 0.3, 0.4, 0.5), start=1):
        tracked = callback.on_evaluation(10 * number, metrics(rate, problems=number))
    assert tracked == {
        "inference/step": 60.0,
        "inference/sample_count": 6.0,
        "inference/evaluation_count": 6.0,
    }
    summary = callback.get_evaluation_summary()
    assert (summary.total_evaluations, summary.last_eval_step, summary.trend) == (6, 60, "improving")
    assert summary.recent_avg_pass_rate == pytest.approx(0.3)  # the last five: the .9 is forgotten
    assert summary["trend"] == "improving"  # as older scripts ask for it


@pytest.mark.parametrize(
    ("rates", "trend"),
    [
        ((), "unknown"),
        ((0.5,), "unknown"),
        ((0.5, None), "unknown"),
        ((0.1, 0.2, 0.4), "improving"),  # slope (-.1 + .4) / 2 = .15
        ((0.5, 0.1, 0.5), "stable"),  # slope 0
        ((0.50, 0.51, 0.50, 0.51, 0.52), "stable"),  # slope (-1 - .51 + .51 + 1.04) / 10 = .004
        ((0.6, 0.5, 0.55, 0.4, 0.3), "declining"),  # slope (-1.2 - .5 + .4 + .6) / 10 = -.07
        ((0.9, 0.1, 0.2, 0.3, 0.4, 0.5), "improving"),  # over the last five only
    ],
)
def test_the_trend_is_the_slope_of_the_last_five(rates, trend):
    assert history(*rates).trend == trend


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_an_evaluation_without_a_pass_rate_counts_and_changes_no_mean(nothing):
    summary = history(0.25, nothing).summary()
    assert summary == EvaluationSummary(2, 50, 0.25, "unknown")
    assert history(None).metrics() == {
        "inference/step": 25.0,
        "inference/sample_count": 0.0,
        "inference/evaluation_count": 1.0,
    }
    assert history().metrics() == {}


@given(st.lists(st.none() | st.floats(0, 1), max_size=9), st.lists(st.floats(0, 1), max_size=9))
def test_a_state_through_json_has_the_same_future(past, future):
    straight, resumed = EnhancedInferenceCallback(1), EnhancedInferenceCallback(1)
    for step, rate in enumerate(past, start=1):
        straight.on_evaluation(step, metrics(rate))
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    assert resumed.history == straight.history
    for step, rate in enumerate(future, start=len(past) + 1):
        assert resumed.should_evaluate(step) and not resumed.should_evaluate(step - 1)
        assert resumed.on_evaluation(step, metrics(rate)) == straight.on_evaluation(step, metrics(rate))
        assert resumed.get_evaluation_summary() == straight.get_evaluation_summary()
