"""A wrong recipe is refused in plain words that name the key, its line, the law and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mega.errors import UserError
from grpo_mega.recipe import load_recipe

BASE = "model:\n  scratch: {heads: 6, kv_heads: 3, hidden: 96}\ndata: {task: sort}\n"  # three lines


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(extra: str, *overrides: str) -> UserError:
    Path("r.yaml").write_text(BASE + extra, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_recipe("r.yaml", overrides)
    return caught.value


@pytest.mark.parametrize(
    ("extra", "where", "remedy"),
    [
        ("train:\n  stepz: 3\n", "r.yaml:5 (train.stepz)", "did you mean train.steps?"),
        ("train: {group_size: 8}\n", "r.yaml:4 (train.group_size)", "group_size belongs to rollout"),
        ("rolout: {}\n", "r.yaml:4 (rolout)", "did you mean rollout?"),
        ("group_size: 8\n", "r.yaml:4 (group_size)", "rollout.group_size"),
        (
            "stages: [{grpo: {stepz: 1}}]\n",
            "r.yaml:4 (stages.0.grpo.stepz)",
            "did you mean stages.0.grpo.steps?",
        ),
    ],
)
def test_an_unknown_key_gets_a_suggestion(extra: str, where: str, remedy: str) -> None:
    error = refusal(extra)
    assert error.what.startswith("unknown key")
    assert error.where == where
    assert remedy in str(error.remedy)


@pytest.mark.parametrize(
    ("extra", "what", "law"),
    [
        ("train: {steps: soon}\n", "train.steps = 'soon'", "a whole number of at least 0 or null"),
        ("train: {steps: 2.5}\n", "train.steps = 2.5", "a whole number"),
        ("train: {steps: true}\n", "train.steps = true", "a whole number"),
        ("rollout: {group_size: 0}\n", "rollout.group_size = 0", "a whole number of at least 1"),
        ("rollout: {top_p: 1.5}\n", "rollout.top_p = 1.5", "a number above 0 and at most 1"),
        ("train: {lr: .inf}\n", "train.lr = inf", "a number above 0"),
        ("train: {lr: .nan}\n", "train.lr = nan", "a number above 0"),
        ("train: {adam_betas: [.9]}\n", "train.adam_betas = a list", "a list of 2"),
        ("stages: []\n", "stages = a list", "at least 1"),
        ("loss: 3\n", "loss = 3", "a block of keys"),
        ("eval:\n", "eval = null", "a block of keys"),
        ("loss: {aggregate: mean}\n", "loss.aggregate = 'mean'", "one of token-mean, seq-mean-token-sum"),
    ],
)
def test_a_wrong_value_is_told_what_would_be_right(extra: str, what: str, law: str) -> None:
    error = refusal(extra)
    assert error.what == f"{what} cannot be used"
    assert str(error.where).startswith("r.yaml:4 (")
    assert law in str(error.law)
    assert "pydantic" not in str(error) and "Input should" not in str(error)


def test_a_value_of_several_types_is_one_problem() -> None:
    Path("r.yaml").write_text("model: {scratch: {}}\ndata: {task: sort, train: -1}\n")
    with pytest.raises(UserError) as caught:
        load_recipe("r.yaml")
    assert caught.value.what == "data.train = -1 cannot be used"
    assert caught.value.law == "it must be a path or a whole number of at least 1 or null"


@pytest.mark.parametrize(
    ("extra", "remedy"),
    [
        ("eval: {at_start: yes}\n", "write true or false"),
        ("train: {lr: '3'}\n", "without quotes"),
        ("train: {schedule: cosin}\n", "did you mean cosine?"),
        ("train: {warmup_steps: -1}\n", "the default is 5"),
    ],
)
def test_common_slips_get_their_own_remedy(extra: str, remedy: str) -> None:
    assert remedy in str(refusal(extra).remedy)


def test_a_broken_law_points_at_the_keys_it_names() -> None:
    error = refusal("parallel:\n  dp: 2\n  tp: 4\n")
    assert error.law == "model.scratch.heads (6) and kv_heads (3) must be multiples of parallel.tp (4)"
    assert error.where == (
        "r.yaml:2 (model.scratch.heads), r.yaml:2 (model.scratch.kv_heads), r.yaml:6 (parallel.tp)"
    )


def test_a_law_of_one_block_points_at_its_keys() -> None:
    error = refusal("parallel:\n  vpp: 2\n")
    assert error.where == "r.yaml:5 (parallel.vpp)"
    assert "needs pp > 1" in str(error.law)


def test_a_law_broken_by_an_override_points_at_the_command_line() -> None:
    error = refusal("", "parallel.tp=4")
    assert "command line (parallel.tp)" in str(error.where)


def test_a_recipe_without_a_model_says_so() -> None:
    Path("r.yaml").write_text("data: {task: sort}\n")
    with pytest.raises(UserError, match="the recipe has no model") as caught:
        load_recipe("r.yaml")
    assert "hf, scratch" in str(caught.value.remedy)


def test_all_problems_are_listed_at_once() -> None:
    error = refusal("train: {lr: fast, stepz: 3}\nrollout:\n  group_size: 0\n")
    assert error.what.startswith("3 problems in r.yaml:")
    for text in ("r.yaml:4 (train.lr)", "r.yaml:4 (train.stepz)", "r.yaml:6 (rollout.group_size)"):
        assert text in str(error)
