"""Problems from jsonl and parquet files: every line is checked at opening, and read again when needed.

What stays in memory is 16 to 24 bytes a line, plus a bounded cache of parquet row groups. Ids, where lines
have some, are remembered while a file is opened: no two problems may share one.
"""

from __future__ import annotations

import json
import logging
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_mega.data.problem import Problem, did_you_mean
from grpo_mega.errors import UserError
from grpo_mega.recipe.blocks import DataBlock

log = logging.getLogger(__name__)

ROW_GROUP_CACHE_BYTES = 2**30
"""Decoded row groups kept for random access; reading one again costs tens of milliseconds."""

VALIDATION_ROWS = 1024
"""Rows turned into Python objects at a time while a parquet file is checked."""

UNREADABLE = (OSError, pa.ArrowException, ValueError, OverflowError)
"""What pyarrow raises at a damaged file; the last two where it holds names or sizes that Python cannot."""

MESSAGES_KEY = "messages"
ID_KEY = "id"
BOM = b"\xef\xbb\xbf"
MOST_NAMES, LONGEST_NAME = 20, 40
"""Of the fields that a message lists."""


class BadLine(Exception):
    """Why one line cannot be used, and what to do about it; the reader knows which line it is."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


class JsonlSource:
    """One JSON object a line; empty lines are ignored."""

    def __init__(self, path: Path, data: DataBlock):
        self._path, self._data = path, data
        self._places, self._lengths, self._lines = array("Q"), array("Q"), array("Q")
        bad_lines, ids = _BadLines(path, data), _Ids()
        for line, place, raw in _raw_lines(path):
            try:
                ids.check(_parse_line(raw, data), line)
            except BadLine as bad:
                bad_lines.report(line, bad)
            else:
                self._places.append(place)
                self._lengths.append(len(raw))
                self._lines.append(line)
        bad_lines.close(good=len(self))

    def __len__(self) -> int:
        return len(self._places)

    def where(self, index: int) -> str:
        return f"{self._path}:{self._lines[index]}"

    def problem(self, index: int) -> Problem:
        # Opened each time: a shared handle would share its position between threads and forked processes.
        with self._path.open("rb") as file:
            file.seek(self._places[index])
            raw = file.read(self._lengths[index])
        try:
            return _parse_line(raw, self._data)
        except BadLine as bad:
            raise _changed(self.where(index), bad) from bad


class ParquetSource:
    """One problem a row; rows are numbered from 1 in messages."""

    def __init__(self, path: Path, data: DataBlock):
        self._path, self._data = path, data
        try:
            self._file = pq.ParquetFile(path)
            names = self._file.schema_arrow.names
        except UNREADABLE as error:
            raise _unreadable(path, error) from error
        _check_columns(names, path, data)
        self._starts = array("Q", [0])
        self._rows = array("Q")
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        bad_lines, ids = _BadLines(path, data), _Ids()
        for row_number, row in self._all_rows():
            try:
                ids.check(_problem_of_row(row, data), row_number + 1)
            except BadLine as bad:
                bad_lines.report(row_number + 1, bad)
            else:
                self._rows.append(row_number)
        bad_lines.close(good=len(self))

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        return f"{self._path}:{self._rows[index] + 1}"

    def problem(self, index: int) -> Problem:
        row_number = self._rows[index]
        group = bisect_right(self._starts, row_number) - 1
        row = _objects(self._row_group(group).slice(row_number - self._starts[group], 1))[0]
        try:
            return _problem_of_row(row, self._data)
        except BadLine as bad:
            raise _changed(self.where(index), bad) from bad

    def _all_rows(self) -> Iterator[tuple[int, object]]:
        for group in range(self._file.num_row_groups):
            table = self._read(group)
            start = self._starts[-1]
            for offset in range(0, table.num_rows, VALIDATION_ROWS):
                rows = _objects(table.slice(offset, VALIDATION_ROWS))
                yield from enumerate(rows, start=start + offset)
            self._starts.append(start + table.num_rows)

    def _read(self, group: int) -> pa.Table:
        try:
            return self._file.read_row_group(group)
        except UNREADABLE as error:
            raise _unreadable(self._path, error) from error

    def _row_group(self, group: int) -> pa.Table:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        table = self._cache[group] = self._read(group)
        while (
            len(self._cache) > 1 and sum(held.nbytes for held in self._cache.values()) > ROW_GROUP_CACHE_BYTES
        ):
            self._cache.popitem(last=False)
        return table


def problem_of(row: object, data: DataBlock) -> Problem:
    """One line's object as a problem, or BadLine. Fields that are none of ours go to meta."""
    if not isinstance(row, dict):
        raise BadLine(
            f"it holds a {type(row).__name__}, not an object",
            'write one {"prompt": ..., "answer": ...} a line',
        )
    prompt_key = data.prompt_key
    if row.get(prompt_key) is None and row.get(MESSAGES_KEY) is not None:
        prompt_key = MESSAGES_KEY
    text, messages, last_turn = _prompt_of(row, prompt_key, data)
    teacher_response = row.get(data.teacher_key)
    if teacher_response is not None and not isinstance(teacher_response, str):
        raise BadLine(
            f"{data.teacher_key!r} holds a {type(teacher_response).__name__}, not a text",
            "write it as a string, or point data.teacher_key elsewhere",
        )
    ours = {prompt_key, MESSAGES_KEY, data.answer_key, data.teacher_key}
    meta = {key: value for key, value in row.items() if key not in ours}
    if messages is not None:
        meta[MESSAGES_KEY] = messages
    return Problem(
        text=text,
        answer=_answer_of(row.get(data.answer_key), data),
        teacher_response=last_turn if teacher_response is None else teacher_response,
        meta=meta,
    )


