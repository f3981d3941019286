"""Rule rewards and their weighted sum: what counts as right, and whose mistake the rest is."""

from __future__ import annotations

import logging
from decimal import Decimal

import pytest

from grpo_mega.data.sources import open_source
from grpo_mega.errors import UserError
from grpo_mega.recipe.blocks import DataBlock
from grpo_mega.recipe.reward_blocks import RewardItem, RuleReward
from grpo_mega.reward.assembly import RewardAssembly
from grpo_mega.reward.rule import RuleScorer, last_number
from grpo_mega.types import FinishReason, Group, Prompt, Sample


def prompt_with(answer, meta=None):
    return Prompt(uid="train-7", index=7, text="?", token_ids=(5,), answer=answer, meta=meta or {})


def sample_of(text, rollout=0, finish_reason: FinishReason = "stop"):
    return Sample(f"train-7/{rollout}", rollout, (5,), (-0.1,), text, finish_reason)


def value(response, answer, **rule):
    return RuleScorer(RuleReward(**rule), "r").score(prompt_with(answer), sample_of(response)).value


@pytest.mark.parametrize(
    ("response", "answer", "rule", "expected"),
    [
        ("12", "12", {}, 1),
        (" 12\n", "12 ", {}, 1),
        (" 12", "12", {"strip": False}, 0),
        ("123", "12", {}, 0),
        ("", "12", {}, 0),
        ("Yes", "yes", {}, 0),
        ("Yes", "yes", {"ignore_case": True}, 1),
        ("it is Yes.", "yes", {"kind": "contains", "ignore_case": True}, 1),
        ("it is no.", "yes", {"kind": "contains"}, 0),
        ("so 3, no, 1,234.50 apples", "1234.5", {"kind": "number"}, 1),
        ("5-3", "-3", {"kind": "number"}, 0),
        ("12 then 7", "#### 12", {"kind": "number"}, 0),
        ("none", "12", {"kind": "number"}, 0),
        ("<a>12</a>", "12", {"kind": "regex", "pattern": r"^<a>{answer}</a>$"}, 1),
        (
            "1+2",
            "1.2",
            {"kind": "regex", "pattern": "{answer}"},
            0,
        ),  # the answer is a text, not an expression
        ("7 12 12", "12", {"kind": "regex", "pattern": "^7( |{answer})+$"}, 1),
        ("x12", "12", {"kind": "regex", "pattern": "^x|^{answer}?$"}, 1),
        ("DONE", "", {"kind": "regex", "pattern": "done", "ignore_case": True}, 1),
        ("<a>3</a> no <a> 12 </a> or 4", "12", {"extract": "<a>(.*?)</a>"}, 1),  # the last match, stripped
        ("12", "12", {"extract": "<a>(.*?)</a>"}, 0),
    ],
)
def test_rules(response, answer, rule, expected):
    assert value(response, answer, **rule) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234,567", "1234567"),
        ("1,23", "23"),
        ("(2)-3", "3"),
        ("= -3", "-3"),
        ("x=-.5", "-0.5"),
        ("1.5e3", "1500"),
        ("3.", "3"),
        ("v1.2.3", "0.3"),
        ("2.50", "2.5"),
    ],
)
def test_last_numbers(text, number):
    assert last_number(text) == Decimal(number)


def test_numbers_are_compared_exactly():
    assert value("0.30000000000000004", "0.3", kind="number") == 0


@pytest.mark.parametrize(
    "rule", [{}, {"kind": "contains"}, {"kind": "number"}, {"kind": "regex", "pattern": "{answer}"}]
)
def test_a_missing_answer_is_the_datas_mistake(rule):
    # "" is inside every response: scored silently, it would reward anything.
    with pytest.raises(UserError, match="train-7") as caught:
        value("x", " ", **rule)
    assert "data.answer_key" in str(caught.value.remedy)


def test_an_answer_without_a_number_scores_0_and_says_so_once(caplog):
    scorer = RuleScorer(RuleReward(kind="number"), "r")
    with caplog.at_level(logging.WARNING):
        results = [scorer.score(prompt_with("x+y"), sample_of("x+y")).value for _ in range(3)]
    assert results == [0, 0, 0] and len(caplog.records) == 1 and "train-7" in caplog.text


@pytest.mark.parametrize(
    ("rule", "key"),
    [
        ({"extract": "x"}, "extract"),
        ({"extract": "("}, "extract"),
        ({"kind": "regex", "pattern": "["}, "pattern"),
    ],
)
def test_bad_expressions_are_refused_before_the_run(rule, key):
    with pytest.raises(UserError) as caught:
        RuleScorer(RuleReward(**rule), "r")
    assert caught.value.where == f"reward.rule.{key}"


def test_reasoning_gym_is_asked_for_its_own_score():
    # chain_sum's scorer takes "5.0" for 5, which kind exact does not.
    block = DataBlock(source="reasoning_gym", task="chain_sum", train=50)
    problem = open_source(block, "train", seed=0).problem(3)
    prompt = prompt_with(problem.answer, problem.meta)
    scorer = RuleScorer(RuleReward(kind="reasoning_gym"), "r")
    assert scorer.score(prompt, sample_of(f"{int(problem.answer)}.0")).value == 1
    wrong = scorer.score(prompt, sample_of(str(int(problem.answer) + 1)))
    assert wrong.value < 0.1 and wrong.pass_rate == wrong.value
    with pytest.raises(UserError, match=r"data\.source"):
        scorer.score(prompt_with("5"), sample_of("5"))


def test_a_reasoning_gym_scorer_that_fails_gives_0(caplog):
    # prime_factorization's scorer calls int() on whatever stands between the signs.
    block = DataBlock(source="reasoning_gym", task="prime_factorization", train=50)
    problem = open_source(block, "train", seed=0).problem(0)
    scorer = RuleScorer(RuleReward(kind="reasoning_gym"), "r")
    assert scorer.score(prompt_with(problem.answer, problem.meta), sample_of("two by three")).value == 0
    assert "prime_factorization" in caplog.text


def test_components_are_weighted_and_named():
    items = [
        RewardItem(rule=RuleReward(kind="exact"), weight=1.0),
        RewardItem(rule=RuleReward(kind="contains"), weight=0.25),
        RewardItem(rule=RuleReward(kind="exact", ignore_case=True), weight=-2.0),
    ]
    samples = (sample_of("ab"), sample_of("AB", 1), sample_of("xab", 2, "length"))
    groups = [Group(prompt_with("ab"), samples), Group(prompt_with("xab"), samples[2:])]
    first, second = RewardAssembly(items).score_groups(groups)
    # "ab": 1 + .25 - 2;  "AB": 0 + 0 - 2;  "xab": 0 + .25 + 0
    assert [score.total for score in first] == [-0.75, -2.0, 0.25]
    assert first[1].components == {"exact": 0.0, "contains": 0.0, "exact_2": 1.0}
    assert [score.pass_rate for score in first] == [1.0, 0.0, 0.0]  # of the first component alone
    assert [score.total for score in second] == [-0.75]  # cut off by its length, scored like any other
