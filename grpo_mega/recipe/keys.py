"""What the schema knows about a key: what it takes, what stands beside it, where a key of that name lives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias, cast

from grpo_mega.recipe.schema import Recipe
from grpo_mega.recipe.tree import KeyPath, dotted

Schema: TypeAlias = Mapping[str, Any]
_EXCLUSIVE_BOUNDS = (("exclusiveMinimum", "above"), ("exclusiveMaximum", "below"))
_INCLUSIVE_BOUNDS = (("minimum", "at least"), ("maximum", "at most"))


@cache
def raw_schema() -> Schema:
    """The JSON schema of a whole recipe, as pydantic derives it."""
    return Recipe.model_json_schema()


def walk(path: KeyPath) -> KeyPath:
    """The longest beginning of the path that is a key of the recipe."""
    for length in range(len(path), 0, -1):
        if schema_at(path[:length]) is not None:
            return path[:length]
    return ()


def schema_at(path: KeyPath) -> Schema | None:
    """The schema of the value at a path, None where there is no such key."""
    schema: Schema | None = raw_schema()
    for part in path:
        schema = None if schema is None else _step(schema, part)
    return schema


def block_keys(path: KeyPath) -> list[str]:
    """The keys of a block, in the order of the schema."""
    found: list[str] = []
    schema = schema_at(path)
    for option in [] if schema is None else _options(schema):
        found += option.get("properties", {})
    return found


def homes_of_key(key: str) -> list[str]:
    """The blocks that have a key of this name: "" is the top level, an entry of a list is shown as N."""
    return [dotted(block) for block in _blocks() if key in block_keys(block)]


def default_of(path: KeyPath) -> object:
    return (schema_at(path) or {}).get("default")


def allowed_words(schema: Schema | None) -> list[str]:
    """The words a value is chosen from, when it is a choice."""
    words: list[str] = []
    for option in [] if schema is None else _options(schema):
        words += option.get("enum", [])
    return words


def describe(schema: Schema | None) -> str:
    """In plain words, what a value may be: "a whole number of at least 1, or null"."""
    if schema is None:
        return "left out"
    texts = dict.fromkeys(_describe_one(option) for option in _options(schema))
    return " or ".join(texts)


@cache
def _blocks() -> tuple[KeyPath, ...]:
    return tuple(_walk_blocks((), raw_schema()))


def _walk_blocks(path: KeyPath, schema: Schema) -> Iterator[KeyPath]:
    for option in _options(schema):
        if "properties" in option:
            yield path
            for key, inner in option["properties"].items():
                yield from _walk_blocks((*path, key), inner)
        elif isinstance(option.get("items"), dict):
            yield from _walk_blocks((*path, "N"), option["items"])


def _step(schema: Schema, part: str | int) -> Schema | None:
    for option in _options(schema):
        properties: Mapping[str, Schema] = option.get("properties", {})
        if part in properties:
            return properties[str(part)]
        inner = option.get("additionalProperties")
        if isinstance(part, str) and inner not in (None, False):
            return cast(Schema, inner) if isinstance(inner, dict) else {}
        if option.get("type") == "array" and (isinstance(part, int) or part == "N"):
            members: Sequence[Schema] = option.get("prefixItems", [])
            return members[part] if isinstance(part, int) and part < len(members) else option.get("items", {})
    return None


def _options(schema: Schema) -> list[Schema]:
    """The alternatives of a schema, references followed."""
    if "$ref" in schema:
        return _options(raw_schema()["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return [option for member in schema["anyOf"] for option in _options(member)]
    return [schema]


def _describe_one(schema: Schema) -> str:
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "const" in schema:
        return str(schema["const"])
    match schema.get("type"):
        case "integer":
            return _bounded("a whole number", schema)
        case "number":
            return _bounded("a number", schema)
        case "boolean":
            return "true or false"
        case "null":
            return "null"
        case "string":
            return "a path" if schema.get("format") == "path" else "text"
        case "array":
            return _describe_list(schema)
        case "object":
            return "a block of keys"
        case _:
            return "any value"


def _bounded(noun: str, schema: Schema) -> str:
    bounds = [
        f"{words} {schema[name]:g}" for name, words in _EXCLUSIVE_BOUNDS + _INCLUSIVE_BOUNDS if name in schema
    ]
    of = " of" if bounds and bounds[0].startswith("at") else ""
    return f"{noun}{of} {' and '.join(bounds)}".strip()


def _describe_list(schema: Schema) -> str:
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])}: {', '.join(map(describe, schema['prefixItems']))}"
    least = f" (at least {schema['minItems']})" if "minItems" in schema else ""
    return f"a list{least}, each entry {describe(schema.get('items', {}))}"
