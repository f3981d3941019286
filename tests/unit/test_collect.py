"""What becomes of samples that were cut, by hand, and how old tokens are counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from grpo_mega.collect import Rollouts, counted_and_trained, step_advantages, to_train_sequences
from grpo_mega.draw import age_metrics, teaches
from grpo_mega.monitor.metrics import reduce
from grpo_mega.recipe.blocks import AdvantageBlock
from grpo_mega.rollout.replay import Origin
from grpo_mega.types import Group, Prompt, Sample, Score, ScoredGroup

ORIGIN = Origin(seed=0, stage_index=0, step=0, prompts_per_step=8, group_size=3)
PROMPT = Prompt("train-0", 0, "", (1, 2), "x")


def group_of(*cut: bool, versions: Sequence[tuple[int, ...]] = ()) -> Group:
    reasons = ["length" if is_cut else "stop" for is_cut in cut]
    of = versions or [()] * len(cut)
    samples = (
        Sample(f"train-0/{i}", i, (5, 6), (-0.5, -0.25), "x", reasons[i], versions=of[i])
        for i in range(len(cut))
    )
    return Group(PROMPT, tuple(samples))


def scores_of(*totals: float) -> tuple[Score, ...]:
    return tuple(Score(total, {}, total) for total in totals)


@pytest.mark.parametrize(
    "truncated, advantages",
    [
        # rewards 1 0 0 | the last one was cut; without division by the spread
        ("keep", [2 / 3, -1 / 3, -1 / 3]),  # mean 1/3
        ("mask", [2 / 3, -1 / 3]),  # the same mean; the last one is not trained on
        ("drop", [1 / 2, -1 / 2]),  # mean of the first two
    ],
)
def test_cut_samples_by_the_recipes_word(truncated, advantages):
    group, scores = group_of(False, False, True), scores_of(1, 0, 0)
    counted, trained = counted_and_trained(group, truncated)
    block = AdvantageBlock(normalize_std=False)
    values = step_advantages([scores], [counted], block)
    sequences = to_train_sequences(Rollouts(ORIGIN, [7], [group]), [scores], values, [trained])
    assert [sequence.advantage for sequence in sequences] == pytest.approx(advantages)
    assert [sequence.reward for sequence in sequences] == [1, 0, 0][: len(advantages)]
    assert [sequence.order for sequence in sequences] == [21, 22, 23][: len(advantages)]
    assert [sequence.uid for sequence in sequences] == ["train-0/0", "train-0/1", "train-0/2"][
        : len(advantages)
    ]


@pytest.mark.parametrize(
    "cut, rewards, keep, mask, drop",
    [
        ((False, False), (1, 0), True, True, True),
        ((False, False), (1, 1), False, False, False),
        ((True, True), (1, 0), True, False, False),  # none is left to train on
        ((False, True), (1, 0), True, True, False),  # one alone has nothing to be compared with
        ((False, False, True), (1, 1, 0), True, True, False),  # only the one that was cut differs
    ],
)
def test_what_teaches_depends_on_cut_samples(cut, rewards, keep, mask, drop):
    scored = ScoredGroup(0, group_of(*cut), scores_of(*rewards))
    assert [teaches(scored, how) for how in ("keep", "mask", "drop")] == [keep, mask, drop]


def test_a_group_of_which_one_is_left_is_not_trained_on():
    counted, trained = counted_and_trained(group_of(True, False, True), "drop")
    assert not counted.any() and not trained.any()
    (values,) = step_advantages([scores_of(1, 0, 0)], [counted], AdvantageBlock(estimator="rloo"))
    assert np.array_equal(values, np.zeros(3))


def test_ages_are_of_tokens_and_parts_of_samples():
    """Updates 9, tokens of 9 9 | 9 8 | 6 6: 0 0 0 1 3 3 behind; one sample of three spans an update."""
    group = group_of(False, False, True, versions=((9, 9), (9, 8), (6, 6)))
    found = reduce(age_metrics([group], updates=9))
    assert found == {
        "rollout/staleness_mean": pytest.approx(7 / 6),
        "rollout/staleness_max": 3,
        "rollout/partial_fraction": pytest.approx(1 / 3),
    }
