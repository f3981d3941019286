"""Group advantages: hand arithmetic, and what holds for every group."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_mega.algo.advantage import group_advantages
from grpo_mega.recipe.blocks import AdvantageBlock

GRPO = AdvantageBlock()
REWARDS = st.lists(st.floats(-100, 100), min_size=1, max_size=32)


def test_by_hand():
    # mean .25; deviations (.75, -.25, -.25, -.25); std sqrt((.5625 + 3 * .0625) / 4) = sqrt(.1875) = .4330127
    # .75 / .4330127 = 1.7320508; -.25 / .4330127 = -.5773503
    expected = [1.7320508, -0.5773503, -0.5773503, -0.5773503]
    assert group_advantages([1, 0, 0, 0], GRPO) == pytest.approx(expected, abs=1e-5)
    assert group_advantages([1, 0, 0, 0], AdvantageBlock(normalize_std=False)).tolist() == [
        0.75,
        -0.25,
        -0.25,
        -0.25,
    ]


def test_epsilon_is_added_to_the_deviation():
    # mean 1, std 1: (2 - 1) / (1 + 1) = .5
    assert group_advantages([2, 0], AdvantageBlock(epsilon=1.0)).tolist() == [0.5, -0.5]


@given(st.floats(-1e6, 1e6), st.integers(1, 32), st.booleans())
def test_equal_rewards_give_exactly_0(reward, size, normalize_std):
    # The mean of three times .1 is not .1: without care, 1e-17 / epsilon would remain.
    assert (group_advantages([reward] * size, AdvantageBlock(normalize_std=normalize_std)) == 0.0).all()


@given(REWARDS, st.booleans())
def test_they_sum_to_0_keep_the_order_and_have_unit_scale(rewards, normalize_std):
    advantages = group_advantages(rewards, AdvantageBlock(normalize_std=normalize_std))
    assert advantages.dtype == np.float64 and advantages.shape == (len(rewards),)
    # Rounding of the mean, at most G * 100 * 2^-53, is divided by at least epsilon: below 1e-6 each.
    assert abs(advantages.sum()) < 1e-4
    assert (np.diff(advantages[np.argsort(rewards)]) >= 0).all()
    if normalize_std:
        assert np.mean(advantages**2) <= 1.0 + 1e-9


@given(st.lists(st.integers(0, 5), min_size=2, max_size=16).filter(lambda rewards: len(set(rewards)) > 1))
def test_shift_and_scale_of_the_reward_do_not_matter(rewards):
    rewards_G = np.array(rewards, np.float64)
    moved = group_advantages(3.0 * rewards_G - 7.0, GRPO)
    assert moved == pytest.approx(group_advantages(rewards_G, GRPO), abs=1e-4)  # up to epsilon / std
