"""What `grpo-mega doctor` says, line by line, and how it reads files that may hold anything."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import typer

LONGEST_TEXT = 1500
"""Characters of a line."""
LONGEST_LINE = 1 << 26
"""Bytes; a longer line was not written by a run."""

Level = Literal["ok", "note", "PROBLEM"]
COLOURS: dict[Level, str] = {"ok": "green", "note": "yellow", "PROBLEM": "red"}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `grpo-mega doctor`.

    Example: Check("PROBLEM", "checkpoint", "step_000010/common.pt is missing", "restore it from a copy")
    """

    level: Level
    name: str
    text: str
    remedy: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])  # the same for a program


def tell(checks: Iterable[Check], as_json: bool) -> list[Check]:
    """Each line as soon as it is known: some take seconds."""
    found = []
    for check in checks:
        found.append(check)
        if not as_json:
            label = typer.style(f"{check.level:8}", fg=COLOURS[check.level])
            remedy = f" | remedy: {one_line(check.remedy)}" if check.remedy else ""
            typer.echo(f"{label} {check.name}: {one_line(check.text)}{remedy}")
    return found


def one_line(text: str) -> str:
    """What a file says may hold anything, also what moves a terminal's cursor, or no encoding knows."""
    flat = re.sub(r"\s+", " ", text).strip()
    short = flat if len(flat) <= LONGEST_TEXT else flat[:LONGEST_TEXT] + " ..."
    visible = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)
    encoding = sys.stdout.encoding or "utf-8"
    return visible.encode(encoding, "backslashreplace").decode(encoding)


@dataclass(slots=True)
class Progress:
    """What metrics.jsonl says: its last step, and which lines are none."""

    step: int | None = None
    stage: str = ""
    stage_step: int = 0
    time: float = 0.0
    step_seconds: float = 0.0
    alarms: int = 0
    damaged: list[int] = field(default_factory=list[int])
    torn: bool = False  # the last line was cut short


def read_progress(path: Path) -> Progress:
    found = Progress()
    kinds = {"step": int, "stage": str, "stage_step": int, "time": int | float}
    for line, fields, whole in lines_of(path):
        if fields is None or not all(isinstance(fields.get(key), kind) for key, kind in kinds.items()):
            found.torn = not whole
            found.damaged += [line] if whole else []
            continue
        found.step, found.stage, found.stage_step = fields["step"], fields["stage"], fields["stage_step"]
        found.time = number(fields["time"], 0.0)
        found.step_seconds = number(fields.get("perf/step_seconds"), found.step_seconds)
        found.alarms = max(0, int(number(fields.get("guard/alarms"), found.alarms)))
    return found


def lines_of(path: Path) -> Iterator[tuple[int, dict[str, Any] | None, bool]]:
    """(number, its object or None, whether the line is whole) of each line."""
    with path.open("rb") as file:
        for place, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), start=1):
            yield place, _object(line), line.endswith(b"\n")


def json_object(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            return _object(file.read(LONGEST_LINE))
    except OSError:
        return None


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def number(value: object, otherwise: float) -> float:
    """Where it is finite: metrics.jsonl holds "nan" and "inf" as text, and a damaged one anything."""
    if not isinstance(value, int | float):
        return otherwise
    try:
        return float(value) if math.isfinite(value) else otherwise
    except OverflowError:
        return otherwise


def scalar(value: object) -> object:
    """For a program that reads --json: what should be a word or a number, and nothing endless."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"


def when(seconds: object) -> str:
    try:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(seconds)))  # pyright: ignore
        ago = time.time() - float(seconds)  # pyright: ignore
    except (ValueError, OverflowError, OSError, TypeError):
        return f"at an unknown time ({seconds!r})"
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if ago >= 2 * length:
            return f"{moment} ({ago / length:.0f} {unit} ago)"
    return f"{moment} ({ago:.0f} seconds ago)"


def size_of(files: Any) -> str:
    total = sum(path.stat().st_size for path in files)
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if total >= length:
            return f"{total / length:.1f} {unit}"
    return f"{total} bytes"
