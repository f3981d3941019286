"""A run that hangs is worse than one that dies: nobody is told, and its GPUs are paid for. Each rank watches
its own steps, and when none has finished for too long leaves its stack, says where the others are, and asks
for another start. The one that all wait for shows: it is somewhere else, or has left no stack at all."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from grpo_mega.lifetime import REQUEUE_EXIT_CODE

LOOKS_PER_LIMIT = 100
LONGEST_LOOK_SECONDS = 5.0
WRITE_SECONDS = 30
"""How long the stack may take to be written: a hung file system is one reason to be here."""
NEIGHBOUR_SECONDS = 20.0
"""How long the others' stacks are waited for, and at most half of the limit."""

_PACKAGE = str(Path(__file__).parent)


class Watchdog:
    """watchdog.start() before the ranks meet, tick() when they have and after each step, stop() at the end.

    Time in which the process was stopped (by SIGSTOP, or a laptop's lid) does not count: one that goes on has
    not hung. Its neighbours, which waited, find that it has.
    """

    def __init__(self, minutes: float, folder: Path, rank: int, world_size: int):
        """`minutes` without a tick are a hang; 0 = never. The stack goes to `folder`/rank_N.txt."""
        self._minutes, self._limit = minutes, minutes * 60
        self._folder, self._rank, self._world_size = folder, rank, world_size
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
            f"leaving for another start\n"
        )
        path = self._stack_of(self._rank)
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        with draft.open("w", encoding="utf-8") as file:
            file.write(f"{_place()}\n{message}")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        draft.rename(path)  # the others never read half of it
        sys.stderr.write(message + "".join(f"  {line}\n" for line in self._whereabouts()))
        sys.stderr.write(f"  stacks: {self._folder}\n")
        sys.stderr.flush()

    def _stack_of(self, rank: int) -> Path:
        return self._folder / f"rank_{rank}.txt"

    def _whereabouts(self) -> list[str]:
        deadline = time.monotonic() + min(NEIGHBOUR_SECONDS, self._limit / 2)
        while len(places := self._places()) < self._world_size and time.monotonic() < deadline:
            time.sleep(0.1)
        return describe(places, self._world_size)

    def _places(self) -> dict[int, str]:
        """Of the ranks that have left a stack in this hang; files of an earlier one are older."""
        oldest = self._stack_of(self._rank).stat().st_mtime - self._limit / 2
        places: dict[int, str] = {}
        for rank in range(self._world_size):
            path = self._stack_of(rank)
            if path.is_file() and path.stat().st_mtime > oldest:
                places[rank] = path.read_text(encoding="utf-8").partition("\n")[0]
        return places


def describe(places: Mapping[int, str], world_size: int) -> list[str]:
    """The ranks by where they are, those that are missing first."""
    missing = [rank for rank in range(world_size) if rank not in places]
    by_place: dict[str, list[int]] = defaultdict(list)
    for rank, place in sorted(places.items()):
        by_place[place].append(rank)
    lines = [
        f"{_named(ranks)}: {place}" for place, ranks in sorted(by_place.items(), key=lambda x: len(x[1]))
    ]
    if missing:
        lines.insert(0, f"{_named(missing)}: missing; left no stack: the process or its node stands still")
    return lines


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _place() -> str:
    """Where the main thread is, in our own code if it came from there.

    Example: "grpo_mega/engine/exchange.py:61 in all_to_all"
    """
    ident = threading.main_thread().ident
    innermost = frame = sys._current_frames()[ident] if ident is not None else None
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    found = frame or innermost
    if found is None:
        return "nowhere"
    file = found.f_code.co_filename.replace(_PACKAGE, Path(_PACKAGE).name)
    return f"{file}:{found.f_lineno} in {found.f_code.co_name}"
