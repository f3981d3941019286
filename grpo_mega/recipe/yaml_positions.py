"""YAML text -> tree with positions, by the YAML 1.2 core rules.

PyYAML follows 1.1, where `on` is a boolean, `1:30` is ninety, `012` is ten and `1e-4` is text. Here `true`
and `false` are the only booleans and numbers read as people expect. Anchors and aliases work; merge keys
(`<<`) do not exist in 1.2: `defaults:` is the way to inherit.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import yaml
import yaml.reader

from grpo_mega.errors import UserError
from grpo_mega.recipe.tree import Leaf, ListNode, MapNode, Node, Scalar

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_STR_TAG = "tag:yaml.org,2002:str"
_UNTAGGED = "untagged"
_YAML_LAW = "a recipe is one YAML document whose top level is a mapping"
LONGEST_NUMBER = 400
"""Characters. A longer text is none that a float could hold, and Python refuses to read it."""
DEEPEST = 40
"""Mappings and lists inside each other; a recipe has less than ten."""
MOST_NODES = 100_000
"""Aliases counted as often as they are used: a few lines of them can stand for billions."""


class CoreLoader(yaml.SafeLoader):
    """Decides nothing about scalars: `core_scalar` does."""

    DEFAULT_SCALAR_TAG = _UNTAGGED  # pyright: ignore[reportGeneralTypeIssues]  # Final in the stubs only
    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own class-level registry
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """PyYAML's, but with an end: it goes as deep as the text, and then out of Python's stack."""
        self._depth += 1
        if self._depth > DEEPEST:
            event = cast(Any, self.peek_event())  # pyright: ignore[reportUnknownMemberType]
            raise yaml.MarkedYAMLError(
                problem=f"it is nested more than {DEEPEST} deep", problem_mark=event.start_mark
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def core_scalar(text: str) -> Scalar:
    """What an unquoted scalar means in YAML 1.2."""
    if len(text) > LONGEST_NUMBER:
        return text
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def read_tree(path: Path, shown_as: str) -> MapNode:
    """The mapping in a file. `shown_as` is how the file is named in origins and messages."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"there is no recipe {shown_as}",
            where=f"looked in {path.absolute().parent}",
            remedy="check the name: a relative path starts at the working directory",
        ) from None
    except OSError as error:
        what = "is a directory" if path.is_dir() else f"cannot be read: {error.strerror}"
        raise UserError(
            f"{shown_as} {what}", where=shown_as, law=_YAML_LAW, remedy="give a file that this user may read"
        ) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{shown_as} is not UTF-8: {error.reason}",
            where=f"{shown_as}:{line}",
            remedy="save the file as UTF-8",
        ) from None
    node = parse_yaml(text, shown_as)
    if node is None:
        raise UserError(
            f"{shown_as} is empty", where=shown_as, law=_YAML_LAW, remedy="start from recipes/base.yaml"
        )
    if not isinstance(node, MapNode):
        kind = "a list" if isinstance(node, ListNode) else "a single value"
        raise UserError(
            f"{shown_as} holds {kind}", where=node.origin, law=_YAML_LAW, remedy="write `key: value` lines"
        )
    return node


def parse_yaml(text: str, shown_as: str, *, numbered: bool = True) -> Node | None:
    """One YAML document as a tree, None when it is empty. Without `numbered`, origins carry no line."""
    try:
        root = _compose(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{shown_as}:{mark.line + 1}" if mark and numbered else shown_as
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"not valid YAML: {problem}", where=where, remedy=_syntax_remedy(problem)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"not valid YAML: the character {error.character!r} is not allowed",
            where=f"{shown_as}:{line}" if numbered else shown_as,
            remedy="remove it",
        ) from None
    return None if root is None else _Converter(shown_as, numbered).convert(root, ())


def _compose(text: str) -> yaml.Node | None:
    loader = CoreLoader(text)
    try:
        return loader.get_single_node()
    except (ValueError, OverflowError):  # PyYAML's own: a \U beyond Unicode, a version of 5000 digits
        mark = loader.get_mark()
        raise yaml.MarkedYAMLError(problem="a number there is too large", problem_mark=mark) from None
    finally:
        loader.dispose()


def _syntax_remedy(problem: str) -> str:
    if "nested" in problem:
        return "use fewer brackets or less indentation"
    if "'\\t'" in problem:
        return "indent with spaces: YAML allows no tabs there"
    if "mapping values are not allowed" in problem:
        return "check the indentation, and quote a value that holds a colon followed by a space"
    return "check indentation, brackets and quotes at that line"


def check_text(text: str, origin: str) -> None:
    """What no encoding can hold: better refused here than wherever it is used."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(
            f"{text[:40]!r} holds half of a character",
            where=origin,
            law="a text in a recipe is valid Unicode",
            remedy="write the whole character, not its escape",
        )


class _Converter:
    """PyYAML's nodes -> ours, refusing what a recipe has no use for."""

    def __init__(self, shown_as: str, numbered: bool):
        self._shown_as, self._numbered = shown_as, numbered
        self._count = 0

    def convert(self, node: yaml.Node, parents: tuple[yaml.Node, ...]) -> Node:
        origin = self._origin(node)
        if node in parents:
            raise UserError(
                "an alias refers to the mapping or list it stands in",
                where=origin,
                remedy="write out what it should stand for",
            )
        self._count += 1
        if len(parents) > DEEPEST or self._count > MOST_NODES:
            raise UserError(
                "its aliases stand for more than a recipe can hold",
                where=origin,
                law=f"a recipe is nested at most {DEEPEST} deep and holds at most {MOST_NODES:,} values",
                remedy="use fewer aliases",
            )
        inner = (*parents, node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, inner)
        if isinstance(node, yaml.SequenceNode):
            return ListNode(tuple(self.convert(item, inner) for item in node.value), origin)
        assert isinstance(node, yaml.ScalarNode)
        return Leaf(self._scalar(node), origin)

    def _mapping(self, node: yaml.MappingNode, inner: tuple[yaml.Node, ...]) -> MapNode:
        items: dict[str, Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(
                    "a key must be a word, not a list or a mapping",
                    where=self._origin(key),
                    remedy="write `key: value`",
                )
            check_text(key.value, self._origin(key))
            if key.value in items:
                raise UserError(
                    f"the key {key.value!r} is given twice in one block",
                    where=self._origin(key),
                    law=f"a key appears once (first at {items[key.value].origin})",
                    remedy="remove one of the two",
                )
            item = self.convert(value, inner)
            # A block's origin is the line of its key, where a reader looks, not the first line inside.
            items[key.value] = replace(item, origin=self._origin(key))
        return MapNode(items, self._origin(node))

    def _scalar(self, node: yaml.ScalarNode) -> Scalar:
        check_text(node.value, self._origin(node))
        if node.tag == _STR_TAG or (node.tag == _UNTAGGED and node.style is not None):
            return node.value
        if node.tag == _UNTAGGED:
            return core_scalar(node.value)
        raise UserError(
            f"the tag {node.tag} has no meaning here", where=self._origin(node), remedy="remove the tag"
        )

    def _origin(self, node: yaml.Node) -> str:
        return f"{self._shown_as}:{node.start_mark.line + 1}" if self._numbered else self._shown_as
