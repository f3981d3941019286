"""Every recipe in the repository loads, explains itself, and says only what differs from what it inherits."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import jsonschema
import pytest

from grpo_mega.algo.innovations import available
from grpo_mega.plan import ModelShape, make_plan
from grpo_mega.recipe import Recipe, load_recipe
from grpo_mega.recipe.critic_block import PRESETS
from grpo_mega.recipe.json_schema import main as json_schema_command
from grpo_mega.recipe.load import inherited_by
from grpo_mega.recipe.tree import KeyPath, MapNode, Node, dotted, find, to_plain
from grpo_mega.recipe.yaml_positions import read_tree

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
SCHEMA = RECIPES / "recipe.schema.json"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in RECIPES.rglob("*.yaml"))

COMBINATIONS = {
    "conservative": {"ema", "temporal_decay"},
    "balanced": {"ema", "gradient_adaptive", "asymmetric"},
    "aggressive": {"amic", "gradient_adaptive", "ptrw"},
    "all": {"ema", "gradient_adaptive", "temporal_decay", "asymmetric"},
}
SWEEP = {"ema_beta_0.5": 0.5, "ema_beta_0.7": 0.7, "ema": 0.9, "ema_beta_0.95": 0.95, "ema_beta_0.99": 0.99}
AT_THE_RATIO = {"ema", "amic", "gspo", "ptrw", "asymmetric"}
OBJECTIVES = {"clip_higher", "cispo", "gmpo", "dr_grpo", "rloo", "reinforce_plus_plus", "tis", "mis"}

VOCAB = {"vocab": 151936, "rope_theta": 1e6, "max_positions": 40960}
SMALL = ModelShape("qwen2", 24, 896, 14, 2, 64, 4864, tie_embeddings=True, **VOCAB)
DENSE = ModelShape("qwen3", 36, 4096, 32, 8, 128, 12288, tie_embeddings=False, **VOCAB)
EXPERTS = ModelShape(
    "qwen3_moe",
    48,
    2048,
    32,
    4,
    128,
    6144,
    tie_embeddings=False,
    experts=128,
    experts_per_token=8,
    moe_ffn=768,
    **VOCAB,
)
GIGABYTE = 10**9


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("MODEL_DIR", "DATA_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("file", FILES)
def test_loads(file: str) -> None:
    # The base has no model: that is the one thing it needs from outside, besides data for its task.
    overrides = ["model.hf=somewhere", "data.task=sort"] if file == "recipes/base.yaml" else []
    assert isinstance(load_recipe(file, overrides).recipe, Recipe)


@pytest.mark.parametrize("file", FILES)
def test_agrees_with_the_schema_that_editors_use(file: str) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    refused = [error.message for error in validator.iter_errors(to_plain(read_tree(Path(file), file)))]
    assert not refused


@pytest.mark.parametrize("file", FILES)
def test_holds_only_differences(file: str) -> None:
    own = read_tree(Path(file), file)
    inherited = inherited_by(own, file)
    repeated = [
        f"{node.origin} ({dotted(path)})"
        for path, node in _leaves(own, ())
        if (known := find(inherited, path)) is not None and to_plain(known) == to_plain(node)
    ]
    assert not repeated, f"these repeat what is inherited: {repeated}"


def _leaves(node: Node, path: KeyPath) -> list[tuple[KeyPath, Node]]:
    if not isinstance(node, MapNode) or not node.items:
        return [(path, node)]
    return [leaf for key, item in node.items.items() for leaf in _leaves(item, (*path, key))]


@pytest.mark.parametrize("file", FILES)
def test_names_its_schema_and_explains_itself(file: str) -> None:
    first, *rest = Path(file).read_text(encoding="utf-8").splitlines()
    reference = first.removeprefix("# yaml-language-server: $schema=")
    assert reference != first, "the first line tells editors where the schema is"
    assert (Path(file).parent / reference).resolve() == SCHEMA
    header = itertools.takewhile(lambda line: line.startswith("#"), rest)
    assert len(" ".join(header).split()) >= 10, (
        "the header says what the recipe is for and why its numbers are so"
    )


def test_the_schema_in_the_repository_is_in_step() -> None:
    assert json_schema_command(["--check", str(SCHEMA)]) == 0


def test_a_schema_out_of_step_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stale = tmp_path / "recipe.schema.json"
    stale.write_text("{}")
    assert json_schema_command(["--check", str(stale)]) == 1
    assert "--write" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [{"train": {"stepz": 3}}, {"train": {"lr": "fast"}}, {"rollout": {"group_size": 0}}]
)
def test_the_schema_refuses_what_loading_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, json.loads(SCHEMA.read_text()))


def test_the_base_states_the_defaults_as_they_are() -> None:
    """base.yaml documents defaults: one that changed in the code but not there would mislead."""
    said = load_recipe("recipes/base.yaml", ["model.hf=m", "data.task=sort"]).recipe
    assert said == Recipe.model_validate({"model": {"hf": "m"}, "data": {"task": "sort"}})


@pytest.mark.parametrize(
    ("file", "shape", "gpu_gigabytes"),
    [
        ("qwen2.5-0.5b", SMALL, 80),
        ("knights_knaves", SMALL, 80),
        ("qwen3-8b", DENSE, 80),
        ("qwen3-30b-a3b", EXPERTS, 141),
    ],
)
def test_fits_the_gpu_its_header_promises(file: str, shape: ModelShape, gpu_gigabytes: int) -> None:
    plan = make_plan(load_recipe(f"recipes/{file}.yaml").recipe, shape=shape)
    # A tenth is left for what passes: the activations that are counted, and what kernels keep beside them.
    assert max(stage.memory.lasting for stage in plan.stages) < 0.9 * gpu_gigabytes * GIGABYTE
    assert max(stage.memory.total for stage in plan.stages) < 0.95 * gpu_gigabytes * GIGABYTE
    assert not plan.notes
    assert f"{gpu_gigabytes} GB" in Path(f"recipes/{file}.yaml").read_text() or file == "knights_knaves"


def test_the_model_directory_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "MODEL_DIR", "/models/other")
    assert load_recipe("recipes/qwen3-8b.yaml").recipe.model.hf == "/models/other"


def _innovations(name: str) -> dict[str, dict[str, object]]:
    """What a recipe of recipes/innovations picks, with all of its options."""
    return load_recipe(f"recipes/innovations/{name}.yaml").recipe.loss.innovations.model_dump()


def _names(folder: str) -> set[str]:
    return {path.stem for path in (RECIPES / folder).glob("*.yaml")}


@pytest.mark.parametrize("name", available())
def test_an_innovation_has_a_recipe_of_its_own(name: str) -> None:
    assert set(_innovations(name)) == {name}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_combination_holds_what_its_name_stands_for(name: str) -> None:
    defaults = {picked: options for only in available() for picked, options in _innovations(only).items()}
    picked = _innovations(name)
    assert set(picked) == COMBINATIONS[name]
    assert picked == {member: defaults[member] for member in picked}, "as in the recipes of its members"


@pytest.mark.parametrize("name", SWEEP)
def test_a_point_of_the_sweep_has_its_beta(name: str) -> None:
    assert _innovations(name) == {"ema": {"beta": SWEEP[name]}}


@pytest.mark.parametrize("name", sorted({path.stem for path in (RECIPES / "discriminator").glob("*.yaml")}))
def test_a_discriminator_recipe_is_its_base_but_for_the_critics_loss(name: str) -> None:
    """Or two of them could not be compared."""
    base = load_recipe("recipes/discriminator/base.yaml").recipe
    own = load_recipe(f"recipes/discriminator/{name}.yaml").recipe
    assert own.model_copy(update={"run": base.run, "critic": base.critic}) == base
    fixed = {"kind", "lr", "grad_clip", "weight_decay", "head_std", "init", "hf", "audit"}
    assert own.critic.model_dump(include=fixed) == base.critic.model_dump(include=fixed)
    assert own.critic != base.critic or name == "base"


def test_every_preset_of_the_critic_has_a_recipe() -> None:
    assert set(PRESETS) <= _names("discriminator")
    for name in PRESETS:
        assert load_recipe(f"recipes/discriminator/{name}.yaml").recipe.critic.preset == name


def test_lspd_is_a_mode_of_temporal_decay() -> None:
    picked = _innovations("lspd")
    assert set(picked) == {"temporal_decay"} and picked["temporal_decay"]["mode"] == "lspd"


def test_no_recipe_for_the_loss_is_left_without_a_check() -> None:
    assert _names("innovations") == {*available(), *COMBINATIONS, *SWEEP, "lspd"}
    assert _names("objectives") == OBJECTIVES


@pytest.mark.parametrize("name", sorted(_names("innovations")))
def test_what_acts_on_ratios_reuses_its_samples(name: str) -> None:
    """With one update on fresh samples every ratio is 1: there would be nothing to see."""
    recipe = load_recipe(f"recipes/innovations/{name}.yaml").recipe
    acts_on_ratios = bool(AT_THE_RATIO & set(_innovations(name)))
    assert (recipe.train.updates_per_batch, recipe.train.lr) == ((4, 1e-4) if acts_on_ratios else (1, 2e-4))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_an_objective_recipe_is_the_quickstart_but_for_what_it_shows(name: str) -> None:
    base = load_recipe("recipes/quickstart.yaml").recipe
    own = load_recipe(f"recipes/objectives/{name}.yaml").recipe
    assert own.loss != base.loss or own.advantage != base.advantage
    unchanged = {"run": base.run, "loss": base.loss, "advantage": base.advantage, "train": base.train}
    assert own.model_copy(update=unchanged) == base
    reuse = {"updates_per_batch": 4, "lr": base.train.lr / 2}  # half of the rate for four times the updates
    assert own.train in (base.train, base.train.model_copy(update=reuse))


def test_no_two_recipes_write_to_the_same_directory() -> None:
    loaded = [load_recipe(file).recipe.run for file in FILES if file != "recipes/base.yaml"]
    assert len({run.dir for run in loaded}) == len({run.name for run in loaded}) == len(loaded)
