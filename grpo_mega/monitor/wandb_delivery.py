"""The thread that talks to wandb, so that training never waits for a server."""

from __future__ import annotations

import atexit
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from grpo_mega.monitor.wandb_ledger import Key, Ledger, Record, RunLog
from grpo_mega.monitor.wandb_recovery import absorb_log, confirm, recover, rows_on_server

SETTLE_SECONDS = 2.0
"""Between looks into an offline log. More often frees backups sooner; wandb itself writes the log in
blocks."""
CONFIRM_SECONDS = 300.0
"""Between questions to the server, which cost about two seconds of a core."""
RECONNECT_SECONDS = 120.0
LAST_ROWS_SECONDS = 10.0
GOODBYE_SECONDS = 0.5
EXIT_SECONDS = 10.0
"""For a training that ends without finish()."""


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What wandb.init is asked for."""

    run_id: str
    project: str
    name: str | None
    group: str | None
    directory: Path
    config: Mapping[str, Any]
    continues: bool  # an id that exists already
    offline: bool


class Delivery:
    """Recovers what earlier processes left, connects, and hands records over in the order of their wire
    steps.

    A record handed over stays owed until it is seen in an offline log, or counted by the server.
    """

    def __init__(self, ledger: Ledger, request: RunRequest, fresh_run_id: Callable[[], str]):
        self._ledger = ledger
        self._request = request
        self._fresh_run_id = fresh_run_id
        self._backlog = ledger.owed()
        self._queue: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._run: Any = None
        self._log: RunLog | None = None
        self._services_before: list[psutil.Process] | None = None
        self._given_up = False  # the training ended before there was a connection
        self._handed_over: list[Key] = []  # and still owed
        self.attached = threading.Event()
        self.done = threading.Event()
        self.held: set[Key] = set()
        self.failures = 0
        self.connect_failures = 0
        self.last_error: str | None = None
        self.accepts = False  # False again after a record that wandb refused, until it takes one
        self.url: str | None = None
        self._thread = threading.Thread(target=self._work, name="wandb-delivery", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, record: Record) -> None:
        self._queue.put(record)

    def stop(self, timeout: float) -> bool:
        """Whether everything was handed over, and wandb said goodbye, in that time. The thread goes on."""
        self._stopping.set()
        self._queue.put(None)
        in_time = self.done.wait(timeout)
        atexit.unregister(self.stop)
        if not in_time and not self.attached.is_set():
            self.last_error = self.last_error or "wandb's server did not answer before the training ended"
            self._given_up = True
            self._end_service()
            atexit.register(self._let_thread_end)
        return in_time

    def _let_thread_end(self) -> None:
        """An interpreter that ends while a thread is in compiled code, such as an import, may end by SIGSEGV
        or SIGABRT: a run that is done would be called failed."""
        deadline = time.monotonic() + EXIT_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._end_service()
            self._thread.join(GOODBYE_SECONDS)

    @property
    def online(self) -> bool:
        return self._log is not None and self._log.online

    def _work(self) -> None:
        try:
            if self._connect():
                for record in self._backlog:
                    self._hand_over(record)
                self._deliver_until_stopped()
                self._close()
        except Exception as error:  # the end of this thread only: what is owed stays owed
            self._note(error)
            self.accepts = False
        finally:
            self.done.set()

    def _connect(self) -> bool:
        """Again and again until it works; False if the training ended before."""
        while True:
            try:
                self.held = recover(self._ledger, online=not self._request.offline)
                owed = {record.key for record in self._ledger.owed()} - self.held
                self._backlog = [record for record in self._backlog if record.key in owed]
                self._attach(*self._possible_request())
                return True
            except Exception as error:
                if not self._stopping.is_set():  # else it was cut short, see stop()
                    self.connect_failures += 1
                    self._note(error)
                    self._end_service()
            if self._stopping.wait(RECONNECT_SECONDS):
                return False

    def _possible_request(self) -> tuple[RunRequest, int | None]:
        """With the number of rows that the server has of the run; None if it is to be asked once the path of
        the run is known. A run goes on under its id only when that number is known: later rows are counted
        from there."""
        request = self._request
        logs = [log for log in self._ledger.state.logs if log.run_id == request.run_id]
        if request.offline:
            return request, 0
        if not logs:  # an id from the environment may have rows of which this folder knows nothing
            return request, None if request.continues else 0
        if all(log.online and log.closed for log in logs):
            on_server = rows_on_server(logs[0].path)
            if on_server is not None:
                return request, on_server
        config = {**request.config, "resumed_from": request.run_id}
        return replace(request, run_id=self._fresh_run_id(), config=config, continues=False), 0

    def _attach(self, request: RunRequest, rows_before: int | None) -> None:
        import wandb

        if self._services_before is None:
            self._services_before = _services()
            wandb.setup(wandb.Settings(silent=True))
            # After wandb's own hook, hence run before it, which may wait for minutes.
            atexit.unregister(self.stop)
            atexit.register(self.stop, EXIT_SECONDS)
        if self._given_up:
            raise ConnectionAbortedError("the training ended before wandb was there")
        settings: dict[str, Any] = {"silent": True}
        if "WANDB_CONSOLE" not in os.environ:
            settings["console"] = "off"  # wandb would put itself between the progress bar and the terminal
        run = wandb.init(
            id=request.run_id,
            project=request.project,
            name=request.name,
            group=request.group,
            dir=str(request.directory),
            config=dict(request.config) | git_state(Path(__file__)),
            resume="allow" if request.continues else None,
            mode="offline" if request.offline else "online",
            settings=wandb.Settings(**settings),
        )
        run.define_metric("_trainer_step")
        run.define_metric("*", step_metric="_trainer_step")
        log_path = Path(run.dir).parent / f"run-{run.id}.wandb"
        if log_path.is_relative_to(self._ledger.output_dir):
            log_path = log_path.relative_to(self._ledger.output_dir)
        path = "" if request.offline else f"{run.entity}/{run.project}/{run.id}"
        if rows_before is None:
            rows_before = rows_on_server(path)
            if rows_before is None:
                run.finish()
                raise ConnectionError("the server did not say how many rows it has of this run")
        log = RunLog(
            run_id=request.run_id,
            path=path,
            log=str(log_path),
            online=not request.offline,
            first_wire_step=self._ledger.first_wire_step,
            replayed=[record.key for record in self._backlog],
            server_base=rows_before,
        )
        self._ledger.state.logs.append(log)
        self._ledger.state.run_id = request.run_id
        self._ledger.save()  # before the first row: a crash from here on finds the log
        self._run, self._log, self.url = run, log, None if request.offline else run.url
        self.accepts = True
        self.attached.set()

    def _deliver_until_stopped(self) -> None:
        last_look = time.monotonic()
        while True:
            try:
                record = self._queue.get(timeout=SETTLE_SECONDS)
                if record is None:
                    return
                self._hand_over(record)
            except queue.Empty:
                pass
            if time.monotonic() - last_look >= (CONFIRM_SECONDS if self.online else SETTLE_SECONDS):
                self._settle()
                last_look = time.monotonic()

    def _hand_over(self, record: Record) -> None:
        try:
            # Never with step=: wandb drops a row whose step is not above the last one.
            self._run.log(wandb_row(record))
            self._handed_over.append(record.key)
            self.accepts = True
        except Exception as error:  # of this record alone: it stays owed, the next one may do
            self.accepts = False
            self.failures += 1
            self._note(error)
            self._ledger.mark_refused(record)

    def _end_service(self) -> None:
        """The process that wandb started to connect. Still trying, it would keep the interpreter from
        exiting; having failed, it calls the run's id taken. Nothing was handed to it, so nothing is lost."""
        import wandb

        before = self._services_before
        ours = [process for process in _services() if before is not None and process not in before]
        if not ours:
            return
        # First let wandb say goodbye, else it complains when the interpreter exits. It waits for the service.
        goodbye = threading.Thread(target=wandb.teardown, daemon=True)
        goodbye.start()
        goodbye.join(GOODBYE_SECONDS)
        for process in ours:
            with suppress(psutil.Error):
                process.kill()
        goodbye.join(GOODBYE_SECONDS)
        self._services_before = None

    def _settle(self) -> None:
        assert self._log is not None
        if self._log.online:
            confirm(self._ledger, self._log, self._handed_over)
        else:
            absorb_log(self._ledger, self._log)
        self._handed_over = [key for key in self._handed_over if self._ledger.owes(key)]

    def _close(self) -> None:
        assert self._log is not None
        self._run.finish()
        # finish() may return a moment before the last rows are on disk, or counted by the server
        deadline = time.monotonic() + LAST_ROWS_SECONDS
        self._settle()
        while self._handed_over:
            if time.monotonic() > deadline:
                return  # the next process finds out
            time.sleep(0.05)
            self._settle()
        self._log.closed = True
        self._ledger.save()

    def _note(self, error: Exception) -> None:
        self.last_error = f"{type(error).__name__}: {error}"


