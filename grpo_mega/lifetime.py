"""Processes that end when the one that started them does. Imports none of the package: helpers start fast."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

LAUNCH_FOLDER = "GRPO_MEGA_LAUNCH_FOLDER"
"""Environment of a rank that this package's launcher started: where it leaves notes for its parent."""
REQUEUE_EXIT_CODE = 85
"""Saved on request; start me again."""

_PR_SET_PDEATHSIG = 1
_ABANDONED_EXIT_CODE = 1


def die_with_parent(parent: int | None = None) -> None:
    """End this process when its parent is gone, even by SIGKILL. For ranks, and for helpers they start.

    `parent` is the process id expected: it may be gone before this call, which is then the end.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()
    if parent is not None and os.getppid() != parent:
        os._exit(_ABANDONED_EXIT_CODE)


def serve_parent(parent: int) -> None:
    """For a helper that is needed until its parent has saved: a signal to the whole process group is the
    parent's to answer, and the helper ends with it anyway."""
    die_with_parent(parent)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def note(kind: str) -> Path:
    """A rank's note of this kind for its parent."""
    return Path(os.environ[LAUNCH_FOLDER]) / f"{os.environ['RANK']}.{kind}"


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(_ABANDONED_EXIT_CODE)
