"""`key=value` from the command line: a dotted path and a YAML value, laid over the tree of the files.

`train.steps=3`, `loss.innovations.ema.beta=.95`, `tracker=[jsonl]`. The value takes the place of what stood
there, even of a whole block (`loss.innovations={}`): unlike a file, it does not merge. A list entry is chosen
by its index (`stages.0.sft.steps=10`) or by the kind it holds, if only one holds it (`stages.grpo.steps=5`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from pydantic import BaseModel

from grpo_mega.errors import UserError
from grpo_mega.recipe.schema import Recipe
from grpo_mega.recipe.tree import (
    COMMAND_LINE,
    DEFAULT,
    KeyPath,
    ListNode,
    MapNode,
    Node,
    dotted,
    from_plain,
    is_null,
    without_rivals,
)
from grpo_mega.recipe.yaml_positions import parse_yaml

_FORM = "an override is key.path=value, like train.steps=3"


def apply_overrides(tree: MapNode, overrides: Sequence[str]) -> MapNode:
    """Later overrides win over earlier ones, and all of them over the files."""
    for text in overrides:
        parts, value = _parse(text)
        changed = _set(tree, parts, value, (), text)
        assert isinstance(changed, MapNode)
        tree = changed
    return tree


def _parse(text: str) -> tuple[list[str], Node]:
    key, equals, value_text = text.partition("=")
    key = key.strip()
    where = _where(text)
    if not equals:
        raise UserError(
            f"{text!r} has no '='", where=where, law=_FORM, remedy=f"write {text.strip() or 'key'}=VALUE"
        )
    parts = key.split(".")
    if not all(re.fullmatch(r"\S+", part) for part in parts):
        raise UserError(
            f"{key!r} is not a dotted key",
            where=where,
            law=_FORM,
            remedy="leave out empty parts and spaces",
        )
    if parts[0] == "defaults":
        raise UserError(
            "defaults cannot be overridden",
            where=where,
            law="files inherit, command lines set single keys",
            remedy="write a file of your own with other defaults",
        )
    value = parse_yaml(value_text, f"{COMMAND_LINE} ({text})", numbered=False)
    if value is None:
        raise UserError(
            f"{key} is given no value",
            where=where,
            law=_FORM,
            remedy=f"write {key}=null for none, {key}='\"\"' for empty text",
        )
    return parts, _from_command_line(value)


def _from_command_line(node: Node) -> Node:
    match node:
        case ListNode():
            return ListNode(tuple(_from_command_line(item) for item in node.items), COMMAND_LINE)
        case MapNode():
            return MapNode({key: _from_command_line(item) for key, item in node.items.items()}, COMMAND_LINE)
        case _:
            return replace(node, origin=COMMAND_LINE)


def _set(node: Node | None, parts: Sequence[str], value: Node, path: KeyPath, text: str) -> Node:
    """The node with what stands at `parts` below it replaced by `value`."""
    if not parts:
        return value
    if node is None or is_null(node):
        node = _default_at(path)
    if isinstance(node, ListNode):
        return _set_in_list(node, parts, value, path, text)
    if not isinstance(node, MapNode):
        raise UserError(
            f"{dotted(path)} is a single value: it has no key {parts[0]}",
            where=_where(text),
            remedy=f"write {dotted(path)}=VALUE",
        )
    key, rest = parts[0], parts[1:]
    child = _set(node.items.get(key), rest, value, (*path, key), text)
    items = without_rivals(node.items, set() if is_null(child) else {key}, path)
    return MapNode({**items, key: child}, node.origin)


def _set_in_list(node: ListNode, parts: Sequence[str], value: Node, path: KeyPath, text: str) -> Node:
    index, rest = _entry(node, parts, path, text)
    items = list(node.items)
    changed = _set(items[index], rest, value, (*path, index), text)
    items[index] = changed
    # A list of scalars is shown as one value, so that its origin is that of its newest member.
    return ListNode(tuple(items), node.origin if isinstance(changed, MapNode) else COMMAND_LINE)


def _entry(node: ListNode, parts: Sequence[str], path: KeyPath, text: str) -> tuple[int, Sequence[str]]:
    """Which entry the next part means, and the parts that are left inside it."""
    name, count = parts[0], len(node.items)
    if re.fullmatch("-?[0-9]+", name):
        if 0 <= int(name) < count:
            return int(name), parts[1:]
        raise UserError(
            f"{dotted(path)} has {count} entries: there is no entry {name}",
            where=_where(text),
            law="entries are counted from 0",
            remedy=f"use a smaller index, or give the whole list: {dotted(path)}=[...]",
        )
    holders = [i for i, item in enumerate(node.items) if isinstance(item, MapNode) and name in item.items]
    if len(holders) == 1:
        return holders[0], parts
    kinds = ", ".join(
        f"{i}: {'/'.join(item.items)}" for i, item in enumerate(node.items) if isinstance(item, MapNode)
    )
    raise UserError(
        f"{len(holders) or 'no'} entries of {dotted(path)} hold {name}",
        where=_where(text),
        law="an entry is chosen by its index, or by a key that only one entry holds",
        remedy=f"use an index; the entries are {kinds or f'{count} plain values'}",
    )


def _default_at(path: KeyPath) -> Node:
    """What the recipe holds here when nobody wrote anything: lists can then be indexed, blocks filled in."""
    value: object = (
        Recipe.model_fields[str(path[0])].default if path and path[0] in Recipe.model_fields else None
    )
    for part in path[1:]:
        value = getattr(value, str(part), None)
    if isinstance(value, tuple):
        members = cast(tuple[object, ...], value)
        return ListNode(tuple(from_plain(_plain_default(member), DEFAULT) for member in members), DEFAULT)
    return MapNode({}, COMMAND_LINE)


def _plain_default(member: object) -> object:
    return member.model_dump(mode="json", exclude_unset=True) if isinstance(member, BaseModel) else member


def _where(text: str) -> str:
    return f"{COMMAND_LINE}: {text}"
