"""Reading the log that wandb keeps of a run on this machine, `run-<id>.wandb`: which records are durable.

wandb has no public reader of it since 0.31. The file is LevelDB's log format: blocks of 32 KiB holding pieces
of records, each piece with a checksum, its length and whether it begins, continues or ends a record.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 32 * 1024
FILE_HEADER = struct.Struct("<4sHB")  # identifier, magic number, version
FILE_IDENTIFIER = (b":W&B", 0xBEE1, 0)
PIECE_HEADER = struct.Struct("<IHB")  # checksum, length, kind
WHOLE, FIRST, _MIDDLE, LAST = 1, 2, 3, 4  # kinds of pieces


@dataclass(frozen=True, slots=True)
class LoggedRow:
    """One row of the run's history. The keys are None in rows that somebody else logged into the run."""

    trainer_step: int | None
    wire_step: int | None
    record: str | None


@dataclass(frozen=True, slots=True)
class LogScan:
    rows: tuple[LoggedRow, ...]
    end: int  # bytes; where the next scan goes on


def scan(path: Path, start: int = 0) -> LogScan:
    """The rows that are complete on disk from `start` on. A log still being written ends in a torn record,
    which the next scan reads again."""
    from wandb.proto import wandb_internal_pb2 as protobuf

    rows, end = [], start
    if not path.exists():
        return LogScan((), start)
    with path.open("rb") as file:
        file.seek(start - start % BLOCK_BYTES)
        content = file.read()
    for body, end in _records(content, start, start - start % BLOCK_BYTES):  # noqa: B007 (the last end counts)
        record = protobuf.Record()  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
        record.ParseFromString(body)
        if record.WhichOneof("record_type") == "history":
            rows.append(
                _row({item.key or item.nested_key[0]: item.value_json for item in record.history.item})
            )
    return LogScan(tuple(rows), end)


def _row(values: dict[str, str]) -> LoggedRow:
    def read(key: str):
        return json.loads(values[key]) if key in values else None

    return LoggedRow(read("_trainer_step"), read("_wire_step"), read("_record"))


def _records(content: bytes, start: int, content_start: int) -> Iterator[tuple[bytes, int]]:
    """Each complete record with the position in the file behind it."""
    position = start - content_start
    if start == 0:
        if len(content) < FILE_HEADER.size:
            return
        if FILE_HEADER.unpack_from(content) != FILE_IDENTIFIER:
            raise ValueError("this is not a wandb log, or one of a version that is not known here")
        position = FILE_HEADER.size
    record = b""
    while position + PIECE_HEADER.size <= len(content):
        left_in_block = BLOCK_BYTES - position % BLOCK_BYTES
        if left_in_block < PIECE_HEADER.size:  # too short for a header: filled with zeros
            position += left_in_block
            continue
        checksum, length, kind = PIECE_HEADER.unpack_from(content, position)
        body_start = position + PIECE_HEADER.size
        piece = content[body_start : body_start + length]
        if kind == 0 or len(piece) < length or zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            return  # not (completely) written yet
        position = body_start + length
        record = piece if kind in (WHOLE, FIRST) else record + piece
        if kind in (WHOLE, LAST):
            yield record, content_start + position
