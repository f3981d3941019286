"""Every recipe in the repository loads, explains itself, and says only what differs from what it inherits."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import jsonschema
import pytest

from grpo_mega.plan import ModelShape, make_plan
from grpo_mega.recipe import Recipe, load_recipe
from grpo_mega.recipe.json_schema import main as json_schema_command
from grpo_mega.recipe.load import inherited_by
from grpo_mega.recipe.tree import KeyPath, MapNode, Node, dotted, find, to_plain
from grpo_mega.recipe.yaml_positions import read_tree

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
SCHEMA = RECIPES / "recipe.schema.json"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in RECIPES.rglob("*.yaml"))

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
    # A tenth is left for activations, which are recomputed where a recipe is tight.
    assert max(stage.memory.total for stage in plan.stages) < 0.9 * gpu_gigabytes * GIGABYTE
    assert not plan.notes
    assert f"{gpu_gigabytes} GB" in Path(f"recipes/{file}.yaml").read_text() or file == "knights_knaves"


def test_the_model_directory_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "MODEL_DIR", "/models/other")
    assert load_recipe("recipes/qwen3-8b.yaml").recipe.model.hf == "/models/other"
