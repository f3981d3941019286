"""Programs that belong to a run and end with it, however it ends: each is a process group (and session) of
its own, led by its guard, which ends the group when the trainer is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

STOP_SECONDS = 15.0
"""A server that was asked to end takes 6-10 s on a busy machine."""
LOG_LINES_SHOWN = 15

# What rules a rank of the trainer, and must not rule a server.
_TRAINER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"),
    *("OMP_NUM_THREADS", "TRITON_INTERPRET"),
)
_TRAINER_PREFIXES = ("TORCHELASTIC_", "GRPO_MEGA_")


def outside_environment() -> dict[str, str]:
    """This process's, without what is about ranks of a trainer and their packages."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _TRAINER_VARIABLES and not name.startswith(_TRAINER_PREFIXES)
    }
    return kept | {"PYTHONSAFEPATH": "1"}


@dataclass(eq=False)
class GuardedProcess:
    """Example:
    process = GuardedProcess(Path("run/servers/server-0.log"))
    process.start(["python", "-m", "sglang.launch_server"], outside_environment())
    process.stop()
    """

    log: Path  # what it prints is added here
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(f"\n== {time.strftime('%F %T')} {' '.join(command)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "grpo_mega.rollout.guard", str(os.getpid()), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        # not as an argument: everybody can read those
        self._process.stdin.write(json.dumps(dict(environment)).encode())
        self._process.stdin.close()

    @property
    def pid(self) -> int | None:
        """Of the guard, which is also the process group's."""
        return None if self._process is None else self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    @property
    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        return "\n  ".join(line[:200] for line in lines)

    def ask_to_end(self) -> None:
        if self._process is not None and self.is_running:
            self._process.terminate()

    def stop(self, limit_seconds: float = STOP_SECONDS) -> None:
        """Ask it to end, wait, then kill what is left of its process group."""
        if self._process is None:
            return
        if limit_seconds > 0:
            self.ask_to_end()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(limit_seconds)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
