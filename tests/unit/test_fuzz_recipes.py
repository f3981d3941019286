"""Whatever a recipe file holds, it is read or refused with file, line or key, and remedy: no traceback."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from grpo_mega import cli
from grpo_mega.errors import UserError
from grpo_mega.recipe import dump_resolved, load_recipe

ROOT = Path(__file__).parents[2]
SMALL = {
    "run": {"dir": "runs/x"},
    "model": {"scratch": {"layers": 2, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 64}},
    "data": {"source": "procedural", "task": "sort_digits"},
    "stages": [{"sft": {"steps": 5}}, {"grpo": {"steps": 5}}],
    "loss": {"innovations": {"ema": {"beta": 0.9}}},
    "reward": [{"rule": {"kind": "exact"}}],
    "tracker": ["jsonl"],
}
WHOLE = yaml.safe_load(dump_resolved(load_recipe(ROOT / "recipes" / "quickstart.yaml").recipe))
"""Every key there is."""
SCALARS = (
    *("null", "true", "on", "-1", "0", "1.5", "''", "word", "~", "[]", "{}", "[1, [2, [3]]]", "{a: {b: c}}"),
    *("1e999", "-.inf", ".nan", "9" * 30, "9" * 5000, "0x" + "f" * 5000, "'" + "9" * 5000 + "'", "1e-400"),
    *(
        "2026-01-01",
        "'5'",
        "${NOWHERE_AT_ALL}",
        "${A:-b}",
        "!!python/object:os.system x",
        "!!str 5",
        "&a [*a]",
    ),
    *(
        r'"\0"',
        r'"\ud800"',
        r'"\UFFFFFFFF"',
        r'"\x1b[2J"',
        "|\n\n",
        "x" * 3000,
        "'#'",
        "*nobody",
        "{? [a] : b}",
    ),
)


def outcome(path: Path, *overrides: str) -> UserError | None:
    """None when the recipe can be used."""
    try:
        load_recipe(path, overrides)
    except UserError as error:
        return error
    return None


def assert_helpful(error: UserError | None, path: Path) -> None:
    if error is None:
        return
    told = str(error)
    assert str(path) in told, told
    assert "remedy:" in told, told
    assert re.search(rf"{re.escape(str(path))}:\d+|\([a-z_0-9.]+\)|is empty|is a directory", told), told
    assert len(told) < 100_000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "r.yaml"


def places(node: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield (*above, key)
        yield from places(child, (*above, key))


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A recipe with some of its keys gone, renamed, doubled, or given something else to hold."""
    recipe = copy.deepcopy(draw(st.sampled_from([SMALL, WHOLE])))
    written: dict[str, str] = {}
    for number in range(draw(st.integers(1, 4))):
        place = draw(st.sampled_from(sorted(places(recipe), key=str)))
        holder = recipe
        for key in place[:-1]:
            holder = holder[key]
        change = draw(st.sampled_from(["delete", "rename", "retype", "swap"]))
        if change == "delete":
            del holder[place[-1]]
        elif change == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["stpes", "lr", "grpo", "x" * 300, "", "a.b", "0"]))] = holder.pop(
                place[-1]
            )
        elif change == "swap":
            other = draw(st.sampled_from(sorted(places(WHOLE), key=str)))
            value: Any = WHOLE
            for key in other:
                value = value[key]
            holder[place[-1]] = copy.deepcopy(value)
        else:
            written[f"@@{number}@@"] = draw(st.sampled_from(SCALARS))
            holder[place[-1]] = f"@@{number}@@"
        if not any(True for _ in places(recipe)):
            break
    text = json.dumps(recipe) if draw(st.booleans()) else yaml.safe_dump(recipe, width=10**6)
    for mark, scalar in written.items():
        text = text.replace(f'"{mark}"', scalar).replace(f"'{mark}'", scalar).replace(mark, scalar)
    return text


def test_what_is_mutated_here_is_sound(path: Path):
    for recipe in (SMALL, WHOLE):
        path.write_text(yaml.safe_dump(recipe))
        assert outcome(path) is None


@given(text=mutated())
@settings(max_examples=120)
def test_a_recipe_with_other_keys_and_values(text: str, path: Path):
    path.write_text(text, encoding="utf-8")
    assert_helpful(outcome(path), path)


@given(data=st.data())
@settings(max_examples=120)
def test_a_recipe_with_other_bytes(data: st.DataObject, path: Path):
    content = bytearray(yaml.safe_dump(SMALL).encode())
    pieces = [
        b"\t",
        b"\xff",
        b"\x00",
        b"\r",
        b"\n",
        b": ",
        b"- ",
        b"{",
        b"}",
        b"[",
        b"&a ",
        b"*a",
        b"#",
        b"'",
        b'"',
        b"!x",
    ]
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content)))
        cut = data.draw(st.integers(0, 3))
        content[at : at + cut] = data.draw(st.sampled_from(pieces) | st.binary(max_size=4))
    path.write_bytes(bytes(content))
    assert_helpful(outcome(path), path)