class _Prompt(NamedTuple):
    text: str
    messages: tuple[dict[str, str], ...] | None
    last_turn: str | None  # a final assistant message: what supervised stages learn


def _prompt_of(row: Mapping[str, Any], key: str, data: DataBlock) -> _Prompt:
    prompt = row.get(key)
    if prompt is None:
        names = [str(name)[:LONGEST_NAME] for name in row][:MOST_NAMES]
        raise BadLine(
            f"it has no {key!r} (it has: {', '.join(names) or 'nothing'})",
            f"set data.prompt_key; {did_you_mean(key, names)}",
        )
    if isinstance(prompt, str):
        if not prompt.strip():
            raise BadLine(f"{key!r} is empty", "give it a text, or remove the line")
        return _Prompt(prompt, None, None)
    if not isinstance(prompt, list):
        raise BadLine(
            f"{key!r} holds a {type(prompt).__name__}",
            "write a string, or a list of {role, content} messages",
        )
    return _chat_prompt(prompt, key, data)


def _chat_prompt(prompt: list[Any], key: str, data: DataBlock) -> _Prompt:
    messages = []
    for number, message in enumerate(prompt, start=1):
        role, content = (
            (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadLine(
                f"message {number} of {key!r} is not {{role, content}} with two texts",
                'write {"role": "user", "content": "..."}',
            )
        messages.append({"role": role, "content": content})
    last_turn = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else None
    if not messages or messages[-1]["role"] == "system" or not messages[-1]["content"].strip():
        raise BadLine(f"{key!r} asks nothing", "let the messages hold a user's turn with some text")
    if data.template == "raw" and [message["role"] for message in messages] != ["user"]:
        raise BadLine(
            f"{key!r} is a conversation, which a raw prompt cannot express",
            "set data.template to chat",
        )
    text = "\n\n".join(message["content"] for message in messages)
    return _Prompt(text, tuple(messages), last_turn)


def _answer_of(answer: object, data: DataBlock) -> str:
    """Numbers and truth values as JSON writes them; no answer is "", which rewards that need one refuse."""
    if answer is None:
        return ""
    if isinstance(answer, str):
        return answer
    if isinstance(answer, bool | int | float):
        return json.dumps(answer)
    raise BadLine(
        f"{data.answer_key!r} holds a {type(answer).__name__}",
        "write a text or a number, or point data.answer_key elsewhere",
    )


def _raw_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, place of the first byte, bytes) of every line that is not blank."""
    place = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if raw.removeprefix(BOM).strip():
                yield line, place, raw
            place += len(raw)


def _parse_line(raw: bytes, data: DataBlock) -> Problem:
    try:
        row = json.loads(raw.removeprefix(BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine(
            f"it is not UTF-8 ({error.reason} at byte {error.start})", "save the file as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4300 digits
        raise BadLine(f"it is not JSON ({error})", "write one whole JSON object on each line") from error
    problem = problem_of(row, data)
    texts = {
        data.prompt_key: problem.text,
        data.answer_key: problem.answer,
        data.teacher_key: problem.teacher_response or "",
    }
    for key, text in texts.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
            raise BadLine(
                f"{key!r} is not valid Unicode ({error.reason})", "write whole characters"
            ) from error
    return problem


def _objects(table: pa.Table) -> list[object]:
    """Its rows; in the place of one that Python cannot hold (no UTF-8, a year 10000) stands why not."""
    try:
        return table.to_pylist()
    except (ValueError, OverflowError) as error:
        if table.num_rows == 1:
            return [error]
    return [row for index in range(table.num_rows) for row in _objects(table.slice(index, 1))]


def _problem_of_row(row: object, data: DataBlock) -> Problem:
    if isinstance(row, Exception):
        raise BadLine(f"it cannot be read ({row})", "write the row again") from row
    return problem_of(row, data)


class _Ids:
    """Of the problems of a file: a digest each, so that long ones cost no more than short ones."""

    def __init__(self) -> None:
        self._lines: dict[bytes, int] = {}

    def check(self, problem: Problem, line: int) -> None:
        name = problem.meta.get(ID_KEY)
        if name is None:
            return
        text = json.dumps(name, sort_keys=True, default=repr)  # "7" and 7 are two ids
        first = self._lines.setdefault(blake2b(text.encode(), digest_size=16).digest(), line)
        if first != line:
            raise BadLine(
                f"its id {text[:LONGEST_NAME]} is that of line {first} already",
                "give each problem an id of its own, or remove one of the two lines",
            )


class _BadLines:
    """What happens to lines that cannot be used: the first stops the run, or each is reported and counted."""

    def __init__(self, path: Path, data: DataBlock):
        self._path, self._skip, self._count = path, data.on_bad_line == "skip", 0

    def report(self, line: int, bad: BadLine) -> None:
        if not self._skip:
            raise UserError(
                f"this line cannot be used: {bad.reason}",
                where=f"{self._path}:{line}",
                remedy=f"{bad.remedy} (or set data.on_bad_line to skip)",
            ) from bad
        self._count += 1
        log.warning("%s:%d skipped: %s", self._path, line, bad.reason)

    def close(self, *, good: int) -> None:
        if not good:
            raise UserError(
                f"the file has no line that can be used ({self._count} skipped)"
                if self._count
                else "the file is empty",
                where=str(self._path),
                remedy="give a file with at least one problem",
            )
        if self._count:
            log.warning("%s: %d lines skipped, %d used", self._path, self._count, good)


def _check_columns(names: list[str], path: Path, data: DataBlock) -> None:
    """A missing prompt column is one mistake of the recipe, not one of every row."""
    if data.prompt_key not in names and MESSAGES_KEY not in names:
        raise UserError(
            f"the file has no column {data.prompt_key!r} (it has: {', '.join(names) or 'none'})",
            where=str(path),
            remedy=f"set data.prompt_key; {did_you_mean(data.prompt_key, names)}",
        )


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"the file cannot be read as parquet: {(str(error) or repr(error)).splitlines()[0]}",
        where=str(path),
        remedy="write it again, or set data.source to jsonl if that is what it is",
    )


def _changed(where: str, bad: BadLine) -> UserError:
    return UserError(
        f"this line could be used when the run opened the file, and no longer can: {bad.reason}",
        where=where,
        law="a data file does not change while a run reads it",
        remedy="restore the file, or start the run again",
    )
