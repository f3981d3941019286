"""The resolved recipe as YAML: plain, to be loaded again, or with the origin of each value beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import yaml

from grpo_mega.recipe.schema import Recipe
from grpo_mega.recipe.tree import DEFAULT, KeyPath, MapNode, Plain, dotted, find
from grpo_mega.recipe.yaml_positions import core_scalar

if TYPE_CHECKING:
    from grpo_mega.recipe.load import LoadedRecipe

_REFERENCE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_]*(?::-[^}]*)?\}")
_MAX_COMMENT_COLUMN = 60


def dump_resolved(recipe: Recipe) -> str:
    """YAML that loads back to an equal recipe, every key written out."""
    return "".join(f"{text}\n" for text, _ in _lines(_plain(recipe), (), ""))


def render_resolved(loaded: LoadedRecipe) -> str:
    """The same, each value followed by where it comes from: what `--dry-run` prints."""
    lines = list(_lines(_plain(loaded.recipe), (), ""))
    widths = [len(text) for text, path in lines if path is not None]
    column = min(max(widths, default=0), _MAX_COMMENT_COLUMN)
    return "".join(
        f"{text}\n" if path is None else f"{text:<{column}}  # {loaded.origins[dotted(path)]}\n"
        for text, path in lines
    )


def leaf_origins(recipe: Recipe, tree: MapNode) -> dict[str, str]:
    """Dotted key of every value of the resolved recipe -> where it was written. A flat list is one value."""
    origins: dict[str, str] = {}
    for _, path in _lines(_plain(recipe), (), ""):
        if path is not None:
            node = find(tree, path)
            origins[dotted(path)] = DEFAULT if node is None else node.origin
    return origins


def _plain(recipe: Recipe) -> Plain:
    return _escaped(recipe.model_dump(mode="json"))


def _escaped(value: Plain) -> Plain:
    match value:
        case str():
            return escape_references(value)
        case list():
            return [_escaped(item) for item in value]
        case dict():
            return {key: _escaped(item) for key, item in value.items()}
        case _:
            return value


def _lines(value: Plain, path: KeyPath, indent: str) -> Iterator[tuple[str, KeyPath | None]]:
    """Lines of YAML, each with the path of the value it ends in, or None when it opens a block."""
    assert isinstance(value, dict | list)
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in entries:
        head = f"{indent}{_flow(key)}:" if isinstance(key, str) else f"{indent}-"
        here = (*path, key)
        if _fits_one_line(item):
            yield f"{head} {_flow(item)}", here
        elif isinstance(key, str):
            yield head, None
            yield from _lines(item, here, f"{indent}  ")
        else:
            inner = list(_lines(item, here, f"{indent}  "))
            first, first_path = inner[0]
            yield f"{head} {first.lstrip()}", first_path
            yield from inner[1:]


def _fits_one_line(value: Plain) -> bool:
    if isinstance(value, list):
        return not any(isinstance(item, dict) and item for item in value)
    return not (isinstance(value, dict) and value)


class _Dumper(yaml.SafeDumper):
    """Quotes a string whenever YAML 1.1 or 1.2 would read it as something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def escape_references(text: str) -> str:
    """The text as a recipe must hold it so that `${NAME}` in it is not looked up."""
    return _REFERENCE.sub(lambda match: f"${match[0]}", text)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    one_line = text.isprintable() and core_scalar(text) == text
    style = None if one_line else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)  # pyright: ignore[reportUnknownMemberType]


_Dumper.add_representer(str, _represent_text)


def _flow(value: Plain | Mapping[str, Plain]) -> str:
    """A value on one line."""
    text = yaml.dump(  # pyright: ignore[reportUnknownMemberType]
        value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=2**31
    )
    return text.removesuffix("\n").removesuffix("\n...")
