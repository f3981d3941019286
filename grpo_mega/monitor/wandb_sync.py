"""Tracking on Weights & Biases that survives crashes, resumes and dead networks: each record exactly once.

What is promised, over all runs that one output folder ever started: every admitted record is in exactly one
row, of a log that wandb wrote offline or of a run on the server, or it is still a backup file.

Why it holds, with D the keys listed in wandb_sync_state.json and O the keys that have a backup file:
  - A key is admitted only if it is in neither D nor O, and it is in O before wandb hears of it. A resumed
    trainer that repeats the steps behind its checkpoint gets none of them in: their keys are in D or O.
  - A key goes from O to D only when its row was read back from wandb's offline log on disk, or the server has
    counted it: a crash takes rows out of wandb's buffers, but those are still in O.
  - What is in O is handed to a new run only after the log of every earlier one is closed and read to its
    end, or its server said how many rows it has. Without an answer it stays in O.
So no row is lost (O and D only pass a key on) and none is doubled (it is handed over again only when nothing
holds it). One process at a time may do this for a folder: a lock sees to it.

Outside of the promise: an offline log that was deleted before it was read (its rows are sent again), a
machine that loses power (the files are not forced to disk), rows that somebody else logs into an online run
(they count as ours), and `wandb sync` on the folder of an online run (it sends a second time what the
server has).

All talking to wandb happens on a thread of its own, see wandb_delivery. Values that are no finite numbers are
strings in the backup files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TextIO

from grpo_mega.monitor.wandb_delivery import Delivery, RunRequest
from grpo_mega.monitor.wandb_ledger import MAIN_RECORD, Kind, Ledger, count_not_finite, in_json
from grpo_mega.monitor.wandb_recovery import absorb_log

LOCK_FILE = "wandb_sync.lock"
CONNECT_GRACE_SECONDS = 2.0
"""How long the start of a run waits for the connection, so that a healthy one is there when training
begins."""
FINISH_SECONDS = 60.0

Policy = Literal["auto", "resume", "new"]


class SyncPhase(Enum):
    UNINITIALISED = "uninitialised"  # no run yet: records are kept
    ONLINE = "online"
    OFFLINE = "offline"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class SyncStatus:
    """For a person who asks why a chart is not moving."""

    phase: str
    run_id: str | None
    url: str | None
    pending: int  # records whose rows were not yet seen in a log or counted by the server
    held: int  # of those, the ones that wait until the server of an earlier run can be asked
    delivered: int
    skipped: int  # repeated after a resume, and already logged
    refused: int  # records that could not be kept at all
    failures: int  # of handing over
    connect_failures: int
    not_finite: int  # NaN and infinite values
    last_error: str | None


class WandbSyncManager:
    """setup_wandb_run, update_step_offset (after a resume), safe_log for each record, finish."""

    def __init__(
        self, output_dir: str | Path, project_name: str, run_name: str | None = None, policy: Policy = "auto"
    ):
        self.output_dir = Path(output_dir).resolve()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.project = os.environ.get("WANDB_PROJECT") or project_name
        self.run_name = os.environ.get("WANDB_NAME") or run_name
        self.policy: Policy = policy
        self._lock = threading.RLock()
        self._delivery: Delivery | None = None
        self._ledger: Ledger | None = None
        self._finished = False
        self._disabled = os.environ.get("WANDB_MODE") == "disabled"
        self._offset_fixed = False
        self._uncommitted: dict[str, Any] = {}
        self._skipped = self._refused = self._not_finite = 0
        self._last_error: str | None = None
        self._folder_lock = _lock_folder(self.output_dir)
        if self._folder_lock is None:
            self._last_error = f"another process, or another manager, logs from {self.output_dir}"
            return
        try:
            self._ledger = Ledger(self.output_dir)
        except (OSError, ValueError, KeyError, TypeError) as error:  # a damaged file of an earlier process
            self._last_error = f"{type(error).__name__}: {error}"

    @property
    def phase(self) -> SyncPhase:
        if self._finished:
            return SyncPhase.FINISHED
        if self._delivery is None or not self._delivery.attached.is_set():
            return SyncPhase.UNINITIALISED
        return SyncPhase.ONLINE if self._delivery.online else SyncPhase.OFFLINE

    def setup_wandb_run(
        self,
        resume_from_checkpoint: object,
        config: Mapping[str, Any],
        *,
        wait: float = CONNECT_GRACE_SECONDS,
    ) -> bool:
        """Start connecting. True if the run is there within `wait` seconds; if not, records are kept, and
        delivered once it is. `resume_from_checkpoint`: anything true if this training goes on from a
        checkpoint."""
        with self._lock:
            if self._ledger is None or self._finished or self._disabled:
                return False
            if self._delivery is None:
                try:
                    self._prepare(self._ledger, bool(resume_from_checkpoint), config)
                except Exception as error:
                    self._last_error = f"{type(error).__name__}: {error}"
                    return False
            delivery = self._delivery
        assert delivery is not None
        delivery.attached.wait(wait)
        return delivery.attached.is_set()

    def _prepare(self, ledger: Ledger, resumes: bool, config: Mapping[str, Any]) -> None:
        state = ledger.state
        for log in state.logs:
            if not log.closed and not log.online:
                absorb_log(ledger, log)
        plain_config = json.loads(json.dumps(in_json(config), default=str))
        digest = hashlib.sha256(json.dumps(plain_config, sort_keys=True).encode()).hexdigest()
        if not resumes:
            if state.config_digest and digest != state.config_digest:
                ledger.abandon_owed()  # numbers of a different training
            state.group = None
        if not resumes or self.policy == "new":
            ledger.forget_delivered()
        request = self._request(ledger, resumes, plain_config)
        state.config_digest, state.project, state.group = digest, request.project, request.group
        ledger.save()
        self._delivery = Delivery(ledger, request, fresh_run_id)
        self._delivery.start()

    def _request(self, ledger: Ledger, resumes: bool, config: Mapping[str, Any]) -> RunRequest:
        old_id = ledger.state.run_id if resumes else None
        wanted = os.environ.get("WANDB_RUN_ID") or (old_id if self.policy == "resume" else None)
        run_id = wanted or fresh_run_id()
        linked = old_id is not None and self.policy != "new"
        group = os.environ.get("WANDB_RUN_GROUP") or (ledger.state.group or old_id if linked else None)
        if linked and run_id != old_id:
            config = {**config, "resumed_from": old_id}
        return RunRequest(
            run_id=run_id,
            project=self.project,
            name=self.run_name,
            group=group or run_id,  # the first of a chain is in the group it gives its name to
            directory=Path(os.environ.get("WANDB_DIR") or self.output_dir),
            config=config,
            continues=wanted is not None,
            offline=os.environ.get("WANDB_MODE", "online") in ("offline", "dryrun"),
        )

    def update_step_offset(self, trainer_step: int) -> None:
        """After a resume: `trainer_step` is the checkpoint's. Counts once, before the first record; the wire
        steps continue behind the last one there was."""
        with self._lock:
            if self._ledger is None or self._offset_fixed:
                return
            self._offset_fixed = True
            state = self._ledger.state
            state.offset = max(0, state.last_wire_step - trainer_step)
            self._guarded(self._ledger.save)

    def safe_log(
        self,
        data: Mapping[str, Any],
        step: int | None = None,
        commit: bool = True,
        *,
        record: str = MAIN_RECORD,
    ) -> bool:
        """True if a live run has taken the record (or had it already). False: it is kept, and delivered
        later; only what cannot be written as JSON is refused. With `commit=False` the values wait for the
        next call."""
        with self._lock:
            if not isinstance(data, Mapping):
                return self._refuse(TypeError(f"a record is a mapping, not a {type(data).__name__}"))
            self._uncommitted.update(data)
            if not commit:
                return self._accepts()
            payload, self._uncommitted = self._uncommitted, {}
            return self._log(record, step, "metrics", payload)

    def log_histograms(self, step: int, histograms: Mapping[str, tuple[Any, Any]]) -> bool:
        """{name: (counts, edges)}, with one more edge than there are counts."""
        return self._log("histograms", step, "histograms", histograms)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> bool:
        return self._log(f"table/{name}", step, "table", {"name": name, "columns": columns, "rows": rows})

    def _log(self, name: str, step: int | None, kind: Kind, data: Mapping[str, Any]) -> bool:
        with self._lock:
            if self._ledger is None or self._finished or self._disabled:
                return False
            try:
                payload = {str(key): _plain(value) for key, value in data.items()}
                not_finite = count_not_finite(payload)
                if kind == "histograms":
                    _check_histograms(payload)
                if kind != "metrics":
                    payload = in_json(payload)
                if step is None:
                    step = self._ledger.state.last_trainer_step + 1
                record = self._ledger.admit(name, int(step), kind, payload)
            except Exception as error:
                return self._refuse(error)
            self._offset_fixed = True
            if record is None:
                self._skipped += 1
                return self._accepts()
            self._not_finite += not_finite
            if self._delivery is not None:
                self._delivery.put(record)
            return self._accepts()

    def _refuse(self, error: Exception) -> bool:
        self._refused += 1
        self._last_error = f"{type(error).__name__}: {error}"
        return False

    def _accepts(self) -> bool:
        return self._delivery is not None and self._delivery.accepts and not self._finished

    def _guarded(self, action) -> None:
        try:
            action()
        except Exception as error:
            self._last_error = f"{type(error).__name__}: {error}"

    def get_sync_status(self) -> dict[str, Any]:
        """The fields of SyncStatus."""
        with self._lock:
            ledger, delivery = self._ledger, self._delivery
            status = SyncStatus(
                phase=self.phase.value,
                run_id=ledger.state.run_id if ledger else None,
                url=delivery.url if delivery else None,
                pending=ledger.owed_count if ledger else 0,
                held=len(delivery.held) if delivery else 0,
                delivered=ledger.delivered_count if ledger else 0,
                skipped=self._skipped,
                refused=self._refused,
                failures=delivery.failures if delivery else 0,
                connect_failures=delivery.connect_failures if delivery else 0,
                not_finite=self._not_finite,
                last_error=(delivery.last_error if delivery else None) or self._last_error,
            )
        return asdict(status)

    def finish(self, timeout: float = FINISH_SECONDS) -> bool:
        """True if every record is known to be delivered and the run is closed. In any case this returns after
        about `timeout` seconds at the latest; what is not delivered by then will be at the next start."""
        with self._lock:
            if self._finished:
                return self._ledger is not None and self._ledger.owed_count == 0
        if self._uncommitted:
            self.safe_log({})
        with self._lock:
            self._finished = True
            ledger, delivery = self._ledger, self._delivery
        in_time = delivery.stop(timeout) if delivery is not None else False
        if ledger is not None:
            self._guarded(ledger.save)
        if self._folder_lock is not None and (delivery is None or in_time):
            _unlock_folder(self.output_dir, self._folder_lock)
            self._folder_lock = None
        return in_time and ledger is not None and ledger.owed_count == 0


_manager: WandbSyncManager | None = None
_locked_folders: set[Path] = set()


def initialize_wandb_sync_manager(
    output_dir: str | Path, project_name: str, run_name: str | None = None, policy: Policy = "auto"
) -> WandbSyncManager:
    """The manager that the functions below speak to. One that is already at work on this folder stays."""
    global _manager
    if _manager is not None and _manager.phase is not SyncPhase.FINISHED:
        if _manager.output_dir == Path(output_dir).resolve():
            return _manager
        _manager.finish()
    _manager = WandbSyncManager(output_dir, project_name, run_name, policy)
    return _manager


def get_wandb_sync_manager() -> WandbSyncManager | None:
    return _manager


def safe_wandb_log(data: Mapping[str, Any], step: int | None = None, commit: bool = True) -> bool:
    return _manager is not None and _manager.safe_log(data, step, commit)


def update_wandb_step_offset(trainer_step: int) -> None:
    if _manager is not None:
        _manager.update_step_offset(trainer_step)


def fresh_run_id() -> str:
    return secrets.token_hex(4)


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as those of Python, in all depths; what JSON cannot hold is an error."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, bool | int | float | str | None):
        return value
    if hasattr(value, "tolist"):  # a number or an array of numpy or torch
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be logged")


def _check_histograms(histograms: Mapping[str, Any]) -> None:
    for name, (counts, edges) in histograms.items():
        if len(edges) != len(counts) + 1:
            raise ValueError(f"{name}: {len(counts)} counts need {len(counts) + 1} edges, not {len(edges)}")


def _lock_folder(folder: Path) -> TextIO | None:
    """Held until the process ends, however it ends. Locks of this kind are not inherited by a fork, and do
    not keep out the own process, hence the set."""
    if folder in _locked_folders:
        return None
    file = (folder / LOCK_FILE).open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    _locked_folders.add(folder)
    return file


def _unlock_folder(folder: Path, file: TextIO) -> None:
    file.close()
    _locked_folders.discard(folder)
