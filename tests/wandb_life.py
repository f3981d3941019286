"""One life of a training that logs to wandb, in a process that can be killed.

Orders come through a pipe, each a list, [name, argument, ...], and each is answered.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.commands import become
from tests.processes import FORKS

SETUP_SECONDS = 60.0  # an upper bound for a loaded machine; it takes one
METRICS_OF_A_STEP = 60
"""Enough that a few dozen steps fill several of the blocks in which wandb writes its log."""


def metrics(step: int) -> dict[str, float]:
    return {f"metric/{index}": step + index / 100 for index in range(METRICS_OF_A_STEP)}


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this never happened"
        time.sleep(0.05)


class Life:
    """The other end: orders to a process of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        self._pipe, theirs = FORKS.Pipe()
        self.process = FORKS.Process(
            target=_begin, args=(folder, theirs, inherited | environment), daemon=False
        )
        self.process.start()
        theirs.close()

    def order(self, name: str, *arguments: object) -> Any:
        self._pipe.send([name, *arguments])
        return self._pipe.recv()

    def kill(self) -> None:
        self.process.kill()  # SIGKILL
        self.process.join()

    def exit(self, timeout: float) -> int:
        self._pipe.close()
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise TimeoutError(f"it did not end in {timeout:g} s")
        return self.process.exitcode


@contextmanager
def life(folder: Path, environment: dict[str, str]) -> Iterator[Life]:
    child = Life(folder, environment)
    try:
        yield child
    finally:
        child.kill()


def _begin(folder: Path, orders: Connection, environment: dict[str, str]) -> None:
    become(partial(_live, folder, orders), environment)


def _live(folder: Path, orders: Connection) -> None:
    """Until the other end is closed."""
    from grpo_mega.monitor.wandb_sync import WandbSyncManager

    manager = WandbSyncManager(folder, "tests")
    actions: dict[str, Callable[..., Any]] = {
        "setup": lambda resumes, wait: manager.setup_wandb_run(resumes, {"lr": 0.1}, wait=wait),
        "log": lambda first, last: [manager.safe_log(metrics(step), step) for step in range(first, last + 1)],
        "finish": manager.finish,
        "status": manager.get_sync_status,
    }
    while True:
        try:
            name, *arguments = orders.recv()
        except EOFError:
            return
        orders.send(actions[name](*arguments))
