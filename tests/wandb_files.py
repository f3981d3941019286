"""What wandb wrote to its own logs, read in a way of its own: by wandb's protobufs and whole files only."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768


def logs(folder: Path) -> list[Path]:
    """Oldest first."""

    def first_wire_step(log: Path) -> float:
        return next((row["_wire_step"] for row in rows(log) if "_wire_step" in row), float("inf"))

    return sorted(folder.rglob("run-*.wandb"), key=first_wire_step)


def rows(log: Path) -> list[dict[str, Any]]:
    """The history, oldest first."""
    return [
        {_name(item): json.loads(item.value_json) for item in record.history.item}
        for record in _records(log)
        if record.WhichOneof("record_type") == "history"
    ]


def all_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for log in logs(folder) for row in rows(log)]


def run_record(log: Path) -> Any:
    """Its project, group, name and so on."""
    return next(record.run for record in _records(log) if record.WhichOneof("record_type") == "run")


def config(log: Path) -> dict[str, Any]:
    values = {}
    for record in _records(log):
        kind = record.WhichOneof("record_type")
        updates = record.run.config.update if kind == "run" else ()
        updates = record.config.update if kind == "config" else updates
        values |= {_name(item): json.loads(item.value_json) for item in updates}
    return values


def x_axes(log: Path) -> dict[str, str]:
    """Metric or pattern -> what it is drawn over."""
    metrics = [record.metric for record in _records(log) if record.WhichOneof("record_type") == "metric"]
    return {metric.name or metric.glob_name: metric.step_metric for metric in metrics}


def _name(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _records(log: Path) -> Iterator[Any]:
    content, position, body = log.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < 7:
            position += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, position)
        piece = content[position + 7 : position + 7 + length]
        if kind == 0 or len(piece) < length:
            return  # cut off when its writer was killed
        assert zlib.crc32(bytes([kind]) + piece) == checksum
        position += 7 + length
        body += piece
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(body)
            yield record
            body = b""
