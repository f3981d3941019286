"""`key=value` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mega.errors import UserError
from grpo_mega.recipe import LoadedRecipe, load_recipe

FILE = """\
model: {scratch: {layers: 2}}
data: {task: sort}
stages: [{sft: {steps: 5}}, {grpo: {steps: 6}}]
loss: {innovations: {ema: null}}
"""


@pytest.fixture(autouse=True)
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(FILE)
    Path("bare.yaml").write_text("model: {scratch: {}}\ndata: {task: sort}\n")


def load(*overrides: str, file: str = "r.yaml") -> LoadedRecipe:
    return load_recipe(file, overrides)


def test_values_are_yaml() -> None:
    recipe = load("train.lr=3e-6", "data.system='a: b=c'", "eval.pass_at=[1, 4]", "train.steps=null").recipe
    assert (recipe.train.lr, recipe.data.system, recipe.eval.pass_at) == (3e-6, "a: b=c", (1, 4))
    assert load("eval.at_start=false").recipe.eval.at_start is False


def test_the_origin_is_the_command_line_for_that_key_alone() -> None:
    loaded = load("train.lr=1.0")
    assert loaded.origins["train.lr"] == "command line"
    assert loaded.origins["train.steps"] == "default"
    assert loaded.origins["model.scratch.layers"] == "r.yaml:1"


def test_the_last_one_wins() -> None:
    assert load("seed=1", "seed=2").recipe.seed == 2


@pytest.mark.parametrize("key", ["stages.1.grpo.steps", "stages.grpo.steps"])
def test_a_stage_is_chosen_by_index_or_by_kind(key: str) -> None:
    stages = load(f"{key}=9").recipe.stages
    assert stages[0].sft is not None and stages[0].sft.steps == 5
    assert stages[1].grpo is not None and stages[1].grpo.steps == 9


def test_lists_that_no_file_mentions_can_be_indexed() -> None:
    recipe = load(
        "stages.grpo.steps=9", "reward.0.rule.kind=number", "train.adam_betas.1=.95", file="bare.yaml"
    ).recipe
    assert recipe.stages[0].grpo is not None and recipe.stages[0].grpo.steps == 9
    assert recipe.reward[0].rule is not None and recipe.reward[0].rule.kind == "number"
    assert recipe.train.adam_betas == (0.9, 0.95)


def test_null_gives_way_to_what_is_set_below_it() -> None:
    recipe = load("loss.innovations.ema.beta=.95", "loss.objective.clip.high=.28").recipe
    assert recipe.loss.innovations.model_dump() == {"ema": {"beta": 0.95}}
    assert recipe.loss.objective is not None and recipe.loss.objective.clip is not None
    assert recipe.loss.objective.clip.high == 0.28


def test_a_whole_block_is_replaced() -> None:
    assert load("loss.innovations={}").recipe.loss.innovations.model_dump() == {}
    assert set(load("loss.innovations={sca: {}}").recipe.loss.innovations.model_dump()) == {"sca"}


def test_an_alternative_replaces_the_one_in_the_file() -> None:
    model = load("model.hf=there").recipe.model
    assert (model.hf, model.scratch) == ("there", None)


def test_two_alternatives_on_one_command_line_contradict_each_other() -> None:
    for pair in (("model.hf=a", "model.scratch.layers=3"), ("model.scratch.layers=3", "model.hf=a")):
        with pytest.raises(UserError) as caught:
            load(*pair)
        assert "exactly one" in str(caught.value.law)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("train.steps", "has no '='"),
        ("=3", "not a dotted key"),
        ("train..steps=3", "not a dotted key"),
        ("train.steps=", "no value"),
        ("train.steps=[1", "not valid YAML"),
        ("run.name.first=x", "run.name = a block of keys"),
        ("model.scratch.layers.x=1", "single value"),
        ("stages.5.sft.steps=1", "no entry 5"),
        ("stages.dpo.steps=1", "no entries of stages hold dpo"),
        ("defaults=other.yaml", "defaults"),
        ("train.stepz=1", "unknown key train.stepz"),
    ],
)
def test_a_malformed_override_is_refused_with_its_text(override: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        load(override)
    assert what in caught.value.what
    assert "command line" in str(caught.value.where)


def test_a_kind_that_two_entries_hold_needs_an_index() -> None:
    with pytest.raises(UserError, match="2 entries of stages hold grpo"):
        load("stages=[{grpo: {}}, {grpo: {}}]", "stages.grpo.steps=1")
