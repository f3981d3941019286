"""Real ranks for tests: process pools that stay up for the whole session, so that a test pays for its
collectives and not for its imports. `pool.run(function, *args)` runs a module-level function on every rank
and returns its results by rank."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

ANSWER_TIMEOUT_SECONDS = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RankPool:
    """`size` processes joined by gloo."""

    def __init__(self, size: int):
        self.size = size
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, port, theirs), daemon=False)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Raises AssertionError with every failed rank's traceback; the pool is then new."""
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        results: list[Any] = [None] * self.size
        failures: dict[int, str] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            # after the first failure the others may wait for ever in a collective
            ready = wait(list(waiting), timeout=5 if failures else ANSWER_TIMEOUT_SECONDS)
            if not ready:
                failures.setdefault(-1, f"ranks {sorted(waiting.values())} gave no answer")
                break
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    succeeded, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    succeeded, value = False, "the process died"
                if succeeded:
                    results[rank] = value
                else:
                    failures[rank] = value
        if failures:
            self.close()
            self._start()
            raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
