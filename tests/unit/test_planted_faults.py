"""The table of planted faults fits the source: it says nothing about whether the tests notice them."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

import fault_table  # noqa: E402  # pyright: ignore[reportMissingImports] -- the tools are no package

FAULTS, ROOMS = fault_table.read_table()


def test_every_fault_can_be_planted_in_one_place() -> None:
    assert fault_table.check(FAULTS, ROOT) == []


def test_every_room_has_faults_and_tests_that_are_there() -> None:
    assert len(FAULTS) >= 60
    assert min(Counter(fault.room for fault in FAULTS).values()) >= 2
    assert {fault.room for fault in FAULTS} == ROOMS.keys()
    for fault in FAULTS:
        words, missing = fault_table.tests_of(fault, ROOMS, ROOT)
        assert words and not missing, fault.name
        assert fault.harm and not fault.harm.endswith(".")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("x = 1", "x = 2", "occurs 2 times"),
        ("x = 3", "x = 2", "occurs 0 times"),
        ("y = 1", "y = (", "is no Python"),
        ("y = 1", "y = 1", "changes nothing"),
        ("y = 1", "y = 2", ""),
    ],
)
def test_a_fault_that_cannot_be_planted_is_named(old: str, new: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "grpo_mega").mkdir()
    (tmp_path / "grpo_mega" / "a.py").write_text("x = 1\ny = 1\n")
    (tmp_path / "grpo_mega" / "b.h").write_text("x = 1;\n")
    wrong = fault_table.check([fault_table.Fault("it", "room", old, new, "harm")], tmp_path)
    assert [said in text for text in wrong] == ([True] if said else [])


def test_paths_that_a_checkout_lacks_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").touch()
    rooms = {"room": ["tests/test_gone.py", "tests/test_a.py"]}
    narrowed = fault_table.Fault(
        "it", "room", "a", "b", "harm", tests=("tests/test_moved.py::test_x", "-k", "x")
    )
    words, missing = fault_table.tests_of(narrowed, rooms, tmp_path)
    assert words == ["tests/test_a.py"]  # the room's, where nothing of its own is left
    assert missing == ["tests/test_moved.py::test_x", "tests/test_gone.py"]
    first = fault_table.Fault("it", "room", "a", "b", "harm", first=("tests/test_a.py",))
    assert fault_table.tests_of(first, rooms, tmp_path)[0] == ["tests/test_a.py"]