def wandb_row(record: Record) -> dict[str, Any]:
    import wandb

    row: dict[str, Any] = {
        "_trainer_step": record.trainer_step,
        "_wire_step": record.wire_step,
        "_record": record.name,
    }
    if record.kind == "metrics":
        row |= record.payload
    elif record.kind == "histograms":
        for name, (counts, edges) in record.payload.items():
            row[name] = wandb.Histogram(np_histogram=coarsened(counts, edges, wandb.Histogram.MAX_LENGTH))
    else:
        table = record.payload
        rows = [list(cells) for cells in table["rows"]]
        row[table["name"]] = wandb.Table(columns=list(table["columns"]), data=rows, allow_mixed_types=True)
    return row


def coarsened(counts: Sequence[float], edges: Sequence[float], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring bins joined until there are at most that many."""
    width = -(-len(counts) // most)
    starts = range(0, len(counts), width)
    joined = [sum(counts[start : start + width]) for start in starts]
    return np.array(joined), np.array([*(edges[start] for start in starts), edges[-1]])


def _services() -> list[psutil.Process]:
    """wandb's own processes below this one."""
    return [process for process in psutil.Process().children() if "wandb-core" in process.name()]


def git_state(file: Path) -> dict[str, object]:
    """Of the checkout that this file belongs to; nothing for an installed package."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return {"git": {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}}
    except (OSError, subprocess.SubprocessError):
        return {}
