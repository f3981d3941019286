"""Runs an untrusted program: it costs what its limits say, and leaves nothing behind.

The strongest isolation that the kernel allows is taken, and named by `isolation()`:

namespaces     The program has its own processes, network (none), mounts and file system in memory: system
               folders and `readable` to read, one folder to write. Nothing else of the machine exists for it:
               no home, no checkpoint, no other process. It has no privilege.
landlock       Where containers refuse namespaces, the program opens files below the same folders only, and
               gets no socket, no signal to another process, no look into one (/proc is closed), no new
               process group. It shares the machine's disk: the number of files is not limited, only their
               size. A `hidden` folder that lies inside a readable one stays readable.
process group  Where Landlock is missing too (Linux before 5.13): still no sockets, no signals, no new group,
               but it reads and writes every file that its user may, also in `hidden` folders, and reads the
               trainer's environment in /proc.

Run by root, a program is a user of its own, to whom root's files and processes are closed. Where its
interpreter is root's alone it stays root, without any of root's rights, behind the first two walls; the third
refuses it. Anybody else's program is that user.

Namespaces in a container that covers parts of /proc leave it empty; the number of processes and their memory
together are then not watched, only limited for each.

In all three, processor time, memory, processes, file size and output are limited, the environment holds no
more than PATH, HOME, TMPDIR and the like, and every process that the program started is gone when `run`
returns.
"""

from __future__ import annotations

import logging
import marshal
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypedDict, get_args

from grpo_mega.errors import UserError
from grpo_mega.recipe.reward_blocks import SandboxLimits
from grpo_mega.reward.sandbox_guard import FIRST_OWN_UID, OWN_UIDS
from grpo_mega.reward.sandbox_walls import CAP_CHOWN, CAP_SETGID, CAP_SETUID, landlock_version

log = logging.getLogger(__name__)

