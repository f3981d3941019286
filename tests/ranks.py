"""Real ranks for tests: process pools that stay up for the whole session, so that a test pays for its
collectives and not for its imports. `pool.run(function, *args)` runs a module-level function on every rank
and returns its results by rank."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from grpo_mega.ports import reserved_port
from tests.processes import FORKS

ANSWER_TIMEOUT_SECONDS = 240


class RankPool:
    """`size` processes. They meet anew for each function: groups that were kept would keep their threads."""

    def __init__(self, size: int):
        self.size = size
        self._start()

    def _start(self) -> None:
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(self.size):
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(target=_serve, args=(rank, self.size, theirs), daemon=False)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Raises AssertionError with every failed rank's traceback; the pool is then new."""
        with reserved_port() as port:
            for pipe in self._pipes:
                pipe.send((port, function, args, kwargs))
            results, failures = self._answers()
        if failures:
            self.close()
            self._start()
            raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        return results

    def _answers(self) -> tuple[list[Any], dict[int, str]]:
        """Results by rank, and what went wrong: of a rank that gives no answer at all, under -1."""
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
        return results, failures

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()


def _serve(rank: int, size: int, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    from grpo_mega.lifetime import die_with_parent

    torch.set_num_threads(1)
    die_with_parent()
    while True:
        try:
            port, function, args, kwargs = pipe.recv()
        except EOFError:
            return
        os.environ["MASTER_PORT"] = str(port)
        gc.freeze()  # what is there is no litter of the function's
        try:
            answer = True, function(*args, **kwargs)
        except BaseException:
            answer = False, traceback.format_exc()
        if answer[0]:  # a failed pool is replaced; leaving a group others wait in could hang
            _leave_groups()
        pipe.send(answer)


def _leave_groups() -> None:
    """Megatron's wrappers and their gradient hooks hold each other where Python's collector cannot see. Left
    alone, each engine of the session would keep its process groups, and each of those its threads."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer

    from grpo_mega.engine.parallel import shutdown

    for item in gc.get_objects():
        # its type, and not isinstance, which asks objects that may be gone (weak references)
        if issubclass(type(item), DistributedDataParallel | MegatronOptimizer):
            vars(item).clear()
    shutdown()
    gc.collect()
