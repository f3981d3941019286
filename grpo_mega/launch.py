"""Starts the processes a run asks for on this machine, and sees to it that they end together.

`guarded(body)` wraps all a process does and turns failures into one message and an exit code. In the body
`run_distributed(worker, world_size, command)` either starts `python <command>` for each rank and waits, or,
in a process that is a rank already (started so, or by torchrun or srun), calls `worker`.

Exit codes: 0 done; 1 an unexpected exception; 2 a UserError; 85 saved on request (see `preemption`); 128 + n
signal n (130 Ctrl-C, 143 SIGTERM).

Who speaks: a rank that fails leaves a report in the launch folder, and the parent prints the one that caused
the others. Under torchrun there is no such parent: the first rank to fail prints, the others stay quiet.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from grpo_mega.errors import USER_ERROR_EXIT_CODE, UserError, as_users_see_it
from grpo_mega.lifetime import LAUNCH_FOLDER, REQUEUE_EXIT_CODE, die_with_parent, note
from grpo_mega.monitor.console import print_error, print_plain
from grpo_mega.ports import reserved_port

CRASH_EXIT_CODE = 1
FAILURE_GRACE_SECONDS = 10
"""How long a rank may outlive one that failed before it is killed."""

_PARENT = "GRPO_MEGA_LAUNCH_PARENT"
_TORCHRUN_RANK = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
_STALE_CLAIM_SECONDS = 60
_STARTED = time.time()

_LOST_PEER = re.compile(r"gloo|NCCL|Connection (closed|reset) by peer|Broken pipe", re.IGNORECASE)
_SIGNAL_HINTS = {
    signal.SIGKILL: "the system does this when memory runs out (see dmesg): lower train.micro_batch_tokens "
    "or rollout.prompts_per_batch, or start fewer ranks on this machine",
    signal.SIGBUS: "shared memory (/dev/shm) is full: enlarge it, in Docker with --shm-size",
    signal.SIGSEGV: "a native library crashed; the Python stack is above",
    signal.SIGABRT: "a native library gave up; its own message is above",
}


class Interrupted(BaseException):
    """A signal asked this process to end. Not an Exception: nothing on the way may take it for a failure."""

    def __init__(self, number: int):
        super().__init__(number)
        self.exit_code = REQUEUE_EXIT_CODE if number == signal.SIGUSR1 else 128 + number


@dataclass(frozen=True)
class _Report:
    """What a failed rank leaves for its parent. `lost_peer`: it only noticed that another was gone."""

    rank: int
    user_error: bool
    text: str
    time: float = field(default_factory=time.time)
    lost_peer: bool = False


def inside_launcher() -> bool:
    """Whether this process is already one rank of a run."""
    return "TORCHELASTIC_RUN_ID" in os.environ or os.environ.keys() >= _TORCHRUN_RANK


def is_lead() -> bool:
    """Whether this process does what is done once: the parent, a lone process, or rank 0 of torchrun."""
    if LAUNCH_FOLDER in os.environ:
        return False
    return not inside_launcher() or os.environ.get("RANK", "0") == "0"


def run_distributed(
    worker: Callable[[], None], world_size: int, command: Sequence[str], *, verbose: bool = False
) -> int:
    """Run `worker` on `world_size` ranks and return the exit code.

    `command` is what follows the Python interpreter to come back to this very call, for example
    ("-m", "grpo_mega", "train", "recipe.yaml"). A single rank runs here, in this process.
    """
    if inside_launcher():
        worker()
        return 0
    if world_size == 1:
        with reserved_port() as port:
            os.environ.update(_quiet_numerics(verbose) | _lone_rank(port))
            worker()
        return 0
    return _launch(world_size, command, verbose)


def guarded(body: Callable[[], int]) -> int:
    """The outermost call of a process: its exit code, after saying what went wrong."""
    is_rank = inside_launcher()  # asked now: a lone rank's environment will say the same
    if is_rank:
        _enter_worker()
    else:
        _raise_on_signals()
    try:
        code = body()
    except SystemExit as ending:
        code = _code_of(ending)
    except Interrupted as interruption:
        print_plain(
            "\ninterrupted" if sys.stderr.isatty() else "interrupted"
        )  # a terminal shows ^C before it
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # should leaving the interpreter hang, the next one ends it
        return interruption.exit_code
    except Exception as error:
        code = _fail(error, is_rank)
    if code == 0 and LAUNCH_FOLDER in os.environ:
        note("done").touch()
    return code


def _enter_worker() -> None:
    """A rank asked to end dies at once, silently: its parent speaks, and files must survive SIGKILL anyway.

    Python's own handlers would wait for a collective to return, which may be never.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    faulthandler.enable()
    if LAUNCH_FOLDER in os.environ:
        die_with_parent(int(os.environ[_PARENT]))
        note("pid").write_text(str(os.getpid()))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