Isolation = Literal["namespaces", "landlock", "process group"]  # strongest first
PACKAGE_FOLDER = str(Path(__file__).resolve().parents[2])
START_GUARD = (
    "import sys; sys.path.append(sys.argv[1]); from grpo_mega.reward import sandbox_guard as g; g.main()"
)
SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
SYSTEM_FILES = (
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/alternatives",
    "/etc/localtime",
)
SEARCH_PATH = "/usr/local/bin:/usr/bin:/bin"
OWN_FOLDER = "/sandbox"
"""Where the program starts, with a file system of its own; else a new folder of the machine's."""
ENVIRONMENT = {
    "PATH": SEARCH_PATH,
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",  # a reward that depends on the order of a set would not be the same twice
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
GUARD_GRACE_SECONDS = 15.0
"""How long the guard may take beyond the program's wall time before it is killed itself."""
CHECK_GUARD_SECONDS = 0.2
MIB, KIB = 2**20, 2**10
READ_BYTES = 65536
OUT_OF_MEMORY_WORDS = (b"MemoryError", b"bad_alloc", b"Cannot allocate memory", b"out of memory")
TAIL_BYTES = 2000


@dataclass(frozen=True, slots=True)
class SandboxResult:
    """Example: SandboxResult(0, b"5\\n", b"", timed_out=False, out_of_memory=False, truncated=False,
    seconds=.05)"""

    exit_code: int  # minus the signal that ended it; -9 also when a limit did
    stdout: bytes
    stderr: bytes
    timed_out: bool  # wall or processor time
    out_of_memory: bool  # for certain if it was killed for it; a failed allocation is read off its last words
    truncated: bool  # it printed more than its limit, and was killed for that
    seconds: float

    @property
    def succeeded(self) -> bool:
        return self.exit_code == 0 and not self.truncated


class Job(TypedDict):
    """What the guard is told."""

    argv: list[str]
    environment: dict[str, str]
    files: dict[str, bytes]
    stdin: bytes
    folder: str
    cwd: str
    readable: list[str]
    hidden: list[str]
    namespaces: bool
    landlock: bool
    trainer: int
    own_user: bool
    wall_seconds: float
    cpu_seconds: int
    memory_bytes: int
    processes: int
    disk_bytes: int
    file_bytes: int
    open_files: int


class Sandbox:
    """Programs under the same limits and isolation. `run` may be called from many threads at a time.

    Example: Sandbox().run(["/usr/bin/python3", "main.py"], files={"main.py": b"print(2 + 3)"}).stdout ==
    b"5\\n"
    """

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        *,
        readable: Sequence[Path | str] = (),
        hidden: Sequence[Path | str] = (),
        isolation: Isolation | None = None,
    ):
        self.limits = SandboxLimits() if limits is None else limits
        self.isolation: Isolation = strongest_isolation() if isolation is None else isolation
        self._readable = [*SYSTEM_FOLDERS, *SYSTEM_FILES, *_parents_first(readable)]
        self._hidden = _parents_first(hidden)
        # With a file system of its own, the folders above what it reads are new ones, open to everybody.
        above = self.isolation != "namespaces"
        closed = [path for path in self._readable if not _open_to_others(path, above)]
        self._own_user = may_change_user() and not closed
        if os.geteuid() == 0 and self.isolation == "process group" and not self._own_user:
            why = (
                f"{closed[0]} cannot be read by another user"
                if closed
                else "root may not change its user here"
            )
            raise UserError(
                f"untrusted programs would run as root: {why}",
                where="the sandbox of rewards",
                law="without namespaces and Landlock, another user is what a program must be",
                remedy="install Python where all users can read it, allow user namespaces in the "
                "container, or do not train as root",
            )

    def run(
        self, argv: Sequence[str], *, files: Mapping[str, bytes] | None = None, stdin: bytes = b""
    ) -> SandboxResult:
        """`files` are written to the folder the program starts in; argv[0] is an absolute path."""
        folder = os.path.realpath(tempfile.mkdtemp(prefix="grpo-mega-sandbox-"))
        try:
            return self._guarded(self._job(argv, files or {}, stdin, folder))
        finally:
            remove_folder(folder)

    def _job(self, argv: Sequence[str], files: Mapping[str, bytes], stdin: bytes, folder: str) -> Job:
        limits = self.limits
        namespaces = self.isolation == "namespaces"
        cwd = OWN_FOLDER if namespaces else folder
        return Job(
            argv=list(argv),
            environment=ENVIRONMENT | {"HOME": cwd, "TMPDIR": cwd},
            files=dict(files),
            stdin=stdin,
            folder=folder,
            cwd=cwd,
            readable=self._readable,
            hidden=self._hidden,
            namespaces=namespaces,
            landlock=self.isolation == "landlock",
            trainer=os.getpid(),
            own_user=self._own_user,
            wall_seconds=limits.wall_seconds,
            cpu_seconds=limits.cpu_seconds,
            memory_bytes=limits.memory_mib * MIB,
            processes=limits.processes,
            disk_bytes=limits.disk_mib * MIB,
            file_bytes=limits.file_mib * MIB,
            open_files=limits.open_files,
        )

    def _guarded(self, job: Job) -> SandboxResult:
        report_from, report_to = os.pipe()
        started = time.monotonic()
        try:
            guard = subprocess.Popen(
                # Isolated, without site: it starts fast, and nothing of the trainer's environment reaches it.
                [sys.executable, "-I", "-S", "-c", START_GUARD, PACKAGE_FOLDER, str(report_to)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
                env={},
                pass_fds=(report_to,),
                start_new_session=True,
            )
            os.close(report_to)
            report_to = -1
            with guard:
                try:
                    output = _converse(guard, job, self.limits.output_kib * KIB)
                except BaseException:  # an interrupt: the guard makes an end first, it is not killed at once
                    assert guard.stdin is not None
                    guard.stdin.close()
                    _await_end(guard, time.monotonic() + GUARD_GRACE_SECONDS)
                    raise
            seconds = time.monotonic() - started
            os.set_blocking(report_from, False)
            report = _read_report(report_from)
        finally:
            os.close(report_from)
            if report_to >= 0:
                os.close(report_to)
        return _result(report, output, seconds)


@dataclass(slots=True)
class _Output:
    """Of a program so far; never more than the limit is held."""

    stdout: bytearray
    stderr: bytearray
    truncated: bool = False

    def take(self, name: str, data: bytes, limit: int) -> None:
        kept = self.stdout if name == "stdout" else self.stderr
        kept += data[: limit - len(kept)]
        self.truncated = self.truncated or (len(kept) == limit and len(data) > 0)


def _converse(guard: subprocess.Popen[bytes], job: Job, limit: int) -> _Output:
    """Hands over the job and reads until the guard has ended."""
    assert guard.stdin is not None and guard.stdout is not None and guard.stderr is not None
    packed = marshal.dumps(dict(job))  # needs no import in the guard
    with suppress(BrokenPipeError):  # it has ended; its report says why
        guard.stdin.write(len(packed).to_bytes(8, "little") + packed)
        guard.stdin.flush()
    output = _Output(bytearray(), bytearray())
    deadline = time.monotonic() + job["wall_seconds"] + GUARD_GRACE_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(guard.stdout, selectors.EVENT_READ, "stdout")
        selector.register(guard.stderr, selectors.EVENT_READ, "stderr")
        while selector.get_map() and time.monotonic() < deadline:
            events = selector.select(timeout=CHECK_GUARD_SECONDS)
            for key, _ in events:
                data = os.read(key.fd, READ_BYTES)
                output.take(key.data, data, limit)
                if not data:
                    selector.unregister(key.fileobj)
            if output.truncated and not guard.stdin.closed:
                guard.stdin.close()  # the guard's sign to end the program
            if not events and guard.poll() is not None:
                break  # a process forked by the trainer may hold the pipes open for ever
    _await_end(guard, deadline)
    return output


def _await_end(guard: subprocess.Popen[bytes], deadline: float) -> None:
    """The guard ends after all processes of the program have."""
    try:
        guard.wait(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        log.warning("the guard of a sandbox did not end in time, and is killed")
        guard.kill()
        guard.wait()


def _read_report(report_from: int) -> dict[str, object]:
    try:
        return marshal.loads(os.read(report_from, READ_BYTES))
    except (BlockingIOError, EOFError, ValueError):
        return {}  # the guard was killed before it could say anything


def _result(report: Mapping[str, object], output: _Output, seconds: float) -> SandboxResult:
    if "error" in report:
        raise UserError(
            f"an untrusted program could not be started: {report['error']}",
            where="the sandbox of rewards",
            law="the program, its interpreter and the kernel's isolation must be there",
            remedy="check the path of the interpreter; `isolation()` names what this machine allows",
        )
    code = int(str(report.get("exit", -signal.SIGKILL)))
    tail = bytes(output.stderr[-TAIL_BYTES:])
    told = code != 0 and any(word in tail for word in OUT_OF_MEMORY_WORDS)
    return SandboxResult(
        exit_code=code,
        stdout=bytes(output.stdout),
        stderr=bytes(output.stderr),
        timed_out=bool(report.get("timed_out")) or not report,
        out_of_memory=not output.truncated and (bool(report.get("out_of_memory")) or told),
        truncated=output.truncated,
        seconds=seconds,
    )


def remove_folder(folder: str) -> None:
    """Also when it holds folders that may not be entered, or is deeper than Python's recursion."""
    with suppress(OSError, RecursionError):
        shutil.rmtree(folder)
    if os.path.lexists(folder):
        for command in (["chmod", "-R", "u+rwX", folder], ["rm", "-rf", folder]):
            subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
    if os.path.lexists(folder):
        log.warning("the folder of a sandbox could not be removed: %s", folder)


def _parents_first(paths: Sequence[Path | str]) -> list[str]:
    real = {os.path.realpath(path) for path in paths}
    return sorted(real - {"/"}, key=lambda path: (path.count("/"), path))


def _open_to_others(path: str, above: bool) -> bool:
    """Whether any user may look into the folder and, if asked, enter those above it."""
    folder = Path(path)
    parents = folder.parents if above else ()
    opened = all(parent.stat().st_mode & 0o001 for parent in parents if parent.exists())
    return opened and (not folder.is_dir() or folder.stat().st_mode & 0o005 == 0o005)


def may_change_user() -> bool:
    """Whether this is root, with the right and the choice to become another user."""
    if os.geteuid() != 0:
        return False
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    effective = re.search(r"^CapEff:\s*(\w+)", status, re.MULTILINE)
    capabilities = int(effective[1], 16) if effective else 0
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text(encoding="utf-8").splitlines()]
    known = any(
        int(first) <= FIRST_OWN_UID and int(first) + int(count) >= FIRST_OWN_UID + OWN_UIDS
        for first, _, count in ranges
    )
    return known and all(capabilities >> needed & 1 for needed in (CAP_CHOWN, CAP_SETGID, CAP_SETUID))


@lru_cache(maxsize=1)
def strongest_isolation() -> Isolation:
    """What this machine allows; tried once."""
    for isolation in get_args(Isolation):
        if isolation == "landlock" and not landlock_version():
            continue
        try:
            if isolation == "process group" or Sandbox(isolation=isolation).run(["/bin/true"]).succeeded:
                return isolation
        except UserError as error:
            log.info("no sandbox by %s: %s", isolation, error.what)
    raise AssertionError("a process group needs no leave of the kernel")


def isolation() -> str:
    """For a person: what keeps untrusted programs from the machine here, and what does not."""
    words: Mapping[Isolation, str] = {
        "namespaces": "namespaces: own processes, users, mounts and file system, no network",
        "landlock": "landlock and seccomp: no files but the program's own and the system's, no network, "
        "no other process; disk space is shared",
        "process group": "process group and seccomp: no network and no signals to others, but programs read "
        "and write what their user does",
    }
    return words[strongest_isolation()]
