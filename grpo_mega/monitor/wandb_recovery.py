"""Which of the records that are still owed did a process, perhaps one that crashed, deliver after all?

Offline, wandb's log tells: what is not in it is gone. Online the server is asked how many rows it has of
the run. Rows go out in the order in which they were handed over and each has its number, so n rows on the
server are the first n that were handed over. (`wandb sync` is no way to send the rest: it appends a whole
log to what the server has already.)"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

from grpo_mega.monitor.wandb_ledger import Key, Ledger, RunLog
from grpo_mega.monitor.wandb_log_file import scan

WRITER_EXIT_SECONDS = 30.0
"""How long to wait for an earlier process's wandb to let go of its log."""
QUESTION_SECONDS = 60.0

_COUNT_ROWS = "import sys, wandb; print(wandb.Api(timeout=20).run(sys.argv[1]).historyLineCount)"
"""In a process of its own: wandb retries for minutes, which only a killed process cuts short."""


def recover(ledger: Ledger, *, online: bool) -> set[Key]:
    """Close the logs of earlier processes. The keys of records that may have been received, but nobody can
    tell now: they stay owed until the server can be asked."""
    doubtful: set[Key] = set()
    for log in ledger.state.logs:
        if log.closed:
            continue
        known = _writer_is_gone(ledger, log)
        if known and log.online:
            known = online and confirm(ledger, log, ledger.owed_by(log))
        elif known:
            absorb_log(ledger, log)
        log.closed = known
        if not known:
            doubtful.update(ledger.owed_by(log))
    ledger.save()
    return doubtful


def absorb_log(ledger: Ledger, log: RunLog) -> None:
    """Settle the records that an offline log holds by now."""
    found = scan(ledger.log_path(log), log.scanned)
    if found.rows:
        log.scanned = found.end
        ledger.settle(
            (row.record, row.trainer_step)
            for row in found.rows
            if row.record is not None and row.trainer_step is not None
        )


def confirm(ledger: Ledger, log: RunLog, handed_over: Sequence[Key]) -> bool:
    """Settle the records that the server has by now, given those that are owed in the order in which they
    were handed over. False if the server does not answer."""
    on_server = rows_on_server(log.path)
    if on_server is None:
        return False
    new = max(0, on_server - log.server_base - log.confirmed)
    settled = handed_over[:new]
    log.confirmed += len(settled)
    ledger.settle(settled)
    return True


def rows_on_server(path: str) -> int | None:
    """How many rows the server has of a run; None if it does not answer."""
    answer = _run_bounded([sys.executable, "-c", _COUNT_ROWS, path], QUESTION_SECONDS)
    lines = (answer or "").split()
    return int(lines[-1]) if lines and lines[-1].isdigit() else None


def _run_bounded(command: list[str], seconds: float) -> str | None:
    """What it printed; None if it failed or took longer, in which case its whole process group is ended."""
    environment = os.environ | {"WANDB_SILENT": "true"}
    for name in ("WANDB_RUN_ID", "WANDB_SERVICE"):  # of this process's own run
        environment.pop(name, None)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=environment,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None
    return output if process.returncode == 0 else None


def _writer_is_gone(ledger: Ledger, log: RunLog) -> bool:
    path = str(ledger.log_path(log).resolve())
    deadline = time.monotonic() + WRITER_EXIT_SECONDS
    while _is_open_somewhere(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _is_open_somewhere(path: str) -> bool:
    """In a wandb process of this machine; those of other users cannot be looked into."""
    for process in psutil.process_iter(["name"]):
        if "wandb" not in (process.info["name"] or ""):
            continue
        try:
            if any(file.path == path for file in process.open_files()):
                return True
        except psutil.Error:
            continue
    return False
