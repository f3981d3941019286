"""The guard: tiers, caps, stops and alarms, and that a resumed guard goes on as if nothing had been."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_mega.monitor.health import Caps, Guard, GuardState
from grpo_mega.recipe.run_blocks import GuardBlock


def guard(**options) -> Guard:
    return Guard(GuardBlock(**options), normalised_rewards=True)


def drifts(watched: Guard, *values: float):
    return [watched.observe(step, {"guard/drift_probe": value}) for step, value in enumerate(values, start=1)]


def test_the_worst_of_the_three_drifts_counts_smoothed_over_three_steps():
    watched = guard()
    first = watched.observe(1, {"guard/drift_behaviour": 1.0, "guard/drift_reference": 3.0})
    assert first.metrics["guard/drift"] == 3.0
    assert [v.metrics["guard/drift"] for v in drifts(watched, 0.0, 9.0, 3.0)] == [1.5, 4.0, 4.0]


def test_tiers_tighten_under_autopilot_and_never_loosen():
    watched = guard(autopilot=True)
    verdicts = drifts(watched, 4.0, 6.0, 11.0, 16.0, 0.0, 0.0, 0.0)
    assert [v.intervention is not None for v in verdicts] == [False, False, True, True, False, False, False]
    assert watched.caps == Caps(lr=5e-7, kl_coef=1.0, clip=0.1)
    assert verdicts[2].intervention == "drift 7.00: lr <= 1e-06, kl_coef >= 0.5"
    assert verdicts[-1].metrics == {
        **{"guard/drift": 0.0, "guard/tier": 2.0, "guard/alarms": 0.0, "guard/interventions": 2.0}
    }


def test_without_autopilot_it_only_advises():
    watched = guard()
    advice = drifts(watched, 6.0)[0]
    assert watched.caps == Caps() and advice.intervention is None and advice.stop is None
    assert advice.findings[0].change == "lr <= 1e-06, kl_coef >= 0.5"
    assert "(done)" not in advice.findings[0].block()


def test_one_step_far_beyond_stops_at_once():
    verdict = drifts(guard(), 0.1, 0.1, 20.5)[-1]
    assert verdict.stop is not None and "20.50 at step 3" in verdict.stop
    assert drifts(guard(), math.nan)[0].stop is not None  # not a number is no small number
    assert drifts(guard(stop_above=None), 50.0)[0].stop is None


def test_updates_that_are_not_finite_stop_only_in_a_row():
    watched = guard(nonfinite_limit=2)
    stops = [
        watched.observe(step, {"actor/update_skipped": skip}).stop for step, skip in enumerate((1, 0, 1, 1))
    ]
    assert [stop is not None for stop in stops] == [False, False, False, True]
    assert "2 updates in a row" in str(stops[-1])


def test_an_alarm_is_told_once_and_again_after_it_was_over():
    watched = guard()
    told = [
        [finding.name for finding in watched.observe(step, {"actor/mean_ratio": ratio}).findings]
        for step, ratio in enumerate((1.0, 3.0, 3.0, 1.0, 0.4), start=1)
    ]
    assert told == [[], ["actor/mean_ratio"], [], [], ["actor/mean_ratio"]]
    block = watched.observe(6, {"actor/mean_ratio": 0.4, "actor/loss": 11.0}).findings[0].block()
    assert block.splitlines()[0] == "guard: actor/loss is 11, outside -10 to 10"
    assert block.splitlines()[1] == "  since:   step 6"


def test_rewards_are_only_judged_where_their_range_is_known():
    metrics = {"reward/mean": 7.0, "reward/std": 3.0}
    assert len(guard().observe(1, metrics).findings) == 2
    assert Guard(GuardBlock(), normalised_rewards=False).observe(1, metrics).findings == ()


def test_what_is_normal_raises_nothing():
    """mean_advantage is 0 by construction, and a log-prob's own size is no alarm."""
    normal = {"actor/mean_advantage": 0.0, "actor/mean_log_prob_current": -250.0, "actor/loss": 0.0}
    assert guard().observe(1, normal).findings == ()


@given(
    st.lists(st.floats(0, 25) | st.just(math.inf), min_size=1, max_size=12),
    st.integers(0, 11),
    st.booleans(),
)
def test_a_resumed_guard_is_the_same_guard(values, cut, autopilot):
    whole, first = guard(autopilot=autopilot), guard(autopilot=autopilot)
    expected = drifts(whole, *values)
    made = drifts(first, *values[:cut])
    state = GuardState.from_json(json.loads(json.dumps(first.state.to_json())))
    resumed = Guard(GuardBlock(autopilot=autopilot), normalised_rewards=True, state=state)
    for step, value in enumerate(values[cut:], start=len(made) + 1):
        made.append(resumed.observe(step, {"guard/drift_probe": value}))
    assert made == expected
    assert resumed.state == whole.state


def test_tiers_must_rise():
    with pytest.raises(ValueError, match="must rise"):
        GuardBlock(tiers=({"above": 10}, {"above": 5}))
    with pytest.raises(ValueError, match="must rise"):
        GuardBlock(stop_above=7)


def by_length(watched: Guard, *values: float | None) -> list[list[str]]:
    """Names of what is new at each step."""
    steps = ({} if value is None else {"reward/length_corr": value} for value in values)
    return [[f.name for f in watched.observe(step, m).findings] for step, m in enumerate(steps, start=1)]


def test_a_reward_that_goes_by_length_for_a_whole_window_is_an_alarm():
    watched = guard(length_corr=0.7, length_window=3)
    assert by_length(watched, 0.9, 0.9, 0.6, 0.8, 0.8) == [[]] * 5  # never three in a row
    assert by_length(watched, None, 0.75, 0.9, 0.9) == [[], ["length"], [], []]  # said once
    assert "length" in watched.state.alarms
    assert by_length(watched, 0.1) == [[]] and not watched.state.alarms
    assert by_length(watched, -0.9, -0.8, -0.9) == [[], [], ["length"]]  # the short ones earn more


def test_reward_and_length_that_change_sides_are_no_alarm():
    assert by_length(guard(length_window=2), 0.9, -0.9, 0.9, -0.9) == [[]] * 4
    assert by_length(guard(length_window=1, length_corr=None), 1.0, 1.0) == [[]] * 2


def test_the_window_of_lengths_goes_on_after_a_checkpoint():
    watched = guard(length_window=3)
    by_length(watched, 0.9, 0.9)
    state = GuardState.from_json(json.loads(json.dumps(watched.state.to_json())))
    resumed = Guard(GuardBlock(length_window=3), normalised_rewards=True, state=state)
    assert by_length(resumed, 0.9) == [["length"]]
    older = {name: value for name, value in state.to_json().items() if name != "length_corrs"}
    assert GuardState.from_json(older).length_corrs == ()
