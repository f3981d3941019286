"""A run that hangs is worse than one that dies: nobody is told, and its GPUs are paid for. Each rank watches
its own steps, and when none has finished for too long leaves its stack and asks for another start."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from grpo_mega.lifetime import REQUEUE_EXIT_CODE

LOOKS_PER_LIMIT = 100
LONGEST_LOOK_SECONDS = 5.0
WRITE_SECONDS = 30
"""How long the stack may take to be written: a hung file system is one reason to be here."""


class Watchdog:
    """watchdog.start() before the first step, tick() after each, stop() at the end.

    Time in which the process was stopped (by SIGSTOP, or a laptop's lid) does not count: one that goes on has
    not hung. Its neighbours, which waited, find that it has.
    """

    def __init__(self, minutes: float, folder: Path, rank: int):
        """`minutes` without a tick are a hang; 0 = never. The stack goes to `folder`/rank_N.txt."""
        self._minutes, self._limit = minutes, minutes * 60
        self._path, self._rank = folder / f"rank_{rank}.txt", rank
        self._idle = 0.0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._limit > 0 and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def tick(self) -> None:
        """A step, an evaluation or a checkpoint has been finished."""
        self._idle = 0.0

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        look = min(self._limit / LOOKS_PER_LIMIT, LONGEST_LOOK_SECONDS)
        before = time.monotonic()
        while not self._stopped.wait(look):
            now = time.monotonic()
            self._idle += min(now - before, 2 * look)  # more than that was not spent hanging but stopped
            before = now
            if self._idle > self._limit:
                self._leave()

    def _leave(self) -> None:
        writer = threading.Thread(target=self._say_why, daemon=True)
        writer.start()
        writer.join(WRITE_SECONDS)
        os._exit(REQUEUE_EXIT_CODE)  # whatever the main thread hangs in would not let it end

    def _say_why(self) -> None:
        message = (
            f"rank {self._rank}: nothing finished in {self._minutes:g} minutes (guard.hang_minutes); "
            f"its stack is in {self._path}; leaving for another start\n"
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("w", encoding="utf-8") as file:
            file.write(message)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        sys.stderr.write(message)
        sys.stderr.flush()
