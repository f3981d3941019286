"""Runs in processes of their own that start in a blink: forked from one that has imported everything.

For tests that kill: a rank of the shared pools could not be killed without harm to other tests.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from grpo_mega.lifetime import die_with_parent
from grpo_mega.ports import reserved_port

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.forkserver"])
LONGEST_SECONDS = 240


def run_ranks(
    size: int, work: Callable[..., None], *arguments: Any, limit_seconds: float = LONGEST_SECONDS
) -> list[int]:
    """`work(*arguments)` on each of `size` joined ranks; their exit codes. When one is killed all are, as by
    a machine that goes down."""
    with reserved_port() as port:
        return _run(size, port, work, arguments, limit_seconds)


def _run(
    size: int, port: int, work: Callable[..., None], arguments: Sequence[Any], limit_seconds: float
) -> list[int]:
    ranks = [
        FORKS.Process(target=_rank, args=(rank, size, port, work, arguments), daemon=False)
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + limit_seconds
    try:
        while any(rank.exitcode is None for rank in ranks):
            assert time.monotonic() < deadline, "a rank hangs"
            if any(rank.exitcode not in (None, 0) for rank in ranks):
                time.sleep(0.2)
                break
            time.sleep(0.02)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return [rank.exitcode if rank.exitcode is not None else -1 for rank in ranks]


def _rank(rank: int, size: int, port: int, work: Callable[..., None], arguments: Sequence[Any]) -> None:
    die_with_parent()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
    import torch

    torch.set_num_threads(1)
    work(*arguments)
    os._exit(0)  # without the destructors of a process group, which may wait for others


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
