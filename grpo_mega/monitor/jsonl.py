"""metrics.jsonl and events.jsonl: one JSON object on each line, complete on disk as soon as it is written."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_mega.errors import DISK_FULL, UserError

if TYPE_CHECKING:  # types.py imports torch, which reading a file does not need
    from grpo_mega.types import StepReport

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"

_PLACE_KEYS = ("step", "stage", "stage_step", "time")


@dataclass(frozen=True, slots=True)
class MetricsRecord:
    """One line of metrics.jsonl. Several lines may share a step (training and evaluation).

    Example: {"step": 12, "stage": "grpo", "stage_step": 2, "time": 1760000000.0, "actor/loss": 0.1}
    """

    step: int  # over all stages
    stage: str
    stage_step: int  # within its stage
    time: float  # seconds since the epoch
    metrics: dict[str, float]


class MetricsWriter:
    """Appends to metrics.jsonl. A resumed run repeats the steps after its checkpoint: their old lines go."""

    def __init__(self, run_dir: Path, resume_step: int = 0):
        """`resume_step`: the first step to be written. Lines at or beyond it are dropped; 0 drops all."""
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        _rewrite(path, [line for line, fields in _lines(path) if fields["step"] < resume_step])
        self._file = _Lines(path)

    def write(self, report: StepReport, stage_step: int) -> None:
        place = dict(zip(_PLACE_KEYS, (report.step, report.stage, stage_step, time.time()), strict=True))
        assert not place.keys() & report.metrics.keys()
        self._file.append(place | dict(report.metrics))

    def close(self) -> None:
        self._file.close()


class EventsWriter:
    """Appends to events.jsonl: what happened to the run, across resumes."""

    def __init__(self, run_dir: Path):
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / EVENTS_FILE
        _rewrite(path, [line for line, _ in _lines(path)])
        self._file = _Lines(path)

    def write(self, kind: str, step: int, message: str, **fields: object) -> None:
        """Example: write("checkpoint", 50, "saved", path="checkpoints/50", seconds=1.2)"""
        self._file.append({"kind": kind, "step": step, "time": time.time(), "message": message} | fields)

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[MetricsRecord]:
    """All complete lines of a metrics.jsonl, also of a run that is still writing."""
    records = []
    for _, fields in _lines(path):
        place = [fields.pop(key) for key in _PLACE_KEYS]
        records.append(MetricsRecord(*place, metrics={name: float(value) for name, value in fields.items()}))
    return records


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line with its fields. A last line cut short by a crash is skipped; other damage is an error."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines) and not line.endswith("\n"):
                return
            raise UserError(
                "a line is not JSON",
                where=f"{path}:{number}",
                law="every line is one JSON object",
                remedy="remove that line; the rest of the file stays usable",
            ) from None
        if not isinstance(fields, dict) or not isinstance(fields.get("step"), int):
            raise UserError(
                "a line is no record",
                where=f"{path}:{number}",
                law="every line is one JSON object with a step",
                remedy="remove that line; the rest of the file stays usable",
            )
        yield line.rstrip("\n") + "\n", fields


def _rewrite(path: Path, lines: list[str]) -> None:
    """All or nothing: a crash in between leaves the old file."""
    draft = path.with_suffix(".draft")
    draft.write_text("".join(lines), encoding="utf-8")
    os.replace(draft, path)


class _Lines:
    """Appends JSON lines. What a full disk does not take is kept, and comes first when there is room again: a
    checkpoint that fills the disk for a moment costs no line."""

    def __init__(self, path: Path):
        self._path, self._file, self._kept = path, path.open("ab", buffering=0), b""

    def append(self, fields: dict[str, Any]) -> None:
        valid = {key: _valid(value) for key, value in fields.items()}
        self._kept += json.dumps(valid, allow_nan=False).encode() + b"\n"
        self._write()

    def close(self) -> None:
        self._write()
        self._file.close()
        if self._kept:
            raise UserError(
                f"the last {len(self._kept):,} bytes of {self._path.name} found no room on the disk",
                where=str(self._path),
                law="every step and every event is kept",
                remedy="make room there; --resume writes again what came after the newest checkpoint",
            )

    def _write(self) -> None:
        try:
            while self._kept:
                self._kept = self._kept[self._file.write(self._kept) :]
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise


def _valid(value: object) -> object:
    """JSON has no NaN and no infinity: they become "nan", "inf" and "-inf", which float() reads back."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
