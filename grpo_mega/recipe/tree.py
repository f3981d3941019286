"""A recipe before it is typed: YAML values that remember where each of them was written.

Merging, overrides and error messages all work on this tree, so that every key can name its file and line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, cast

Scalar: TypeAlias = str | int | float | bool | None
Plain: TypeAlias = "Scalar | list[Plain] | dict[str, Plain]"
KeyPath: TypeAlias = tuple[str | int, ...]

COMMAND_LINE = "command line"
DEFAULT = "default"

EXCLUSIVE_KEYS: Mapping[str, tuple[str, ...]] = {
    "model": ("hf", "scratch"),
    "loss.objective": ("clip", "cispo", "gmpo"),
}
"""Block -> keys of which a recipe gives exactly one. Giving one replaces an inherited other one."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One scalar. `origin` is "recipes/base.yaml:12" or "command line"."""

    value: Scalar
    origin: str


@dataclass(frozen=True, slots=True)
class ListNode:
    items: tuple[Node, ...]
    origin: str


@dataclass(frozen=True, slots=True)
class MapNode:
    items: Mapping[str, Node]
    origin: str


Node: TypeAlias = Leaf | ListNode | MapNode


def to_plain(node: Node) -> Plain:
    """The values alone, as JSON would hold them."""
    match node:
        case Leaf():
            return node.value
        case ListNode():
            return [to_plain(item) for item in node.items]
        case MapNode():
            return {key: to_plain(item) for key, item in node.items.items()}


def from_plain(value: object, origin: str) -> Node:
    """A tree out of values that all come from one place (a default, an override)."""
    if isinstance(value, Mapping):
        items = cast(Mapping[str, object], value)
        return MapNode({key: from_plain(item, origin) for key, item in items.items()}, origin)
    if isinstance(value, list | tuple):
        members = cast(Sequence[object], value)
        return ListNode(tuple(from_plain(item, origin) for item in members), origin)
    assert value is None or isinstance(value, str | int | float | bool)
    return Leaf(value, origin)


def merge(base: Node, over: Node, path: KeyPath = ()) -> Node:
    """Mappings merge key by key; a list or a scalar replaces what it covers, and so does the empty mapping:
    `innovations: {}` in a child means none, not "those of the base"."""
    if not (isinstance(base, MapNode) and isinstance(over, MapNode)) or (path and not over.items):
        return over
    given = {key for key, item in over.items.items() if not is_null(item)}
    items = without_rivals(base.items, given, path)
    for key, item in over.items.items():
        items[key] = merge(items[key], item, (*path, key)) if key in items else item
    return MapNode(items, over.origin)


def without_rivals(items: Mapping[str, Node], given: set[str], path: KeyPath) -> dict[str, Node]:
    """The items less those that a newly given key of the same exclusive group replaces."""
    group = set(EXCLUSIVE_KEYS.get(dotted(path), ()))
    replaced = group - given if group & given else set[str]()
    # Two alternatives on one command line contradict each other: both stay, and the validator says so.
    return {key: item for key, item in items.items() if key not in replaced or comes_from(item, COMMAND_LINE)}


def comes_from(node: Node, origin: str) -> bool:
    """Whether anything in the node was written there."""
    match node:
        case Leaf():
            return node.origin == origin
        case ListNode():
            return node.origin == origin or any(comes_from(item, origin) for item in node.items)
        case MapNode():
            return node.origin == origin or any(comes_from(item, origin) for item in node.items.values())


def map_leaves(node: Node, change: Callable[[Leaf], Leaf]) -> Node:
    match node:
        case Leaf():
            return change(node)
        case ListNode():
            return replace(node, items=tuple(map_leaves(item, change) for item in node.items))
        case MapNode():
            return replace(node, items={key: map_leaves(item, change) for key, item in node.items.items()})


def find(node: Node, path: KeyPath) -> Node | None:
    """The node at exactly this path, or None."""
    for part in path:
        if isinstance(node, MapNode) and str(part) in node.items:
            node = node.items[str(part)]
        elif isinstance(node, ListNode) and isinstance(part, int) and part < len(node.items):
            node = node.items[part]
        else:
            return None
    return node


def nearest_origin(node: Node, path: KeyPath) -> str:
    """Where the deepest part of the path that somebody wrote stands."""
    for length in range(len(path), -1, -1):
        found = find(node, path[:length])
        if found is not None:
            return found.origin
    raise AssertionError("the empty path always finds the root")


def dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def is_null(node: Node) -> bool:
    return isinstance(node, Leaf) and node.value is None
