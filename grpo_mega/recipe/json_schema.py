"""`recipes/recipe.schema.json`: what an editor needs to complete and check recipe files.

    python -m grpo_mega.recipe.json_schema --write recipes/recipe.schema.json
    python -m grpo_mega.recipe.json_schema --check recipes/recipe.schema.json

A file with `defaults:` holds only differences, so the schema requires nothing; what a whole recipe must have
is checked when it is loaded.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from grpo_mega.recipe.keys import raw_schema

_DEFAULTS: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    "description": "Recipe files this one inherits from, relative to this file; later ones and this one win.",
}


def recipe_json_schema() -> dict[str, Any]:
    """The schema of one recipe file."""
    schema = cast(dict[str, Any], copy.deepcopy(raw_schema()))
    for block in (schema, *schema["$defs"].values()):
        block.pop("required", None)
    properties = {"defaults": _DEFAULTS, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "properties": properties}


def schema_text() -> str:
    return json.dumps(recipe_json_schema(), indent=2) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m grpo_mega.recipe.json_schema", description=__doc__)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", type=Path, metavar="PATH", help="write the schema there")
    action.add_argument("--check", type=Path, metavar="PATH", help="fail when that file is not in step")
    options = parser.parse_args(arguments)
    if options.write:
        options.write.write_text(schema_text(), encoding="utf-8")
    elif options.check:
        if not options.check.is_file() or options.check.read_text(encoding="utf-8") != schema_text():
            command = f"python -m grpo_mega.recipe.json_schema --write {options.check}"
            print(f"{options.check} is not in step with the recipe: run {command}", file=sys.stderr)
            return 1
    else:
        print(schema_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
