"""The math reward: equal expressions are equal however written, and no response can hang or end the run."""

from __future__ import annotations

import logging
import os
import threading
import time

import pytest

from grpo_mega.errors import UserError
from grpo_mega.recipe.reward_blocks import MathReward, RewardItem
from grpo_mega.reward.assembly import RewardAssembly
from grpo_mega.reward.math import MathScorer
from grpo_mega.types import Group, Prompt, Sample


@pytest.fixture(scope="module")
def scorer():
    scorer = MathScorer(MathReward(timeout_seconds=1.0), "math")
    yield scorer
    scorer.close()


def score(scorer, response, answer):
    prompt = Prompt(uid="train-7", index=7, text="?", token_ids=(5,), answer=answer)
    return scorer.score(prompt, Sample("train-7/0", 0, (5,), (-0.1,), response, "stop"))


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("The answer is 42.", "42", 1),
        ("first 42, then 41", "42", 0),  # the last expression counts
        ("3 so \\boxed{\\frac{1}{2}}, check: 7", "0.5", 1),  # boxed before plain
        ("\\boxed{4}, no: \\boxed{5}", "5", 1),
        ("\\boxed{5}, no: \\boxed{4}", "5", 0),
        ("\\boxed{\\{1, 2\\}}", "\\{2, 1\\}", 1),
        ("$(x+1)^2$", "x^2+2x+1", 1),
        ("1000", "1,000", 1),
        ("6", "$2 \\times 3$", 1),
        ("", "5", 0),
        ("}{\\boxed{\\frac{", "5", 0),
        ("five \n apples \ud83d", "5", 0),
    ],
)
def test_equality(scorer, response, answer, expected):
    result = score(scorer, response, answer)
    assert result.value == expected and result.pass_rate == expected


def test_a_computation_without_end_scores_0_in_time_and_the_next_is_scored(scorer, caplog):
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert score(scorer, "\\boxed{9^{9^{9^{9}}}}", "9").value == 0
    assert time.monotonic() - started < 10
    assert "longer than 1.0 s" in caplog.text
    assert score(scorer, "9", "9").value == 1


def test_it_works_from_many_threads(scorer):
    values = {}
    threads = [
        threading.Thread(
            target=lambda number=number: values.update({number: score(scorer, f"{number}", "3").value})
        )
        for number in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == {number: float(number == 3) for number in range(6)}


def test_a_forked_process_has_a_worker_of_its_own(scorer):
    assert score(scorer, "3", "3").value == 1
    child = os.fork()
    if child == 0:
        right = score(scorer, "5", "5").value == 1 and score(scorer, "6", "5").value == 0
        scorer.close()
        os._exit(0 if right else 1)
    assert [score(scorer, "4", str(answer)).value for answer in (4, 5)] == [1, 0]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_answers_that_are_no_expressions(scorer, caplog):
    with caplog.at_level(logging.WARNING):
        assert [score(scorer, "7", "the value is $").value for _ in range(2)] == [0, 0]
    assert len(caplog.records) == 1 and "train-7" in caplog.text
    with pytest.raises(UserError, match="no answer"):
        score(scorer, "7", "")


def test_it_is_a_component_of_the_sum():
    prompt = Prompt(uid="train-7", index=7, text="?", token_ids=(5,), answer="1/2")
    sample = Sample("train-7/0", 0, (5,), (-0.1,), "\\boxed{0.5}", "length")
    ((result,),) = RewardAssembly([RewardItem(math=MathReward(), weight=2.0)]).score_groups(
        [Group(prompt, (sample,))]
    )
    assert (result.total, dict(result.components), result.pass_rate) == (2.0, {"math": 1.0}, 1.0)
