"""Whatever a file of prompts holds, it is read or refused with file, line and remedy: never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mega.data.sources import open_source
from grpo_mega.errors import UserError
from grpo_mega.recipe.blocks import DataBlock
from tests.unit.test_fuzz_recipes import SMALL, run_command

GOOD = b'{"prompt": "1+1=", "answer": "2"}'
MODES = ("fail", "skip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


def outcome(path: Path, content: bytes, mode: str, kind: str = "jsonl") -> int | UserError:
    """How many problems it holds, all of which can be read again; or why it was refused."""
    path.write_bytes(content)
    data = DataBlock.model_validate({"source": kind, "train": path, "on_bad_line": mode})
    try:
        source = open_source(data, "train", seed=0)
        for index in range(len(source)):
            assert source.problem(index).text.encode()
            assert source.where(index).startswith(f"{path}:")
        return len(source)
    except UserError as error:
        return error


def assert_helpful(found: int | UserError, path: Path, line: int | None = None) -> None:
    if isinstance(found, int):
        assert found > 0
        return
    told = str(found)
    assert str(found.where).startswith(f"{path}:{line}" if line else str(path)), told
    assert found.remedy and len(told) < 5000, told


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
ROWS = st.dictionaries(
    st.sampled_from(["prompt", "answer", "teacher", "messages", "id", "uid", "role", "content", "x"]),
    VALUES
    | st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", 3]), "content": VALUES})),
    max_size=5,
)
LINES = (
    st.just(GOOD)
    | ROWS.map(lambda row: json.dumps(row).encode())
    | VALUES.map(lambda row: json.dumps(row).encode())
    | st.binary(max_size=12)
    | st.sampled_from(
        [b"", b"   ", b"\xef\xbb\xbf", b"\x00", b"{", b"[" * 5000, b'{"prompt": ' + b"9" * 5000 + b"}"]
    )
)
ENDS = st.sampled_from([b"\n", b"\r\n"])


@given(
    lines=st.lists(LINES, max_size=5),
    end=ENDS,
    start=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    mode=st.sampled_from(MODES),
)
@settings(max_examples=100)
def test_jsonl(lines: list[bytes], end: bytes, start: bytes, mode: str, folder: Path):
    path = folder / "p.jsonl"
    assert_helpful(outcome(path, start + end.join(lines), mode), path)


BAD_LINES: dict[str, bytes] = {
    "no JSON": b'{"prompt": "x"',
    "no object": b"3",
    "no prompt": b'{"answer": "2"}',
    "a number for a prompt": b'{"prompt": 5}',
    "an empty prompt": b'{"prompt": "  "}',
    "a list for an answer": b'{"prompt": "x", "answer": [1]}',
    "no UTF-8": b'{"prompt": "\xff"}',
    "a NUL byte": b'{"prompt": "a\x00b"}',
    "only NUL": b"\x00\x00",
    "half a character": b'{"prompt": "\\ud800"}',
    "half a character in the answer": b'{"prompt": "x", "answer": "\\ud800"}',
    "half a character in the teacher": b'{"prompt": "x", "teacher_response": "\\ud800"}',
    "too deep": b'{"prompt": "x", "meta": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number beyond reading": b'{"prompt": "x", "answer": ' + b"9" * 5000 + b"}",
    "a huge line": b'{"prompt": "' + b"x" * 5_000_000,
    "a huge key": b'{"' + b"x" * 5_000_000 + b'": 1}',
    "messages that are none": b'{"messages": [{"role": 1}]}',
    "a message that asks nothing": b'{"messages": [{"role": "user", "content": " "}]}',
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_named_or_skipped(bad: str, folder: Path):
    path = folder / "bad.jsonl"
    content = b"\r\n".join([GOOD, b"", BAD_LINES[bad], GOOD])
    refused = outcome(path, content, "fail")
    assert isinstance(refused, UserError)
    assert_helpful(refused, path, 3)
    assert outcome(path, content, "skip") == 2


GOOD_LINES: dict[str, bytes] = {
    "a BOM": b"\xef\xbb\xbf" + GOOD,
    "CRLF": GOOD + b"\r\n",
    "a huge prompt": b'{"prompt": "' + b"x" * 5_000_000 + b'"}',
    "an escaped NUL": b'{"prompt": "a\\u0000b"}',
    "NaN": b'{"prompt": "x", "answer": NaN}',
    "a number of 400 digits": b'{"prompt": "x", "answer": ' + b"9" * 400 + b"}",
    "the same key twice": b'{"prompt": "x", "prompt": "y"}',
}


@pytest.mark.parametrize("good", GOOD_LINES)
def test_an_odd_line_is_a_problem_all_the_same(good: str, folder: Path):
    assert outcome(folder / "good.jsonl", GOOD_LINES[good], "fail") == 1


@pytest.mark.parametrize("content", [b"", b"\n\r\n  \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n\n"])
@pytest.mark.parametrize("mode", MODES)
def test_a_file_without_problems_is_refused(content: bytes, mode: str, folder: Path):
    path = folder / "empty.jsonl"
    found = outcome(path, content, mode)
    assert isinstance(found, UserError) and "empty" in found.what
    assert_helpful(found, path)


def test_skipping_every_line_leaves_nothing_to_train_on(folder: Path):
    path = folder / "bad.jsonl"
    found = outcome(path, b"{\n[]\n", "skip")
    assert isinstance(found, UserError) and "2 skipped" in found.what


@pytest.mark.parametrize("ids", [('"a"', '"a"'), ("7", "7"), ('"7"', '"7"')])
def test_an_id_that_occurs_twice_is_named_with_both_lines(ids: tuple[str, str], folder: Path):
    path = folder / "ids.jsonl"
    lines = [f'{{"id": {name}, "prompt": "x"}}' for name in (ids[0], '"other"', ids[1])]
    content = "\n".join(lines).encode()
    found = outcome(path, content, "fail")
    assert isinstance(found, UserError)
    assert_helpful(found, path, 3)
    assert f"{path}:1" in str(found) or "line 1" in str(found)
    assert outcome(path, content, "skip") == 2


def test_ids_of_unlike_kinds_and_none_at_all_are_no_duplicates(folder: Path):
    content = (
        b"\n".join(b'{"id": %s, "prompt": "x"}' % name for name in (b'"7"', b"7", b"null", b"null"))
        + b"\n"
        + GOOD
    )
    assert outcome(folder / "ids.jsonl", content, "fail") == 5


def table(**columns: list[object]) -> pa.Table:
    return pa.table(columns)


def parquet(folder: Path, content: pa.Table) -> bytes:
    path = folder / "made.parquet"
    pq.write_table(content, path)
    return path.read_bytes()


def test_parquet_with_other_columns(folder: Path):
    path = folder / "p.parquet"
    for mode in MODES:
        found = outcome(path, parquet(folder, table(question=["1"], answer=["2"])), mode, "parquet")
        assert isinstance(found, UserError) and "question" in found.what
        assert_helpful(found, path)
        assert_helpful(outcome(path, parquet(folder, table(prompt=[1, 2])), mode, "parquet"), path)
        for empty in (table(prompt=[]), table()):
            assert isinstance(outcome(path, parquet(folder, empty), mode, "parquet"), UserError)


def test_parquet_names_its_bad_row_or_skips_it(folder: Path):
    path = folder / "p.parquet"
    rows = parquet(folder, table(prompt=["x", None, "y"], id=["a", "b", "a"]))
    found = outcome(path, rows, "fail", "parquet")
    assert isinstance(found, UserError)
    assert_helpful(found, path, 2)
    assert outcome(path, rows, "skip", "parquet") == 1
    twice = outcome(path, parquet(folder, table(prompt=["x", "y"], id=[3, 3])), "fail", "parquet")
    assert isinstance(twice, UserError)
    assert_helpful(twice, path, 2)


def test_parquet_rows_that_python_cannot_hold(folder: Path):
    path = folder / "p.parquet"
    offsets, characters = pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])), pa.py_buffer(b"x\xff")
    prompts = pa.StringArray.from_buffers(2, offsets, characters)
    far = pa.array([0, 2**60], pa.timestamp("us"))
    for rows in (pa.table({"prompt": prompts}), pa.table({"prompt": ["x", "y"], "when": far})):
        found = outcome(path, parquet(folder, rows), "fail", "parquet")
        assert isinstance(found, UserError)
        assert_helpful(found, path, 2)
        assert outcome(path, parquet(folder, rows), "skip", "parquet") == 1


def test_parquet_whose_column_has_no_name_in_utf8(folder: Path):
    path = folder / "p.parquet"
    content = parquet(folder, table(prompt=["x"])).replace(b"prompt", b"pr\xffmpt")
    found = outcome(path, content, "skip", "parquet")
    assert isinstance(found, UserError)
    assert_helpful(found, path)


@given(data=st.data(), mode=st.sampled_from(MODES))
@settings(max_examples=120)
def test_parquet_that_is_damaged(data: st.DataObject, mode: str, folder: Path):
    path = folder / "d.parquet"
    content = bytearray(parquet(folder, table(prompt=["x" * 50, "y"], answer=["1", "2"])))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    assert_helpful(outcome(path, bytes(content), mode, "parquet"), path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 3, GOOD, b"\x00" * 100])
def test_what_is_no_parquet_is_refused(content: bytes, folder: Path):
    path = folder / "n.parquet"
    found = outcome(path, content, "skip", "parquet")
    assert isinstance(found, UserError)
    assert_helpful(found, path)


@pytest.mark.parametrize("bad", ["no JSON", "no UTF-8", "too deep", "a huge line"])
def test_the_command_line_explains_it(
    bad: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    prompts, recipe = folder / "cli.jsonl", folder / "r.yaml"
    prompts.write_bytes(GOOD + b"\n" + BAD_LINES[bad])
    recipe.write_text(yaml.safe_dump(SMALL | {"data": {"source": "jsonl", "train": str(prompts)}}))
    assert run_command(monkeypatch, "data", recipe) == 2
    told = capfd.readouterr().err
    assert f"{prompts}:2" in told and "remedy:" in told and "Traceback" not in told
