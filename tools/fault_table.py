"""The table of planted faults: what is read of `tools/faults/`, and how it fits a checkout."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

TABLE = Path(__file__).with_name("faults")
PACKAGE, SUFFIXES = "grpo_mega", (".py", ".h", ".cpp")


class TableError(Exception):
    """The table does not fit the checkout, or the command line the table."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`first`: tests to ask before the others of the room; `tests`: to ask in their place. Either may hold
    options of pytest, such as -k."""

    name: str
    room: str
    old: str
    new: str
    harm: str
    first: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()


def read_table(folder: Path = TABLE) -> tuple[list[Fault], dict[str, list[str]]]:
    """The faults, and the tests of each room."""
    rooms = yaml.safe_load((folder / "rooms.yaml").read_text())
    faults: list[Fault] = []
    for path in sorted(folder.glob("*.yaml")):
        for entry in yaml.safe_load(path.read_text()) if path.name != "rooms.yaml" else ():
            lists = {key: tuple(entry[key]) for key in ("first", "tests") if key in entry}
            faults.append(Fault(**{**entry, **lists}))
    names = [fault.name for fault in faults]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TableError(f"two faults are called {sorted(twice)[0]}")
    if strange := {fault.room for fault in faults} - rooms.keys():
        raise TableError(f"rooms.yaml has no room {sorted(strange)[0]}")
    return faults, rooms


def sources(checkout: Path) -> dict[Path, str]:
    """Of the package, by path."""
    found = (path for path in sorted((checkout / PACKAGE).rglob("*")) if path.suffix in SUFFIXES)
    return {path: path.read_text(encoding="utf-8") for path in found if path.is_file()}


def place_of(fault: Fault, texts: Mapping[Path, str]) -> Path:
    """The one file that holds the fault's snippet; the fault must leave it readable."""
    counts = {path: count for path, text in texts.items() if (count := text.count(fault.old))}
    if sum(counts.values()) != 1:
        places = ", ".join(f"{path.name} ({count})" for path, count in counts.items())
        raise TableError(
            f"{fault.name}: the snippet occurs {sum(counts.values())} times and not once"
            f"{f': {places}' if places else ''}\n    {fault.old}"
        )
    (path,) = counts
    planted = texts[path].replace(fault.old, fault.new)
    if planted == texts[path]:
        raise TableError(f"{fault.name} changes nothing")
    if path.suffix == ".py":
        try:
            ast.parse(planted)
        except SyntaxError as error:
            raise TableError(f"{fault.name}: what it leaves is no Python: {error}") from None
    return path


def check(faults: Sequence[Fault], checkout: Path) -> list[str]:
    """What is wrong, one line each."""
    texts, wrong = sources(checkout), []
    for fault in faults:
        try:
            place_of(fault, texts)
        except TableError as error:
            wrong.append(str(error))
    return wrong


def tests_of(fault: Fault, rooms: Mapping[str, Sequence[str]], checkout: Path) -> tuple[list[str], list[str]]:
    """What pytest is given, and which paths of it this checkout does not have. Where nothing is left of a
    fault's own tests, the room's stand in."""
    room = rooms[fault.room]
    wanted = list(fault.tests) or [*fault.first, *(path for path in room if path not in fault.first)]
    given, missing = _present(wanted, checkout)
    if fault.tests and not any(is_test(word) for word in given):
        given, more = _present(room, checkout)
        missing += more
    return given, missing


def is_test(word: str) -> bool:
    return word.partition("::")[0].endswith(".py") or word.rstrip("/").startswith("tests")


def _present(words: Iterable[str], checkout: Path) -> tuple[list[str], list[str]]:
    given: list[str] = []
    missing: list[str] = []
    for word in words:
        there = not is_test(word) or (checkout / word.partition("::")[0]).exists()
        (given if there else missing).append(word)
    return given, missing
