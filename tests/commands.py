"""Commands as a user gives them, each in a process of its own that starts in a blink: forked from one that
has imported everything. It has its own session, streams, environment, directory and signals, and so have the
ranks that it launches.

What this cannot show is that the interpreter finds the package and its entry point: some tests start those.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from tests.processes import FORKS

ROOT = Path(__file__).parents[1]
LONGEST_SECONDS = 300


def users_environment() -> dict[str, str]:
    """Without what makes a process of this one a rank."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "OMP_"))}


class Command:
    """`grpo-mega ARGUMENTS`, or a script with its arguments, running. Behaves as a Popen of text."""

    def __init__(
        self,
        *arguments: object,
        script: Path | None = None,
        environment: Mapping[str, str] | None = None,
        folder: Path = ROOT,
    ):
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("printed", "errors")]
        for file in self._files:
            file.touch()
        given = dict(users_environment() if environment is None else environment)
        names = [str(file) for file in self._files]
        words = [str(argument) for argument in arguments]
        self._process = FORKS.Process(target=_run, args=(words, script, given, folder, *names), daemon=False)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float = LONGEST_SECONDS) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("grpo-mega", timeout)
        return self._process.exitcode

    def communicate(self, timeout: float = LONGEST_SECONDS) -> tuple[str, str]:
        self.wait(timeout)
        printed, errors = (file.read_text() for file in self._files)
        return printed, errors


def run_command(
    *arguments: object,
    script: Path | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """To its end."""
    command = Command(*arguments, script=script, environment=environment, folder=folder)
    try:
        printed, errors = command.communicate()
    finally:
        command.kill()
    return subprocess.CompletedProcess(list(map(str, arguments)), command.wait(), printed, errors)


def _run(
    words: list[str], script: Path | None, environment: dict[str, str], folder: Path, out: str, err: str
) -> None:
    os.setsid()
    for number, path in ((1, out), (2, err)):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(folder)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = _Rank  # type: ignore[misc]
    command = ["-m", "grpo_mega", *words] if script is None else [str(script), *words]
    become(partial(_interpret, command), environment)


class _Rank(subprocess.Popen[str]):
    """What a launcher starts for a rank: a fork of the launcher, as if the interpreter had been started."""

    def _execute_child(self, args: list[str], *given: Any) -> None:
        environment = given[5]
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            command = [word for word in args[1:] if word != "-u"]
            become(partial(_interpret, command), environment)
        self._child_created = True


def become(body: Callable[[], None], environment: Mapping[str, str]) -> NoReturn:
    """An interpreter of its own, in a fresh fork, to its end: with what is done at an interpreter's end, and
    without what multiprocessing would do."""
    os.environ.clear()
    os.environ.update(environment)
    atexit._clear()
    tempfile.tempdir = None  # it is looked for anew
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(1)
    code = 1
    try:
        body()
        code = 0
    except SystemExit as ending:
        code = _code_of(ending)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    try:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] -- threads that are no daemons
        atexit._run_exitfuncs()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _interpret(words: list[str]) -> None:
    """`python WORDS`."""
    if words[:2] != ["-m", "grpo_mega"]:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
        return
    from grpo_mega.cli import main

    sys.argv = ["grpo-mega", *words[2:]]
    main()


def _code_of(ending: SystemExit) -> int:
    if ending.code is None or isinstance(ending.code, int):
        return ending.code or 0
    print(ending.code, file=sys.stderr)
    return 1
