"""What has been logged and what is still owed to wandb: the files that survive a crash.

wandb_sync_state.json       run ids, offset, last steps, and which records are in wandb's own logs
wandb_backup/step_*.json    one record each that is not known to be in one of those logs

A record is named by its key (trainer step, record name). At every instant each key that was ever admitted is
delivered (in the state file) or owed (a backup), because
  1. admit() writes the backup before anybody else sees the record, and
  2. settle() writes the state file before it removes the backup.
A crash between the two steps of settle() leaves a key both delivered and owed; opening the ledger removes the
backup. So a key that is neither is new, and one that is either must not be logged again.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

STATE_FILE = "wandb_sync_state.json"
BACKUP_FOLDER = "wandb_backup"
ABANDONED_FOLDER = "abandoned"
MAIN_RECORD = "train"

Key = tuple[str, int]  # record name, trainer step
Kind = Literal["metrics", "histograms", "table"]


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a run's history.

    Example: Record("train", 12, 14, "metrics", {"actor/loss": 0.1})
    """

    name: str  # "train", "eval", ...: with the trainer step, what makes the record unique
    trainer_step: int
    wire_step: int  # strictly increasing over all records and all runs of one output folder
    kind: Kind
    payload: Mapping[str, Any]
    refused: bool = False  # by wandb, when it was handed over

    @property
    def key(self) -> Key:
        return self.name, self.trainer_step

    @property
    def file_name(self) -> str:
        suffix = "" if self.name == MAIN_RECORD else "." + quote(self.name, safe="")
        return f"step_{self.trainer_step:06d}{suffix}.json"

    def to_json(self) -> str:
        not_finite = sorted(name for name, value in self.payload.items() if is_not_finite(value))
        fields = asdict(self) | {"payload": in_json(dict(self.payload)), "not_finite": not_finite}
        return json.dumps(fields, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Record:
        fields = json.loads(text)
        for name in fields.pop("not_finite"):
            fields["payload"][name] = float(fields["payload"][name])
        return cls(**fields)


@dataclass(slots=True)
class RunLog:
    """One attachment to wandb, and the log wandb kept of it."""

    run_id: str
    path: str  # entity/project/run id: how the server knows the run; empty offline
    log: str  # relative to the output folder where it lies inside
    online: bool
    first_wire_step: int  # of the records admitted by the process that attached; it hands over these ...
    replayed: list[Key]  # ... after those of earlier processes
    wire_limit: int | None = None  # records from here on were admitted by later processes
    closed: bool = False  # what is delivered through it is settled, and nobody adds to it
    scanned: int = 0  # bytes of an offline log that have been read
    server_base: int = 0  # rows the server had of the run before this attachment
    confirmed: int = 0  # rows of this attachment that the server is known to have


@dataclass(slots=True)
class SyncState:
    run_id: str | None = None
    project: str = ""
    group: str | None = None  # id of the first of the runs linked by resuming
    config_digest: str = ""
    offset: int = 0
    last_trainer_step: int = -1
    last_wire_step: int = -1
    pending: int = 0
    delivered: dict[str, list[list[int]]] = field(default_factory=dict)
    """Record name -> inclusive ranges of trainer steps."""
    logs: list[RunLog] = field(default_factory=list)


class Ledger:
    """Thread-safe: the training thread admits, the delivery thread settles."""

    def __init__(self, output_dir: Path):
        self.output_dir = output_dir
        self._folder = output_dir / BACKUP_FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self.state = self._read_state()
        self._delivered = {
            (name, step)
            for name, ranges in self.state.delivered.items()
            for first, last in ranges
            for step in range(first, last + 1)
        }
        self._owed: dict[Key, Record] = {}
        for record in self._read_backups():
            if record.key in self._delivered:
                self._backup(record).unlink()
            else:
                self._owed[record.key] = record
        self.state.last_wire_step = max(
            [self.state.last_wire_step, *(record.wire_step for record in self._owed.values())]
        )
        self.first_wire_step = self.state.last_wire_step + 1
        for log in self.state.logs:
            if log.wire_limit is None:
                log.wire_limit = self.first_wire_step

    def admit(self, name: str, trainer_step: int, kind: Kind, payload: Mapping[str, Any]) -> Record | None:
        """A new record, owed from now on; None if its key is known already."""
        with self._lock:
            if (name, trainer_step) in self._delivered or (name, trainer_step) in self._owed:
                return None
            state = self.state
            wire_step = max(trainer_step + state.offset, state.last_wire_step + 1)
            record = Record(name, trainer_step, wire_step, kind, payload)
            write_atomically(self._backup(record), record.to_json())
            self._owed[record.key] = record
            state.last_trainer_step, state.last_wire_step = trainer_step, wire_step
            return record

    def owed(self) -> list[Record]:
        with self._lock:
            return sorted(self._owed.values(), key=lambda record: record.wire_step)

    def owed_by(self, log: RunLog) -> list[Key]:
        """What the process that wrote this log may have handed over, in the order in which it did."""
        limit = math.inf if log.wire_limit is None else log.wire_limit
        admitted = [record.key for record in self.owed() if log.first_wire_step <= record.wire_step < limit]
        owed = [key for key in [*log.replayed, *admitted] if key in self._owed]
        return [key for key in owed if not self._owed[key].refused]

    def mark_refused(self, record: Record) -> None:
        """wandb did not take it: it is not among the rows of the run, whatever their number."""
        with self._lock:
            refused = self._owed[record.key] = replace(record, refused=True)
            write_atomically(self._backup(refused), refused.to_json())

    @property
    def owed_count(self) -> int:
        return len(self._owed)

    def owes(self, key: Key) -> bool:
        return key in self._owed

    @property
    def delivered_count(self) -> int:
        return len(self._delivered)

    def settle(self, keys: Iterable[Key]) -> None:
        """These records are durable in a log of wandb's."""
        with self._lock:
            settled = [self._owed.pop(key) for key in keys if key in self._owed]
            self._delivered.update(record.key for record in settled)
            self.save()
            for record in settled:
                self._backup(record).unlink(missing_ok=True)

    def forget_delivered(self) -> None:
        """For a run that is to hold every record again."""
        with self._lock:
            self._delivered.clear()
            self.save()

    def abandon_owed(self) -> int:
        """Backups of a training that another one replaces: set aside, not deleted. How many."""
        with self._lock:
            aside = self._folder / ABANDONED_FOLDER
            for record in self._owed.values():
                aside.mkdir(exist_ok=True)
                os.replace(self._backup(record), aside / record.file_name)
            count = len(self._owed)
            self._owed.clear()
            return count

    def save(self) -> None:
        with self._lock:
            self.state.pending = len(self._owed)
            self.state.delivered = _ranges(self._delivered)
            write_atomically(self.output_dir / STATE_FILE, json.dumps(asdict(self.state), indent=1))

    def log_path(self, log: RunLog) -> Path:
        return self.output_dir / log.log  # an absolute log.log replaces the folder

    def _backup(self, record: Record) -> Path:
        return self._folder / record.file_name

    def _read_state(self) -> SyncState:
        path = self.output_dir / STATE_FILE
        if not path.exists():
            return SyncState()
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["logs"] = [
            RunLog(**log | {"replayed": [tuple(key) for key in log["replayed"]]}) for log in fields["logs"]
        ]
        return SyncState(**fields)

    def _read_backups(self) -> list[Record]:
        return [
            Record.from_json(path.read_text(encoding="utf-8"))
            for path in sorted(self._folder.glob("step_*.json"))
        ]


def _ranges(keys: Iterable[Key]) -> dict[str, list[list[int]]]:
    """Example: {("eval", 10), ("train", 1), ("train", 2)} -> {"eval": [[10, 10]], "train": [[1, 2]]}"""
    ranges: dict[str, list[list[int]]] = {}
    for name, step in sorted(keys):
        of_name = ranges.setdefault(name, [])
        if of_name and of_name[-1][1] == step - 1:
            of_name[-1][1] = step
        else:
            of_name.append([step, step])
    return ranges


def write_atomically(path: Path, text: str) -> None:
    """All or nothing: a crash in between leaves what was there."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def count_not_finite(value: object) -> int:
    """In all depths."""
    if isinstance(value, Mapping):
        return sum(map(count_not_finite, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(count_not_finite, value))
    return int(is_not_finite(value))


def in_json(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become "nan", "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {str(key): in_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [in_json(part) for part in value]
    return str(value) if is_not_finite(value) else value
