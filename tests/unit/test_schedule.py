"""The learning rate and the number of steps of a stage, by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mega.engine.optimizer import RateSchedule
from grpo_mega.recipe.schema import Recipe
from grpo_mega.train import rate_of, steps_of


def _rates(**options) -> list[float]:
    schedule = RateSchedule(**({"peak": 1e-3, "warmup_steps": 2, "total_steps": 4, "minimum": 0.0} | options))
    return [schedule.at(step) for step in range(schedule.total_steps)]


def _recipe(stage: dict, **train) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"scratch": {}},
            "data": {"source": "procedural", "task": "sort_digits"},
            "stages": [stage],
            "reward": [{"rule": {}}],
            "train": {"lr": 1e-3, "warmup_steps": 4, "schedule": "cosine", "min_lr_ratio": 0.1} | train,
        }
    )


def _stage_rate(stage: dict, **train) -> RateSchedule:
    recipe = _recipe(stage, **train)
    return rate_of(recipe, recipe.stages[0])


def test_linear_by_hand():
    # warm-up 1/2, 2/2 of 1e-3; then 1 - 1/2 and 1 - 2/2
    assert _rates(kind="linear") == pytest.approx([5e-4, 1e-3, 5e-4, 0.0])


def test_linear_ends_at_the_minimum():
    # 1e-4 + 9e-4 * (3/4, 2/4, 1/4, 0)
    expected = [7.75e-4, 5.5e-4, 3.25e-4, 1e-4]
    assert _rates(kind="linear", warmup_steps=0, minimum=1e-4) == pytest.approx(expected)


def test_cosine_by_hand():
    # (1 + cos(pi/4 k)) / 2 for k = 1..4: .8535534, .5 (the middle), .1464466, 0
    expected = [5e-4, 1e-3, 0.8535534e-3, 0.5e-3, 0.1464466e-3, 0.0]
    assert _rates(kind="cosine", total_steps=6) == pytest.approx(expected, abs=1e-10)
    # half way between peak and minimum: (1e-3 + 2e-4) / 2
    assert _rates(kind="cosine", total_steps=6, minimum=2e-4)[3] == pytest.approx(6e-4)


def test_constant_stays_at_the_peak_and_ignores_the_minimum():
    assert _rates(kind="constant", minimum=1e-4) == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])
    assert _rates(kind="constant", warmup_steps=0) == [1e-3] * 4


def test_warm_up_as_long_as_the_stage():
    # a stage capped below its warm-up: 1/8 .. 4/8 of the peak, and nothing divides by 0
    for kind in ("constant", "linear", "cosine"):
        assert _rates(kind=kind, warmup_steps=8) == pytest.approx([1.25e-4, 2.5e-4, 3.75e-4, 5e-4])
        assert _rates(kind=kind, warmup_steps=4)[-1] == pytest.approx(1e-3)


@settings(deadline=None)
@given(
    st.integers(0, 10), st.integers(1, 30), st.sampled_from(["constant", "linear", "cosine"]), st.floats(0, 1)
)
def test_rises_then_never_rises_and_stays_in_range(warmup, total, kind, ratio):
    rates = _rates(kind=kind, warmup_steps=warmup, total_steps=total, minimum=1e-3 * ratio)
    assert all(0.0 <= rate <= 1e-3 + 1e-12 for rate in rates)
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    after = rates[warmup:]
    assert all(a >= b - 1e-12 for a, b in pairwise(after))
    if after and kind != "constant":
        assert after[-1] == pytest.approx(1e-3 * ratio, abs=1e-12)


@pytest.mark.parametrize("kind", ["sft", "grpo"])
@pytest.mark.parametrize(("cap", "steps"), [(None, 7), (3, 3), (7, 7), (100, 7), (0, 0)])
def test_train_steps_caps_every_stage(kind, cap, steps):
    recipe = _recipe({kind: {"steps": 7}}, steps=cap)
    assert steps_of(recipe, recipe.stages[0]) == steps


def test_a_stage_without_numbers_takes_those_of_train():
    # the minimum is a share of the peak: .1 * 1e-3
    assert _stage_rate({"grpo": {"steps": 50}}) == RateSchedule(1e-3, 4, 50, "cosine", pytest.approx(1e-4))


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_stage_overrides_train(kind):
    stage = {kind: {"steps": 50, "lr": 2e-5, "warmup_steps": 9, "schedule": "linear"}}
    # the minimum follows the stage's own peak: .1 * 2e-5
    assert _stage_rate(stage) == RateSchedule(2e-5, 9, 50, "linear", pytest.approx(2e-6))


def test_a_stage_can_turn_the_warm_up_off():
    assert _stage_rate({"grpo": {"steps": 50, "warmup_steps": 0}}).warmup_steps == 0


def test_a_capped_stage_still_decays_to_its_end():
    rate = _stage_rate({"grpo": {"steps": 50, "schedule": "linear"}}, steps=10)
    assert rate.total_steps == 10
    assert rate.at(9) == pytest.approx(1e-4)