def _fail(error: Exception, is_rank: bool) -> int:
    """Say what went wrong, or leave that to the parent. A rank does not return from here."""
    error = as_users_see_it(error)
    user_error = isinstance(error, UserError)
    text = str(error) if user_error else _traceback_of(error)
    if not is_rank:
        print_error(text) if user_error else print_plain(text)
        return _exit_code(user_error)
    rank = int(os.environ["RANK"])
    report = _Report(rank, user_error, text, lost_peer=not user_error and _is_lost_peer(error))
    if LAUNCH_FOLDER in os.environ:
        draft = note("draft")
        draft.write_text(json.dumps(asdict(report)))
        draft.rename(note("report"))  # the parent never reads half a report
    elif _claim_failure():
        _print_report(report)
    leave(_exit_code(user_error))


def _traceback_of(error: Exception) -> str:
    """From the worker on: how the command line got there says nothing."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code is not run_distributed.__code__:
        frames = frames.tb_next
    own = frames.tb_next if frames is not None else error.__traceback__
    return "".join(traceback.format_exception(type(error), error, own)).rstrip()


def leave(code: int) -> NoReturn:
    """Past destructors, and past what is left to do at exit: with other ranks gone, a process group's may
    wait for them for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_lost_peer(error: BaseException) -> bool:
    return isinstance(error, ConnectionError) or bool(_LOST_PEER.search(str(error)))


def _claim_failure() -> bool:
    """Whether this is the first rank of its torchrun (or srun) on this machine to fail."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "MASTER_PORT")
    key = "-".join([str(os.getppid()), *(os.environ.get(name, "") for name in names)])
    claim = Path(tempfile.gettempdir()) / f"grpo_mega-failed-{re.sub(r'[^0-9A-Za-z-]', '_', key)}"
    with suppress(FileNotFoundError):
        if claim.stat().st_mtime < _STARTED - _STALE_CLAIM_SECONDS:
            claim.unlink()  # of an earlier run that had the same numbers
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # better said twice than not at all
    return True


def _lone_rank(port: int) -> dict[str, str]:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _quiet_numerics(verbose: bool) -> dict[str, str]:
    """One compute thread for each rank, so that sums keep their order and ranks do not fight over cores."""
    wanted = {"OMP_NUM_THREADS": "1"} | ({} if verbose else {"TORCH_CPP_LOG_LEVEL": "ERROR"})
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def _raise_on_signals() -> None:
    """The first signal raises Interrupted; later ones are ignored: the clean-up is short and must finish."""

    def answer(number: int, frame: FrameType | None) -> None:
        for other in ending:
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    candidates = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    # nohup and background shells have told us to ignore some.
    ending = [number for number in candidates if signal.getsignal(number) is not signal.SIG_IGN]
    for number in ending:
        signal.signal(number, answer)


def _launch(world_size: int, command: Sequence[str], verbose: bool) -> int:
    with tempfile.TemporaryDirectory(prefix="grpo_mega-") as name:
        folder = Path(name)
        reaper = _Reaper(folder)
        # The agent gives its own environment to the ranks.
        os.environ.update(_quiet_numerics(verbose) | {LAUNCH_FOLDER: name, _PARENT: str(os.getpid())})
        reaper.start()
        _pass_wishes_on(folder)
        try:
            exit_codes = _run_agent(world_size, command, folder, verbose)
        finally:
            del os.environ[LAUNCH_FOLDER], os.environ[_PARENT]
            reaper.stop()
            _restore_cursor()
        return _explain(folder, world_size, exit_codes, reaper.killed) if exit_codes else 0


def _pass_wishes_on(folder: Path) -> None:
    """A first SIGTERM or SIGUSR1 is a wish that ranks which can save hear of; otherwise it ends the run."""
    ends = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def tell(number: int, frame: FrameType | None) -> None:
        for asked, handler in ends.items():
            signal.signal(asked, handler)  # a second one is no wish any more
        savers = [folder / f"{path.stem}.pid" for path in folder.glob("*.saves")]
        for pid in savers:
            with suppress(ProcessLookupError):
                os.kill(int(pid.read_text()), signal.SIGUSR1)
        if not savers:
            signal.raise_signal(number)

    for number, handler in ends.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, tell)


def _run_agent(world_size: int, command: Sequence[str], folder: Path, verbose: bool) -> dict[int, int]:
    """torchrun's agent: the exit codes of the ranks that failed, the first one first; {} when none did."""
    if not verbose:
        logger = logging.getLogger("torch.distributed.elastic")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=f"grpo-mega-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "torchelastic")),
        shutdown_timeout=FAILURE_GRACE_SECONDS,
        # Ours raises Interrupted, upon which the agent sends SIGTERM. It would pass SIGINT on as it is, and a
        # rank that is still starting answers that with a traceback.
        signals_to_handle="SIGQUIT",
    )
    # The agent expands ${local_rank} in arguments; ours mean what they say.
    arguments = [argument.replace("$", "$$") for argument in command]
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as failed:
        return {rank: failure.exitcode for rank, failure in failed.failures.items()}
    return {}


