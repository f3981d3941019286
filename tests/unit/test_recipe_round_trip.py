"""Laws of reading, merging and writing, on generated recipes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mega.recipe import Recipe, dump_resolved, load_recipe, render_resolved
from grpo_mega.recipe.render import escape_references
from grpo_mega.recipe.tree import KeyPath, MapNode, Node, find, from_plain, merge, to_plain

# Texts that YAML readers disagree about, and anything else that can be typed.
TEXT = st.one_of(
    st.sampled_from(
        [
            "on",
            "no",
            "1e-4",
            "012",
            "0o7",
            "1:30",
            "~",
            "",
            " a ",
            "a: b",
            "# c",
            "${HOME}",
            "$${X:-y}",
            "[",
            "-",
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
FLOATS = st.floats(min_value=1e-12, max_value=1e12)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-10, 10)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
RECIPES = st.builds(
    lambda **parts: Recipe.model_validate(
        {
            "model": {"scratch": {}} if parts["scratch"] else {"hf": parts["hf"]},
            "data": {"task": "t", "system": parts["system"], "options": parts["options"]},
            "train": {"lr": parts["lr"], "adam_betas": parts["betas"]},
            "rollout": {"stop": parts["stop"]},
            "stages": parts["stages"],
            "loss": {"innovations": parts["innovations"]},
        }
    ),
    scratch=st.booleans(),
    hf=TEXT,
    system=st.none() | TEXT,
    options=st.dictionaries(TEXT, JSON, max_size=3),
    lr=FLOATS,
    betas=st.tuples(FLOATS, FLOATS),
    stop=st.lists(TEXT, max_size=3),
    stages=st.lists(
        st.sampled_from([{"sft": {}}, {"grpo": {"lr": 1e-7}}, {"sft": {"steps": 3}}]), min_size=1, max_size=3
    ),
    innovations=st.fixed_dictionaries(
        {},
        optional={
            "ema": st.none() | st.fixed_dictionaries({"beta": st.floats(1e-6, 1.0)}),
            "gspo": st.none() | st.just({"level": "token"}),
            "sca": st.none() | st.fixed_dictionaries({"markers": st.tuples(TEXT, TEXT, TEXT, TEXT)}),
            "ptrw": st.none() | st.fixed_dictionaries({"sigma": FLOATS, "legacy": st.booleans()}),
            "gradient_adaptive": st.just(False),
        },
    ),
)
KEYS = st.sampled_from(["a", "b", "c"])
TREES = st.recursive(
    st.integers() | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=10,
)
BLOCKS = st.dictionaries(KEYS, TREES, max_size=3)


def _load(text: str, *overrides: str) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides).recipe


@settings(max_examples=60, deadline=None)
@given(RECIPES)
def test_a_resolved_recipe_loads_back_to_itself(recipe: Recipe) -> None:
    assert _load(dump_resolved(recipe)) == recipe


@settings(max_examples=30, deadline=None)
@given(RECIPES)
def test_the_origins_beside_the_values_are_comments(recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(dump_resolved(recipe), encoding="utf-8")
        loaded = load_recipe(path)
    assert _load(render_resolved(loaded)) == recipe
    assert "default" not in loaded.origins.values()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["data.system", "model.hf", "run.name"]), TEXT)
def test_an_override_sets_what_it_says(key: str, text: str) -> None:
    quoted = yaml.safe_dump(escape_references(text), default_style='"', width=10**6).strip()
    recipe = _load("model: {hf: m}\ndata: {task: t}\n", f"{key}={quoted}")
    block, field = key.split(".")
    assert getattr(getattr(recipe, block), field) == text


@given(BLOCKS, BLOCKS)
def test_a_merge_keeps_all_of_the_child_and_the_rest_of_the_base(
    base: dict[str, object], child: dict[str, object]
) -> None:
    below, above = from_plain(base, "base:1"), from_plain(child, "child:1")
    merged = merge(below, above)
    for path, node in _leaves(above, ()) if child else []:
        assert find(merged, path) == node
    for path, node in _leaves(below, ()):
        beginnings = [path[:length] for length in range(1, len(path) + 1)]
        if find(above, path) is None and not any(_is_leaf(find(above, start)) for start in beginnings):
            assert find(merged, path) == node


@given(BLOCKS)
def test_merging_nothing_or_itself_changes_nothing(block: dict[str, object]) -> None:
    tree = from_plain(block, "base:1")
    assert to_plain(merge(tree, MapNode({}, "child:1"))) == block
    assert to_plain(merge(tree, tree)) == block


def _is_leaf(node: Node | None) -> bool:
    return node is not None and not (isinstance(node, MapNode) and node.items)


def _leaves(node: Node, path: KeyPath) -> list[tuple[KeyPath, Node]]:
    if _is_leaf(node):
        return [(path, node)]
    assert isinstance(node, MapNode)
    return [leaf for key, item in node.items.items() for leaf in _leaves(item, (*path, key))]
