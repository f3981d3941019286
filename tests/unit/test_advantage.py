"""Advantages: hand arithmetic, and what holds for every group, every step and every packing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_mega.algo.advantage import StepMoments, gae, group_advantages, normalised
from grpo_mega.recipe.blocks import AdvantageBlock

GRPO = AdvantageBlock()
DR_GRPO = AdvantageBlock(estimator="dr_grpo")
RLOO = AdvantageBlock(estimator="rloo")
PLAIN = AdvantageBlock(estimator="reinforce_plus_plus")
BASELINE = AdvantageBlock(estimator="reinforce_plus_plus", group_baseline=True)
REWARDS = st.lists(st.floats(-100, 100), min_size=1, max_size=32)
LEVELS = st.lists(st.integers(0, 5), min_size=2, max_size=16)


def of_all_groups(groups: list[list[float]], block: AdvantageBlock) -> list[np.ndarray]:
    """A whole step in one process."""
    raw = [group_advantages(rewards, block) for rewards in groups]
    return [normalised(values, StepMoments.of(np.concatenate(raw)), block) for values in raw]


def test_by_hand():
    # mean .25; deviations (.75, -.25, -.25, -.25); std sqrt((.5625 + 3 * .0625) / 4) = sqrt(.1875) = .4330127
    # .75 / .4330127 = 1.7320508; -.25 / .4330127 = -.5773503
    expected = [1.7320508, -0.5773503, -0.5773503, -0.5773503]
    assert group_advantages([1, 0, 0, 0], GRPO) == pytest.approx(expected, abs=1e-5)
    undivided = [0.75, -0.25, -0.25, -0.25]
    assert group_advantages([1, 0, 0, 0], AdvantageBlock(normalize_std=False)).tolist() == undivided
    assert group_advantages([1, 0, 0, 0], DR_GRPO).tolist() == undivided


def test_epsilon_is_added_to_the_deviation():
    # mean 1, std 1: (2 - 1) / (1 + 1) = .5
    assert group_advantages([2, 0], AdvantageBlock(epsilon=1.0)).tolist() == [0.5, -0.5]


def test_rloo_by_hand():
    # the others' means: (2 + 6) / 2 = 4, (1 + 6) / 2 = 3.5, (1 + 2) / 2 = 1.5
    assert group_advantages([1, 2, 6], RLOO).tolist() == pytest.approx([-3.0, -1.5, 4.5], abs=1e-14)


def test_only_grpo_and_the_step_listen_to_normalize_std():
    for estimator in ("dr_grpo", "rloo"):
        with_it = AdvantageBlock(estimator=estimator, normalize_std=True)
        without = AdvantageBlock(estimator=estimator, normalize_std=False)
        assert (group_advantages([1, 2, 6], with_it) == group_advantages([1, 2, 6], without)).all()


@given(LEVELS)
def test_rloo_is_the_distance_from_the_mean_of_the_others(rewards):
    others = [(sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]
    assert group_advantages(rewards, RLOO) == pytest.approx(np.array(rewards) - others, abs=1e-12)


@given(st.floats(-1e6, 1e6), st.integers(2, 32), st.sampled_from([GRPO, DR_GRPO, RLOO, BASELINE]))
def test_equal_rewards_give_exactly_0(reward, size, block):
    # The mean of three times .1 is not .1: without care, 1e-17 / epsilon would remain.
    assert (group_advantages([reward] * size, block) == 0.0).all()
    assert (group_advantages([reward] * size, AdvantageBlock(normalize_std=False)) == 0.0).all()


def test_a_group_of_one_has_no_advantage():
    assert group_advantages([0.3], GRPO).tolist() == [0.0]


@given(REWARDS, st.booleans())
def test_they_sum_to_0_keep_the_order_and_have_unit_scale(rewards, normalize_std):
    advantages = group_advantages(rewards, AdvantageBlock(normalize_std=normalize_std))
    assert advantages.dtype == np.float64 and advantages.shape == (len(rewards),)
    # Rounding of the mean, at most G * 100 * 2^-53, is divided by at least epsilon: below 1e-6 each.
    assert abs(advantages.sum()) < 1e-4
    assert (np.diff(advantages[np.argsort(rewards)]) >= 0).all()
    if normalize_std:
        assert np.mean(advantages**2) <= 1.0 + 1e-9


@given(LEVELS, st.sampled_from([DR_GRPO, RLOO, BASELINE]))
def test_a_subtracted_baseline_leaves_the_scale_and_takes_the_shift(rewards, block):
    advantages = group_advantages(rewards, block)
    assert abs(advantages.sum()) < 1e-12
    moved = group_advantages(3.0 * np.array(rewards) - 7.0, block)
    assert moved == pytest.approx(3.0 * advantages, abs=1e-12)


@given(LEVELS.filter(lambda rewards: len(set(rewards)) > 1))
def test_shift_and_scale_of_the_reward_do_not_matter(rewards):
    rewards_G = np.array(rewards, np.float64)
    moved = group_advantages(3.0 * rewards_G - 7.0, GRPO)
    assert moved == pytest.approx(group_advantages(rewards_G, GRPO), abs=1e-4)  # up to epsilon / std


def test_a_step_by_hand():
    # rewards 1, 0 | 3, 0: mean 1, mean square 10/4, variance 1.5, std 1.2247449
    plain = of_all_groups([[1, 0], [3, 0]], PLAIN)
    assert plain[0] == pytest.approx([0.0, -0.8164966], abs=1e-5)
    assert plain[1] == pytest.approx([1.6329932, -0.8164966], abs=1e-5)
    # less the groups' means: .5, -.5 | 1.5, -1.5: mean 0, mean square 5/4, std 1.1180340
    based = of_all_groups([[1, 0], [3, 0]], BASELINE)
    assert based[0] == pytest.approx([0.4472136, -0.4472136], abs=1e-5)
    assert based[1] == pytest.approx([1.3416408, -1.3416408], abs=1e-5)


def test_a_step_without_the_division():
    block = AdvantageBlock(estimator="reinforce_plus_plus", normalize_std=False)
    assert [values.tolist() for values in of_all_groups([[1, 0], [3, 0]], block)] == [[0, -1], [2, -1]]


def test_the_step_adds_its_epsilon_to_the_deviation():
    # mean 1, std 1: (2 - 1) / (1 + 1) = .5
    block = AdvantageBlock(estimator="reinforce_plus_plus", epsilon=1.0)
    assert of_all_groups([[2, 0]], block)[0].tolist() == [0.5, -0.5]


def test_moments_by_hand():
    assert StepMoments.of([1, 2]) + StepMoments.of([3]) == StepMoments(3.0, 6.0, 14.0)
    assert StepMoments.of([]) == StepMoments(0.0, 0.0, 0.0)
    assert (StepMoments(3.0, 6.0, 14.0).mean, StepMoments(4.0, 4.0, 8.0).std) == (2.0, 1.0)


@given(st.lists(REWARDS, min_size=1, max_size=6), st.integers(0, 6))
def test_moments_of_ranks_add_up_to_those_of_the_step(parts, cut):
    ranks = [np.concatenate([np.empty(0), *parts[:cut]]), np.concatenate([np.empty(0), *parts[cut:]])]
    added = StepMoments.of(ranks[0]) + StepMoments.of(ranks[1])
    together = np.concatenate(ranks)
    assert added.count == together.size
    assert added.mean == pytest.approx(together.mean(), abs=1e-12)
    # Sums resolve a spread down to sqrt(EQUAL), 3e-7, of the size of the numbers, and none whose square is
    # too small for a float.
    resolved = max(1e-150, 3.2e-7 * np.abs(together).max())
    assert added.std == pytest.approx(together.std(), rel=1e-3, abs=resolved)


@given(st.floats(-1e6, 1e6), st.integers(1, 400), st.integers(1, 8), st.booleans())
def test_a_step_of_equal_rewards_gives_exactly_0(reward, samples, ranks, normalize_std):
    block = AdvantageBlock(estimator="reinforce_plus_plus", normalize_std=normalize_std)
    moments = StepMoments(0.0, 0.0, 0.0)
    for _ in range(ranks):
        moments = moments + StepMoments.of([reward] * samples)
    assert (normalised(np.full(samples, reward), moments, block) == 0.0).all()


@given(st.lists(LEVELS, min_size=2, max_size=6), st.booleans())
def test_a_normalised_step_has_mean_0_and_unit_scale(groups, group_baseline):
    block = AdvantageBlock(estimator="reinforce_plus_plus", group_baseline=group_baseline)
    values = np.concatenate(of_all_groups(groups, block))
    assert abs(values.mean()) < 1e-9
    assert values.std() == pytest.approx(1.0, abs=1e-4) or not values.any()
    moved = [[3.0 * reward - 7.0 for reward in group] for group in groups]
    assert np.concatenate(of_all_groups(moved, block)) == pytest.approx(values, abs=1e-4)


def test_a_rank_without_samples_has_nothing_to_normalise():
    assert normalised(np.empty(0), StepMoments.of([1, 2]), PLAIN).shape == (0,)


# T packed tokens


def gae_by_loop(rewards, values, boundaries, valid, gamma, lam):
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    for begin, end in itertools.pairwise(boundaries):
        next_value = next_advantage = 0.0
        for t in reversed(range(begin, end)):
            if valid[t]:
                delta = rewards[t] + gamma * next_value - values[t]
                next_advantage = advantages[t] = delta + gamma * lam * next_advantage
                next_value = values[t]
                returns[t] = advantages[t] + values[t]
    return advantages, returns


def packed(lengths: list[int], beyond: int, seed: int, dtype: torch.dtype = torch.float64):
    random = np.random.default_rng(seed)
    boundaries = np.cumsum([0, *lengths]).tolist()
    tokens = boundaries[-1] + beyond
    rewards, values = torch.tensor(random.normal(size=(2, tokens)), dtype=dtype)
    valid = torch.tensor(random.random(tokens) < 0.8)
    valid[boundaries[-1] :] = False
    return rewards, values, torch.tensor(boundaries, dtype=torch.int32), valid


def test_gae_by_hand():
    # gamma 1, lam .5; delta 0 + .5 - .5 = 0 and 1 - .5 = .5; A = 0 + .5 x .5, .5; returns A + V
    advantages, returns = gae(
        torch.tensor([0.0, 1.0]),
        torch.tensor([0.5, 0.5]),
        torch.tensor([0, 2]),
        torch.tensor([True, True]),
        1.0,
        0.5,
    )
    assert advantages.tolist() == [0.25, 0.5]
    assert returns.tolist() == [0.75, 1.0]


def test_gae_skips_masked_tokens_and_stays_inside_sequences():
    # Two sequences; in the first the middle token is masked, with nonsense in it. gamma .5, lam 1:
    # first: delta_2 = 1 - 2 = -1; delta_0 = 0 + .5 x 2 - 4 = -3, A_0 = -3 + .5 x -1 = -3.5; second: 3 - 1 = 2
    nan = float("nan")
    advantages, returns = gae(
        torch.tensor([0.0, nan, 1.0, 3.0]),
        torch.tensor([4.0, nan, 2.0, 1.0]),
        torch.tensor([0, 3, 4]),
        torch.tensor([True, False, True, True]),
        0.5,
        1.0,
    )
    assert advantages.tolist() == [-3.5, 0.0, -1.0, 2.0]
    assert returns.tolist() == [0.5, 0.0, 1.0, 3.0]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize(
    ("lengths", "beyond"),
    [([3, 1, 5], 0), ([0, 7, 0, 2], 3), ([150, 64, 65, 1], 10), ([5000, 20], 0), ([], 4)],
)
def test_gae_is_the_loop(lengths, beyond, gamma, lam):
    rewards, values, cu_seqlens, valid = packed(lengths, beyond, seed=len(lengths))
    advantages, returns = gae(rewards, values, cu_seqlens, valid, gamma, lam)
    wanted = gae_by_loop(rewards.tolist(), values.tolist(), cu_seqlens.tolist(), valid.tolist(), gamma, lam)
    assert advantages.tolist() == pytest.approx(wanted[0], abs=1e-10)
    assert returns.tolist() == pytest.approx(wanted[1], abs=1e-10)


def test_gae_in_float32_follows_float64():
    exact = gae(*packed([200, 30], 0, seed=1), 1.0, 0.95)
    single = gae(*packed([200, 30], 0, seed=1, dtype=torch.float32), 1.0, 0.95)
    for one, other in zip(single, exact, strict=True):
        assert one.dtype == torch.float32
        assert torch.allclose(one.double(), other, atol=1e-4)


def test_lambda_1_gives_the_discounted_reward_to_come_and_lambda_0_the_temporal_difference():
    rewards, values, cu_seqlens, _ = packed([6], 0, seed=2)
    every = torch.ones(6, dtype=torch.bool)
    _, returns = gae(rewards, values, cu_seqlens, every, 0.9, 1.0)
    to_come = [sum(0.9 ** (k - t) * rewards[k].item() for k in range(t, 6)) for t in range(6)]
    assert returns.tolist() == pytest.approx(to_come, abs=1e-12)
    advantages, _ = gae(rewards, values, cu_seqlens, every, 0.9, 0.0)
    following = torch.cat([values[1:], values.new_zeros(1)])
    assert torch.allclose(advantages, rewards + 0.9 * following - values, atol=1e-12)


def test_gae_gives_constants():
    rewards, values, cu_seqlens, valid = packed([6], 0, seed=3)
    advantages, returns = gae(rewards, values.requires_grad_(), cu_seqlens, valid, 1.0, 0.95)
    assert not advantages.requires_grad and not returns.requires_grad