class _Reaper(threading.Thread):
    """Kills what the agent does not: ranks deaf to SIGTERM (after a while), helpers that ranks leave behind.

    A rank leads its own process group; its id is that of the process.
    """

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.killed: set[int] = set()
        self._folder = folder
        self._stopped = threading.Event()

    def run(self) -> None:
        deadline = None
        while not self._stopped.wait(0.2):
            pids = self._pids()
            alive = {rank: pid for rank, pid in pids.items() if psutil.pid_exists(pid)}
            failed = [
                rank for rank in pids if rank not in alive and not (self._folder / f"{rank}.done").exists()
            ]
            if failed and deadline is None:
                deadline = time.monotonic() + FAILURE_GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                self.killed.update(alive)
                for pid in alive.values():
                    _kill_group(pid)

    def stop(self) -> None:
        self._stopped.set()
        self.join()
        for pid in self._pids().values():
            _kill_group(pid)

    def _pids(self) -> dict[int, int]:
        notes = {int(path.stem): path.read_text() for path in self._folder.glob("*.pid")}
        return {rank: int(pid) for rank, pid in notes.items() if pid}


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _restore_cursor() -> None:
    """A rank that was drawing a progress bar may have died with the cursor hidden."""
    if sys.stdout.isatty():
        print("\033[?25h", end="", flush=True)


def _explain(folder: Path, world_size: int, exit_codes: dict[int, int], killed_by_us: set[int]) -> int:
    """Print the failure that caused the others, and return its exit code."""
    if REQUEUE_EXIT_CODE in exit_codes.values():
        return REQUEUE_EXIT_CODE  # the run has said so itself
    reports = [_Report(**json.loads(path.read_text())) for path in folder.glob("*.report")]
    reports.sort(key=lambda report: (report.lost_peer, report.time))
    signalled = [
        rank
        for rank, code in exit_codes.items()
        if code < 0 and code != -signal.SIGTERM and rank not in killed_by_us
    ]
    if reports and not (signalled and reports[0].lost_peer):
        _print_report(reports[0])
        return _exit_code(reports[0].user_error)
    rank = next(iter(signalled or exit_codes))
    code = exit_codes[rank]
    if code > 0:
        print_error(f"rank {rank} of {world_size} ended with exit code {code} and left no message")
        return code
    number = signal.Signals(-code)
    hint = _SIGNAL_HINTS.get(number, "somebody sent it")
    print_error(f"rank {rank} of {world_size} was killed by signal {-code} ({number.name})\n  remedy: {hint}")
    return 128 - code


def _print_report(report: _Report) -> None:
    if report.user_error:
        print_error(report.text)
    else:
        print_plain(f"rank {report.rank} failed:\n{report.text}")


def _exit_code(user_error: bool) -> int:
    return USER_ERROR_EXIT_CODE if user_error else CRASH_EXIT_CODE


def _code_of(ending: SystemExit) -> int:
    if ending.code is None or isinstance(ending.code, int):
        return ending.code or 0
    print_plain(str(ending.code))
    return CRASH_EXIT_CODE
