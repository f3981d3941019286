"""The format reward: each rule by itself, their sum and its clip."""

from __future__ import annotations

import time

import pytest

from grpo_mega.errors import UserError
from grpo_mega.recipe.reward_blocks import FormatReward, RewardItem
from grpo_mega.reward.assembly import RewardAssembly
from grpo_mega.reward.format import RULES, FormatScorer, find_json, main_script, repeated_ngrams
from grpo_mega.types import Group, Prompt, Sample

REFERENCE = '{"answer": "a short text", "reason": "it is so"}'


def result(text, reference=REFERENCE, **options):
    prompt = Prompt("train-7", 7, "?", (5,), answer="", teacher_response=reference)
    block = FormatReward(**({"keys": ("answer", "reason")} | options))
    return FormatScorer(block, "format").score(prompt, Sample("train-7/0", 0, (5,), (-0.1,), text, "stop"))


def rules_of(text, **options):
    return {rule: part for rule, part in result(text, **options).parts.items() if part}


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        (REFERENCE, {"correct": 0.05}),
        (f"  {REFERENCE}\n", {"correct": 0.05}),
        (f"```json\n{REFERENCE}\n```", {"correct": 0.05}),
        (f"Well: {REFERENCE}", {"correct": 0.05}),  # 5 characters
        (f"Well.: {REFERENCE}", {"prefix": -0.3}),
        ("it is a short text because so", {"json_missing": -0.5}),
        ('{"answer": "a short text", "reason": "it', {"json_incomplete": -0.3}),
        ('{"answer": "a } text", "reason": ["it"', {"json_incomplete": -0.3}),
        ('{"answer": a short text, "reason": 3}', {"json_invalid": -0.25}),
        ('{"answer": "a short text", "other": "x"}', {"keys_missing": -0.2}),
        ('So it is {"answer": "a", "other": "x"}', {"keys_missing": -0.2, "prefix": -0.3}),
        (f"<think>{REFERENCE}", {"thinking_leak": -0.4, "prefix": -0.3}),
        (f"{REFERENCE} </thinking>", {"correct": 0.05, "thinking_leak": -0.4}),
        (
            '{"answer": "короткий текст", "reason": ""}',
            {"correct": 0.05, "mixed_language": -0.4, "foreign_values": -0.35},
        ),
        (
            '{"answer": "简短的文字", "reason": "a"}',
            {"correct": 0.05, "mixed_language": -0.4, "foreign_values": -0.35},
        ),
        ('{"answer": "a short text 是", "reason": "b"}', {"correct": 0.05}),  # one letter of many
        ("{" * 20001, {"json_incomplete": -0.3, "repeated_run": -0.5, "too_long": -0.6}),
        (
            '{"answer": ' + "9" * 6000 + ', "reason": 1}',
            {"json_invalid": -0.25, "repeated_run": -0.5, "too_long": -0.6},
        ),
    ],
)
def test_json_and_language(text, rules):
    assert rules_of(text) == pytest.approx(rules)


def test_without_json():
    assert rules_of("it is a short text because so", expect_json=False) == {}
    assert rules_of(REFERENCE, expect_json=False) == {}


def test_the_language_wanted_can_be_named():
    text = '{"答案": "简短的文字", "原因": "好"}'
    assert rules_of(text, keys=(), reference="", script="latin") == {"correct": 0.05, "foreign_values": -0.35}
    assert rules_of(text, keys=(), reference="", script="cjk") == {"correct": 0.05}
    assert rules_of(text, keys=(), reference="") == {"correct": 0.05}


def test_repeated_runs():
    plain = {"expect_json": False, "reference": "", "ngram_share": 0.9}
    assert rules_of("ab: " + "0123456789" * 3, **plain) == {"repeated_run": -0.5}
    assert rules_of("ab: " + "0123456789" * 2 + "!", **plain) == {}
    assert rules_of("ab: " + "012345678" * 3 + "!", **plain) == {}
    assert rules_of("a" + " " * 200 + "b", **plain) == {}  # indentation is no text
    assert rules_of("ab: " + "01234" * 3 + "!", run_characters=5, **plain) == {"repeated_run": -0.5}


