"""metrics.jsonl and events.jsonl: one JSON object on each line, complete on disk as soon as it is written."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from grpo_mega.errors import UserError

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
        self._file = path.open("a", encoding="utf-8")

    def write(self, report: StepReport, stage_step: int) -> None:
        place = dict(zip(_PLACE_KEYS, (report.step, report.stage, stage_step, time.time()), strict=True))
        assert not place.keys() & report.metrics.keys()
        _append(self._file, place | dict(report.metrics))

    def close(self) -> None:
        self._file.close()


class EventsWriter:
    """Appends to events.jsonl: what happened to the run, across resumes."""

    def __init__(self, run_dir: Path):
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / EVENTS_FILE
        _rewrite(path, [line for line, _ in _lines(path)])
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, message: str, **fields: object) -> None:
        """Example: write("checkpoint", 50, "saved", path="checkpoints/50", seconds=1.2)"""
        _append(self._file, {"kind": kind, "step": step, "time": time.time(), "message": message} | fields)

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
        yield line.rstrip("\n") + "\n", fields


def _rewrite(path: Path, lines: list[str]) -> None:
    """All or nothing: a crash in between leaves the old file."""
    draft = path.with_suffix(".draft")
    draft.write_text("".join(lines), encoding="utf-8")
    os.replace(draft, path)


def _append(file: TextIO, fields: dict[str, Any]) -> None:
    file.write(json.dumps({key: _valid(value) for key, value in fields.items()}, allow_nan=False) + "\n")
    file.flush()


def _valid(value: object) -> object:
    """JSON has no NaN and no infinity: they become "nan", "inf" and "-inf", which float() reads back."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
