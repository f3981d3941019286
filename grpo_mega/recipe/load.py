"""From a file and overrides to a typed recipe that knows where each of its values comes from.

    files (`defaults:` first) -> overrides -> ${ENVIRONMENT} -> types and laws

Relative paths inside a recipe stay as written: they start at the working directory of the run. Only those in
`defaults:` start at the file they stand in.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from pydantic import ValidationError

from grpo_mega.errors import UserError
from grpo_mega.recipe.messages import recipe_error
from grpo_mega.recipe.overrides import apply_overrides
from grpo_mega.recipe.render import leaf_origins
from grpo_mega.recipe.schema import Recipe
from grpo_mega.recipe.tree import Leaf, ListNode, MapNode, Node, find, map_leaves, merge, to_plain
from grpo_mega.recipe.yaml_positions import check_text, read_tree

_ENVIRONMENT = re.compile(r"(?P<escape>\$?)\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<fallback>[^}]*))?\}")
"""${NAME}, ${NAME:-fallback}; $${NAME} stands for the text ${NAME}."""
LONGEST_CHAIN = 20
"""Files that inherit from each other."""


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe and, for each dotted key with a value, "recipes/base.yaml:12", "command line" or "default".

    Example: loaded.recipe.train.lr == 1e-4; loaded.origins["train.lr"] == "recipes/quickstart.yaml:31"
    """

    recipe: Recipe
    origins: Mapping[str, str]
    path: Path


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe of a file with `key=value` overrides laid over it; every mistake in it is a UserError."""
    shown_as = os.fspath(path)
    tree = map_leaves(apply_overrides(read_with_defaults(shown_as), overrides), _expand)
    assert isinstance(tree, MapNode)
    _check_path(find(tree, ("run", "dir")), "run.dir")
    recipe = _validate(tree, shown_as)
    return LoadedRecipe(recipe, MappingProxyType(leaf_origins(recipe, tree)), Path(path))


def read_with_defaults(shown_as: str, chain: tuple[str, ...] = ()) -> MapNode:
    """The file's tree over those that its `defaults:` name."""
    own = read_tree(Path(shown_as), shown_as)
    items = {key: item for key, item in own.items.items() if key != "defaults"}
    merged = merge(inherited_by(own, shown_as, chain), MapNode(items, own.origin))
    assert isinstance(merged, MapNode)
    return merged


def inherited_by(own: MapNode, shown_as: str, chain: tuple[str, ...] = ()) -> Node:
    """What the files in a tree's `defaults:` say together, first to last; `chain` is who inherits from it."""
    identity = os.path.realpath(shown_as)
    inherited = own.items.get("defaults")
    tree: Node = MapNode({}, own.origin)
    for reference in [] if inherited is None else _references(inherited):
        base = os.path.normpath(os.path.join(os.path.dirname(shown_as), str(reference.value)))
        where = f"{reference.origin} (defaults)"
        if os.path.realpath(base) in (*chain, identity):
            raise UserError(
                f"{shown_as} inherits from itself by way of {base}",
                where=where,
                law="defaults form a chain that ends",
                remedy="remove one of the references",
            )
        if not os.path.isfile(base):
            raise UserError(
                f"there is no recipe {base}",
                where=where,
                law="a path in defaults starts at the file it stands in",
                remedy=f"correct {reference.value!r}",
            )
        if len(chain) >= LONGEST_CHAIN:
            raise UserError(
                f"{shown_as} has defaults, and {LONGEST_CHAIN} recipes inherit from it one by one",
                where=where,
                law=f"a chain of defaults has at most {LONGEST_CHAIN} files",
                remedy="let it inherit from a file nearer to the first one",
            )
        tree = merge(tree, read_with_defaults(base, (*chain, identity)))
    return tree


def _references(node: Node) -> list[Leaf]:
    items = node.items if isinstance(node, ListNode) else (node,)
    leaves = [_expand(item) for item in items if isinstance(item, Leaf) and isinstance(item.value, str)]
    if len(leaves) != len(items):
        raise UserError(
            "defaults must be a path or a list of paths",
            where=f"{node.origin} (defaults)",
            remedy="write defaults: ../base.yaml",
        )
    for leaf in leaves:
        _check_path(leaf, "defaults")
    return leaves


def _check_path(node: Node | None, key: str) -> None:
    """Of those that are opened or made without a look before."""
    if isinstance(node, Leaf) and isinstance(node.value, str) and "\0" in node.value:
        raise UserError(
            f"{node.value[:40]!r} cannot be the name of a file",
            where=f"{node.origin} ({key})",
            law="a path holds no NUL",
            remedy="write it without the escape",
        )


def _expand(leaf: Leaf) -> Leaf:
    """The leaf with environment references in its text replaced by their values."""
    if not isinstance(leaf.value, str):
        return leaf

    def value_of(match: re.Match[str]) -> str:
        if match["escape"]:
            return match[0][1:]
        value = os.environ.get(match["name"]) or match["fallback"]
        if value is None:
            raise UserError(
                f"the environment variable {match['name']} is not set (or empty)",
                where=leaf.origin,
                law=f"{match[0]} takes its text from the environment",
                remedy=f"export {match['name']}=..., or write ${{{match['name']}:-fallback}}",
            )
        return value

    value = _ENVIRONMENT.sub(value_of, leaf.value)
    check_text(value, leaf.origin)  # a variable may hold bytes that are no UTF-8
    return replace(leaf, value=value)


def _validate(tree: MapNode, shown_as: str) -> Recipe:
    try:
        # Strict JSON rules are what a reader of YAML expects: "5" is no number, `on` no boolean, 1 no true.
        return Recipe.model_validate_json(json.dumps(to_plain(tree)), strict=True)
    except ValidationError as error:
        raise recipe_error(error, tree, shown_as) from None