def test_repeated_ngrams():
    """a b c d e f g h a b c d: 9 4-grams, 8 of them distinct."""
    assert repeated_ngrams("a b c d e f g h a b c d", 4) == pytest.approx(1 / 9)
    assert repeated_ngrams("a b c", 4) == 0
    assert repeated_ngrams("好" * 8, 4) == pytest.approx(4 / 5)  # by the character where words have no spaces
    # x 8 times: 5 4-grams, 1 distinct: share .8, excess (.8 - .35) / .65, of -.4
    found = result("x x x x x x x x", reference="", expect_json=False, run_characters=50)
    assert found.parts["repeated_ngrams"] == pytest.approx(-0.4 * 0.45 / 0.65)


def test_output_given_twice():
    twice = {"output_twice": -0.35}
    plain = {"expect_json": False, "reference": ""}
    assert rules_of("it is so, it is so,", **plain) == twice
    assert rules_of("it is so\n\nit is so", **plain) == twice
    assert rules_of("it is so, is it so?", **plain) == {}
    spaced = REFERENCE.replace(":", ": ")
    plain = {"reference": "", "ngram_share": 0.9}
    assert rules_of(f"{REFERENCE} or {spaced}", **plain) == {"correct": 0.05} | twice
    assert rules_of(f'{REFERENCE} or {{"answer": 1}}', **plain) == {"correct": 0.05}


@pytest.mark.parametrize(
    ("characters", "rules"),
    [
        (29, {"too_short": -0.3}),
        (30, {}),
        (150, {}),
        (225, {"too_long": -0.3}),  # half-way from 1.5 to 3 times
        (300, {"too_long": -0.6}),
        (900, {"too_long": -0.6}),
    ],
)
def test_length_against_the_reference(characters, rules):
    text = "".join(chr(0x2200 + n) for n in range(characters))  # no letters, no repetition
    assert rules_of(text, reference="r" * 100, expect_json=False) == pytest.approx(rules)


def test_the_sum_is_clipped_and_says_nothing_of_success():
    bad = "<think> Смысл: " + "so it goes on " * 30
    found = result(bad)
    assert sum(found.parts.values()) < -1.5 and found.value == -1.5
    assert found.pass_rate is None and tuple(found.parts) == RULES
    assert result(REFERENCE, correct=0.5).value == 0.1


def test_the_answer_is_the_reference_where_no_teacher_wrote_one():
    prompt = Prompt("train-7", 7, "?", (5,), answer="x" * 100)
    scorer = FormatScorer(FormatReward(expect_json=False), "format")
    assert scorer.score(prompt, Sample("u", 0, (5,), (-0.1,), "short", "stop")).value == -0.3


def test_no_response_takes_long():
    started = time.monotonic()
    for text in ("ab" * 20000, "{" * 40000, "a " * 20000, '{"a":' * 20000, "x" * 40000 + "y", '"\\' * 20000):
        result(text)
    assert time.monotonic() - started < 20


def test_parts_of_json():
    assert find_json('x {"a": {"b": 1}} y').text == '{"a": {"b": 1}}'
    assert find_json('{"a": "\\"}"}').state == "valid"
    assert main_script("абв a") == "cyrillic" and main_script("123") is None


def test_a_pattern_that_is_none_is_the_users_mistake():
    with pytest.raises(UserError, match="not a regular expression"):
        FormatScorer(FormatReward(thinking="("), "format")


@pytest.mark.parametrize("wrong", [{"too_long_full": 1.0}, {"lowest": 1.0}])
def test_laws(wrong):
    with pytest.raises(ValueError, match="must be"):
        FormatReward(**wrong)


def test_every_rule_is_a_component():
    prompt = Prompt("train-7", 7, "?", (5,), answer="", teacher_response=REFERENCE)
    rewards = RewardAssembly([RewardItem(format=FormatReward(), weight=0.3)])
    ((score,),) = rewards.score_groups([Group(prompt, (Sample("u", 0, (5,), (-0.1,), REFERENCE, "stop"),))])
    assert score.total == pytest.approx(0.3 * 0.05)
    assert set(score.components) == {"format", *(f"format/{rule}" for rule in RULES)}


def test_a_reward_is_exactly_one_kind():
    with pytest.raises(ValueError, match="exactly one of rule, math, code, verilog, format"):
        RewardItem(format=FormatReward(), math={})
    with pytest.raises(ValueError, match="exactly one"):
        RewardItem()
