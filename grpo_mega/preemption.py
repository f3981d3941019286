"""A run that is asked to leave saves first: SIGUSR1 and SIGTERM end it with exit code 85 after its current
step.

Slurm sends such a signal before a time limit and takes 85 as a wish to be requeued. Under this package's own
launcher the parent is asked, and passes the wish on as SIGUSR1: to its ranks SIGTERM means that another rank
failed, and then nothing can be saved.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from grpo_mega.engine.device import device
from grpo_mega.lifetime import LAUNCH_FOLDER, REQUEUE_EXIT_CODE, note

__all__ = ["REQUEUE_EXIT_CODE", "Preemption"]


PATIENCE_SECONDS = 5
"""torchrun and Slurm may say it twice at once; a second signal later than this ends the process."""


class Preemption:
    """with Preemption() as preemption: ... if preemption.asked(): save, and leave with REQUEUE_EXIT_CODE."""

    def __init__(self) -> None:
        self._received, self._asked_at = 0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        has_parent = LAUNCH_FOLDER in os.environ
        for number in (signal.SIGUSR1,) if has_parent else (signal.SIGUSR1, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._remember)
        if has_parent:
            note("saves").touch()  # from now on the parent passes wishes on
        return self

    def __exit__(self, *failure: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received and now - self._asked_at > PATIENCE_SECONDS:  # whoever asks does not want to wait
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self._received:
            self._received, self._asked_at = number, now

    def asked(self) -> str | None:
        """The signal's name, if any rank got one. A collective: all ranks leave after the same step."""
        received = torch.tensor([self._received], device=device())
        dist.all_reduce(received, dist.ReduceOp.MAX)
        return signal.Signals(int(received)).name if received else None
