"""One life of a training that logs to wandb, in a process that can be killed: `python -m tests.wandb_life`.

Orders come on stdin, one JSON list on each line, [name, argument, ...]; each is answered by one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
        command = [sys.executable, "-m", "tests.wandb_life", str(folder)]
        inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=inherited | environment,
            cwd=Path(__file__).parents[1],
        )

    def order(self, name: str, *arguments: object) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()  # SIGKILL
        self.process.wait()

    def exit(self, timeout: float) -> int:
        assert self.process.stdin
        self.process.stdin.close()
        return self.process.wait(timeout)


@contextmanager
def life(folder: Path, environment: dict[str, str]) -> Iterator[Life]:
    child = Life(folder, environment)
    try:
        yield child
    finally:
        child.kill()
        for stream in (child.process.stdin, child.process.stdout):
            if stream:
                stream.close()


def main() -> None:
    from grpo_mega.monitor.wandb_sync import WandbSyncManager

    manager = WandbSyncManager(sys.argv[1], "tests")
    actions = {
        "setup": lambda resumes, wait: manager.setup_wandb_run(resumes, {"lr": 0.1}, wait=wait),
        "log": lambda first, last: [manager.safe_log(metrics(step), step) for step in range(first, last + 1)],
        "finish": manager.finish,
        "status": manager.get_sync_status,
    }
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(actions[name](*arguments)), flush=True)


if __name__ == "__main__":
    main()
