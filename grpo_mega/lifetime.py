"""Processes that end when the one that started them does. Imports none of the package: helpers start fast."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

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


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(_ABANDONED_EXIT_CODE)
