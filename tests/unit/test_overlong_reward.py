"""The penalty of long responses: by hand, and as a part of a run's reward."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from grpo_mega.recipe.reward_blocks import OverlongReward, RewardItem, RuleReward
from grpo_mega.recipe.schema import Recipe
from grpo_mega.reward.assembly import RewardAssembly
from grpo_mega.types import Group, Prompt, Sample
from tests import tiny

PROMPT = Prompt("train-0", 0, "", (1,), "x")


def group_of(*lengths: int) -> Group:
    samples = (Sample(f"train-0/{i}", i, (5,) * n, (0.0,) * n, "x", "stop") for i, n in enumerate(lengths))
    return Group(PROMPT, tuple(samples))


def test_it_falls_from_0_to_minus_1_over_the_buffer():
    """Longest 16, buffer 4: (12 - n) / 4 from 12 on."""
    rewards = RewardAssembly([RewardItem(overlong=OverlongReward(buffer=4))], longest=16)
    (scores,) = rewards.score_groups([group_of(1, 12, 13, 14, 16)])
    assert [score.total for score in scores] == [0.0, 0.0, -0.25, -0.5, -1.0]


def test_it_is_one_reward_of_several_and_says_nothing_of_success():
    items = [
        RewardItem(rule=RuleReward()),
        RewardItem(overlong=OverlongReward(buffer=8), weight=0.5),
    ]
    ((score,),) = RewardAssembly(items, longest=8).score_groups([group_of(4)])
    assert score.components == {"exact": 1.0, "overlong": -0.5}
    assert (score.total, score.pass_rate) == (0.75, 1.0)


def test_a_buffer_is_no_longer_than_a_response(tmp_path):
    recipe = tiny.recipe_dict(tmp_path, reward=[{"overlong": {"buffer": 7}}])
    with pytest.raises(ValidationError, match=r"buffer \(7\) must not be longer than a response.*\(6\)"):
        Recipe.model_validate(recipe)
