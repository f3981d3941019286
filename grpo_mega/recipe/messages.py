"""pydantic's complaints -> one UserError in plain words: each problem with file, line, key, law, remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from grpo_mega.errors import UserError
from grpo_mega.recipe.keys import (
    allowed_words,
    block_keys,
    default_of,
    describe,
    homes_of_key,
    schema_at,
    walk,
)
from grpo_mega.recipe.tree import DEFAULT, KeyPath, MapNode, dotted, find, nearest_origin, to_plain
from grpo_mega.recipe.yaml_positions import core_scalar

_WORD = re.compile(r"[a-z_]+(?:\.[a-z0-9_]+)*")
_ALMOST = 0.7
"""difflib's similarity above which a key counts as a misspelling of another."""
_LONGEST_SHOWN = 200
"""Characters of a value."""


def recipe_error(error: ValidationError, tree: MapNode, shown_as: str) -> UserError:
    """All that is wrong with a recipe, as one error: itself when it is one problem, else a numbered list."""
    problems = list(_problems(error.errors(include_url=False), tree))
    if len(problems) == 1:
        return problems[0]
    listed = "\n".join(
        f"{number}. {_indented(str(problem))}" for number, problem in enumerate(problems, start=1)
    )
    return UserError(f"{len(problems)} problems in {shown_as}:\n{listed}", where=shown_as)


def _indented(text: str) -> str:
    return text.replace("\n", "\n   ")


def _problems(errors: Sequence[ErrorDetails], tree: MapNode) -> Iterator[UserError]:
    # A value that may be of several types yields one complaint for each: they share the key they speak of.
    by_key = {path: next(group) for path, group in groupby(errors, key=_key_of)}
    for path, first in by_key.items():
        if any(len(other) > len(path) and other[: len(path)] == path for other in by_key):
            continue  # a list whose entries are wrong is reported as too short as well
        match first["type"]:
            case "extra_forbidden":
                yield _unknown_key(path, tree)
            case "missing" if isinstance(first["loc"][-1], str):
                yield _missing_key(path, tree)
            case "value_error":
                yield _broken_law(path, str(first.get("ctx", {}).get("error", first["msg"])), tree)
            case _:
                yield _wrong_value(path, tree)


def _key_of(error: ErrorDetails) -> KeyPath:
    """The part of pydantic's location that is a key of the recipe: it appends names of types it tried."""
    location = error["loc"]
    if error["type"] == "extra_forbidden":
        return location
    path = walk(location)
    # A missing entry of a list says that the list is too short; a missing key says which.
    return path[:-1] if error["type"] == "missing" and isinstance(path[-1], int) else path


def _unknown_key(path: KeyPath, tree: MapNode) -> UserError:
    block, key = path[:-1], str(path[-1])
    return UserError(
        f"unknown key {dotted(path)}",
        where=_where(path, tree),
        law=f"{_name(block)} has the keys {', '.join(block_keys(block))}",
        remedy=_suggestion(block, key),
    )


def _suggestion(block: KeyPath, key: str) -> str:
    homes = homes_of_key(key)
    if homes:
        named = " or ".join(f"{home}.{key}" if home else key for home in homes)
        if len(homes) == 1:
            return f"did you mean {named}? {key} belongs to {homes[0] or 'the top level'}"
        return f"did you mean {named}?"
    near = difflib.get_close_matches(key, block_keys(block), n=1, cutoff=_ALMOST)
    if near:
        return f"did you mean {dotted((*block, near[0]))}?"
    return "remove it, or use one of those keys"


def _missing_key(path: KeyPath, tree: MapNode) -> UserError:
    keys = ", ".join(block_keys(path))
    return UserError(
        f"{_name(path[:-1])} has no {path[-1]}",
        where=f"{nearest_origin(tree, path)} ({dotted(path)})",
        law=f"{dotted(path)} is required",
        remedy=f"add {dotted(path)}: " + (f"a block with some of {keys}" if keys else _expected(path)),
    )


def _wrong_value(path: KeyPath, tree: MapNode) -> UserError:
    node = find(tree, path)
    value = None if node is None else to_plain(node)
    return UserError(
        f"{dotted(path) or 'the recipe'} = {_shown(value)} cannot be used",
        where=_where(path, tree),
        law=f"it must be {_expected(path)}",
        remedy=_remedy(path, value),
    )


def _remedy(path: KeyPath, value: object) -> str:
    if isinstance(value, str):
        near = difflib.get_close_matches(value, allowed_words(schema_at(path)), n=1)
        if near:
            return f"did you mean {near[0]}?"
        if value.lower() in ("on", "off", "yes", "no") and "true or false" in _expected(path):
            return "write true or false: on, off, yes and no are plain words"
        if isinstance(core_scalar(value), int | float):
            return "write the number without quotes (a value taken from the environment is always text)"
    default = default_of(path)
    if isinstance(default, str | int | float):
        return f"correct it (the default is {_shown(default)})"
    return "correct it"


def _broken_law(block: KeyPath, law: str, tree: MapNode) -> UserError:
    named = [path for path in _named_keys(block, law) if find(tree, path) is not None] or [block]
    keys = ", ".join(dotted(path) for path in named if path)
    return UserError(
        f"{_name(block)} cannot be used: some of its keys do not fit together",
        where=", ".join(_where(path, tree) for path in named),
        law=law,
        remedy=f"change {keys} so that it holds" if keys else "change one of the keys it names",
    )


def _named_keys(block: KeyPath, law: str) -> list[KeyPath]:
    """The keys a law speaks of: dotted ones from the top, bare ones of the block or beside a dotted one."""
    named: dict[KeyPath, None] = {}
    beside = block
    for word in _WORD.findall(law):
        parts: KeyPath = tuple(word.split("."))
        if len(parts) > 1 and walk(parts) == parts:
            named[parts], beside = None, parts[:-1]
        elif len(parts) == 1 and word in block_keys(beside) and (block or beside):
            named[(*beside, word)] = None
    return list(named)


def _where(path: KeyPath, tree: MapNode) -> str:
    origin = nearest_origin(tree, path)
    return origin if origin == DEFAULT or not path else f"{origin} ({dotted(path)})"


def _name(block: KeyPath) -> str:
    return dotted(block) or "the recipe"


def _expected(path: KeyPath) -> str:
    return describe(schema_at(path))


def _shown(value: Any) -> str:
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case dict():
            return "a block of keys"
        case list():
            return "a list"
        case str():
            return repr(value) if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]!r}..."
        case _:
            return str(value)