@given(text=st.text(max_size=60) | st.binary(max_size=60))
@settings(max_examples=80)
def test_a_file_that_was_never_a_recipe(text: str | bytes, path: Path):
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    error = outcome(path)
    assert error is not None
    assert_helpful(error, path)


KEYS = st.sampled_from(
    ["train.lr", "stages.0", "stages.9.x", "stages", "x", "loss.kl", "model.hf.a", "", "a..b", "tracker.0"]
)


@given(key=KEYS, value=st.sampled_from(SCALARS) | st.text(max_size=8))
@settings(max_examples=120)
def test_an_override(key: str, value: str, path: Path):
    path.write_text(yaml.safe_dump(SMALL))
    error = outcome(path, f"{key}={value}")
    assert error is None or ("remedy:" in str(error) and (error.where or "remedy:" in error.what)), str(error)


MINIMAL = "model: {hf: m}\ndata: {task: sort}\n"
CASES: dict[str, tuple[bytes, str]] = {
    "deep flow": (b"a: " + b"[" * 100_000, ":1"),
    "deep mappings": (b"a: " + b"{a: " * 3000, ":1"),
    "deep blocks": (b"".join(b" " * n + b"a:\n" for n in range(1500)), "nested"),
    "deep dashes": (b"- " * 5000 + b"x", "nested"),
    "laughs": (
        b"a: &a [x, x, x, x, x, x, x, x, x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 123)),
        "aliases",
    ),
    "deep aliases": (
        b"k0: &k0 [x]\n" + b"".join(b"k%d: &k%d [*k%d]\n" % (n, n, n - 1) for n in range(1, 2000)),
        "nested",
    ),
    "an alias to itself": (b"a: &a\n  b: *a\n", ":1"),
    "no alias": (b"a: *b\n", ":1"),
    "twice": (b"seed: 1\nseed: 2\n", ":2"),
    "a tab": (b"model:\n\thf: x\n", "spaces"),
    "invalid UTF-8": (b"seed: 1\n\nrun: \xff\n", ":3"),
    "UTF-16": ("seed: 1\n".encode("utf-16"), "UTF-8"),
    "NUL": (b"seed: 1\nrun: \x00\n", ":2"),
    "an escape": (b"seed: 1\nrun: {dir: \"\\x07\\uD800\"}\n", ":2"),
    "a NUL in a path": (MINIMAL.encode() + b'run: {dir: "a\\0b"}\n', ":3"),
    "a NUL in a key": (MINIMAL.encode() + b'"a\\0b": 3\n', ":3"),
    "a NUL in defaults": (b'seed: 1\ndefaults: "a\\0b"\n', ":2"),
    "no character": (b'seed: 1\nrun: {dir: "\\UFFFFFFFF"}\n', ":2"),
    "a version": (b"%YAML 1." + b"9" * 5000 + b"\n---\na: 1\n", ":1"),
    "a long number": (MINIMAL.encode() + b"seed: " + b"9" * 5000, "seed"),
    "a long hexadecimal number": (MINIMAL.encode() + b"seed: 0x" + b"f" * 5000, "seed"),
    "a long number in quotes": (MINIMAL.encode() + b"seed: '" + b"9" * 5000 + b"'", "seed"),
    "a list for a key": (b"? [a, b]\n: 1\n", ":1"),
    "two documents": (b"seed: 1\n---\nseed: 2\n", ":2"),
    "a tag": (b"seed: !!python/object/apply:os.system [ls]\n", ":1"),
    "empty": (b"", "empty"),
    "a comment": (b"# nothing\n", "empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_named_cases(case: str, path: Path):
    content, told = CASES[case]
    path.write_bytes(content)
    error = outcome(path)
    assert error is not None
    assert_helpful(error, path)
    assert told in str(error), str(error)


def test_a_chain_of_defaults_ends(tmp_path: Path):
    for number in range(400):
        (tmp_path / f"{number}.yaml").write_text(f"defaults: {number + 1}.yaml\n")
    (tmp_path / "400.yaml").write_text(MINIMAL)
    error = outcome(tmp_path / "0.yaml")
    assert error is not None and "defaults" in str(error) and error.remedy


def test_a_directory_is_no_recipe(tmp_path: Path):
    assert_helpful(outcome(tmp_path), tmp_path)


@pytest.mark.parametrize("case", ["deep flow", "invalid UTF-8", "a NUL in a path", "a long number", "laughs"])
def test_the_command_line_explains_it(
    case: str, path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    path.write_bytes(CASES[case][0])
    assert run_command(monkeypatch, "train", path, "--dry-run") == 2
    told = capfd.readouterr().err
    assert told.startswith("error: ") and "remedy:" in told and "Traceback" not in told


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code of the command, run in this process."""
    from grpo_mega import launch

    monkeypatch.setattr("grpo_mega.launch._raise_on_signals", lambda: None)
    result: list[int] = []

    def body() -> int:
        outcome = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
            raise outcome.exception
        return outcome.exit_code

    result.append(launch.guarded(body))
    return result[0]
