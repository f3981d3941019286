"""Stands between the trainer and one of its servers, and ends the whole server when the trainer is gone.

A server is several processes. Its first dies with this one, by the kernel's word; the others see to
themselves only once they are up, and a server is some twenty seconds in coming up. So this process looks
whether its parent still lives, and kills the process group, of which it is the leader, when not.

    python -m grpo_mega.rollout.guard PARENT COMMAND...    the server's environment as JSON on standard input

Imports next to nothing, so that it starts in a blink and takes no memory to speak of.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

from grpo_mega.lifetime import die_with_parent

LOOK_EVERY_SECONDS = 0.5


def guard(parent: int, command: list[str]) -> int:
    """Run the command to its end; its exit code, as a shell gives it."""
    me, environment = os.getpid(), json.load(sys.stdin)
    # No thread but this one runs here, so that work between fork and exec is safe.
    server = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: die_with_parent(me),
    )
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    while server.poll() is None:
        if os.getppid() != parent:
            os.killpg(0, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            server.wait(LOOK_EVERY_SECONDS)
    code = server.returncode
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), sys.argv[2:]))
