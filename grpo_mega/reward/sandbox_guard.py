"""The process between the trainer and an untrusted program: builds the walls, starts the program, watches it.

    trainer -> guard -> [first process of the namespace ->] program -> whatever it starts

One job comes in on standard input, which then stays open: its end means that the trainer wants the program
gone, or is gone itself. One report goes out on a pipe. With namespaces, the end of the namespace's first
process ends all others in it; without, the guard is the reaper of all the program's descendants and kills
until none is left.
"""

from __future__ import annotations

import marshal
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress

from grpo_mega.reward import sandbox_walls as walls

TYPE_CHECKING = False  # importing typing would take longer than all the rest
if TYPE_CHECKING:
    from grpo_mega.reward.sandbox import Job

CONTROL, LENGTH_BYTES = 0, 8
CHECK_SECONDS = 0.05
"""Between two looks at the memory and the number of processes of a running program."""
KILL_SECONDS = 10.0
"""How long to go on killing; processes that even then remain wait for a device."""
FIRST_OWN_UID, OWN_UIDS = 61184, 4336
"""Users that belong to nobody (systemd's range for services): each program run by root gets one."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    report_to = int(sys.argv[2])
    os.set_inheritable(report_to, False)
    job: Job = marshal.loads(_read_exactly(int.from_bytes(_read_exactly(LENGTH_BYTES), "little")))
    try:
        report = _with_namespaces(job, report_to) if job["namespaces"] else _without_namespaces(job)
    except Exception as error:  # the trainer shows it; a traceback would mix with the program's output
        report = {"error": f"{type(error).__name__}: {error}"}
    if report is not None:
        os.write(report_to, marshal.dumps(report))
    os._exit(0)


def _read_exactly(count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        part = os.read(CONTROL, count)
        if not part:
            os._exit(0)
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _with_namespaces(job: Job, report_to: int) -> dict[str, object] | None:
    uid, gid = os.getuid(), os.getgid()
    in_user_namespace = walls.enter_namespaces(uid, gid)
    walls.prctl(walls.PR_SET_DUMPABLE, 0)
    first = os.fork()
    if first:
        walls.prctl(walls.PR_SET_PDEATHSIG, signal.SIGKILL)
        os.close(report_to)
        os.waitpid(first, 0)  # returns when every process of the namespace is gone
        return None
    walls.prctl(walls.PR_SET_PDEATHSIG, signal.SIGKILL)
    walls.enter_own_root(job["folder"], job["readable"], job["hidden"], job["disk_bytes"])
    # A user namespace knows no user but the caller.
    own = _own_user() if job["own_user"] and not in_user_namespace else (uid, gid)
    os.mkdir(job["cwd"])
    _fill(job, own)
    return _run(job, own)


def _without_namespaces(job: Job) -> dict[str, object]:
    signal.signal(signal.SIGTERM, lambda *_: None)  # wakes the watch, which then finds the trainer gone
    walls.prctl(walls.PR_SET_PDEATHSIG, signal.SIGTERM)
    walls.prctl(walls.PR_SET_DUMPABLE, 0)
    walls.prctl(walls.PR_SET_CHILD_SUBREAPER, 1)
    own = _own_user() if job["own_user"] else (os.getuid(), os.getgid())
    _fill(job, own)
    return _run(job, own)


def _own_user() -> tuple[int, int]:
    """A user, and group, that two programs at a time hardly share."""
    number = FIRST_OWN_UID + int.from_bytes(os.urandom(4), "little") % OWN_UIDS
    return number, number


def _fill(job: Job, own: tuple[int, int]) -> None:
    for name, content in job["files"].items():
        path = os.path.join(job["cwd"], name)
        with open(path, "xb") as file:
            file.write(content)
        os.chown(path, *own)
    os.chown(job["cwd"], *own)
    os.chmod(job["cwd"], 0o700)


def _run(job: Job, own: tuple[int, int]) -> dict[str, object]:
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    refused, refuse = os.pipe()
    program = os.fork()
    if program == 0:
        try:
            signal.set_wakeup_fd(-1)
            _become(job, own)
        except BaseException as error:
            os.write(refuse, f"{type(error).__name__}: {error}".encode())
        os._exit(127)
    os.close(refuse)
    problem = os.read(refused, 4096)  # empty when the program has started: the pipe closed itself
    if problem:
        return {"error": problem.decode(errors="replace")}
    why = _watch(program, job, woken)
    code, seconds = _end(program, job)
    killed = code == -signal.SIGKILL
    # At the limit comes SIGXCPU, which a program may ignore, and a second later SIGKILL.
    spent = code == -signal.SIGXCPU or (killed and seconds >= job["cpu_seconds"])
    return {
        "exit": code,
        "timed_out": why["timed_out"] or spent,
        # A SIGKILL that nobody here sent is the kernel's answer to memory that ran out.
        "out_of_memory": why["out_of_memory"] or (killed and not spent and why["ended"]),
    }


def _become(job: Job, own: tuple[int, int]) -> None:
    """The last steps of the process that turns into the program, privileges last."""
    os.setsid()
    source = os.memfd_create("stdin")
    with os.fdopen(os.dup(source), "wb") as file:
        file.write(job["stdin"])
    os.lseek(source, 0, os.SEEK_SET)
    os.dup2(source, 0)
    os.chdir(job["cwd"])
    _limit(job, own)
    if job["landlock"]:
        walls.prctl(walls.PR_SET_NO_NEW_PRIVS, 1)
        walls.restrict_files(job["readable"], [job["cwd"]])
    walls.give_up_privileges(*own)
    if not job["namespaces"] and not walls.restrict_calls():
        raise OSError("this kernel or architecture has no seccomp filters, and namespaces are refused")
    walls.prctl(walls.PR_SET_PDEATHSIG, signal.SIGKILL)  # for the case that the guard itself is killed
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.execve(job["argv"][0], job["argv"], job["environment"])


def _limit(job: Job, own: tuple[int, int]) -> None:
    crowd = 0 if job["namespaces"] or own[0] != os.getuid() else _processes_of(own[0])
    soft_and_hard = (
        (resource.RLIMIT_CPU, job["cpu_seconds"], job["cpu_seconds"] + 1),
        (resource.RLIMIT_AS, job["memory_bytes"], job["memory_bytes"]),
        (resource.RLIMIT_NPROC, crowd + job["processes"], crowd + job["processes"]),
        (resource.RLIMIT_FSIZE, job["file_bytes"], job["file_bytes"]),
        (resource.RLIMIT_NOFILE, job["open_files"], job["open_files"]),
        (resource.RLIMIT_CORE, 0, 0),
    )
    for what, soft, hard in soft_and_hard:
        _, allowed = resource.getrlimit(what)
        if allowed != resource.RLIM_INFINITY:
            soft, hard = min(soft, allowed), min(hard, allowed)
        resource.setrlimit(what, (soft, hard))


def _processes_of(uid: int) -> int:
    """Threads the user runs already: without a namespace the limit counts them too."""
    count = 0
    for pid in _numbers("/proc"):
        with suppress(OSError):
            if os.stat(f"/proc/{pid}").st_uid == uid:
                count += len(os.listdir(f"/proc/{pid}/task"))
    return count


def _watch(program: int, job: Job, woken: int) -> dict[str, bool]:
    """Until the program ends by itself, breaks a limit, or is not wanted any more. Says which."""
    started = time.monotonic()
    why = {"ended": False, "timed_out": False, "out_of_memory": False}
    while True:
        left = started + job["wall_seconds"] - time.monotonic()
        ready, _, _ = select.select([CONTROL, woken], [], [], max(0.0, min(CHECK_SECONDS, left)))
        if woken in ready:
            os.read(woken, 4096)
        if _has_ended(program):
            return why | {"ended": True}
        if CONTROL in ready or (not job["namespaces"] and os.getppid() != job["trainer"]):
            return why
        if left <= 0:
            return why | {"timed_out": True}
        family = _family(job)
        if len(family) > job["processes"]:
            return why
        if _memory(family, job["memory_bytes"]) > job["memory_bytes"]:
            return why | {"out_of_memory": True}


def _has_ended(program: int) -> bool:
    """Reaps orphans, not the program: while it is a zombie, nobody else gets its number or its group's."""
    while True:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return False
        if ended.si_pid == program:
            return True
        os.waitpid(ended.si_pid, 0)


def _end(program: int, job: Job) -> tuple[int, float]:
    """Kills all there is; then the program's exit code and processor seconds."""
    if job["namespaces"]:
        with suppress(OSError):
            os.kill(-1, signal.SIGKILL)  # all of the namespace but its first process, which is this one
    else:
        with suppress(OSError):
            os.killpg(program, signal.SIGKILL)  # no fork escapes: the kernel signals the group as a whole
    _, status, used = os.wait4(program, 0)
    until = time.monotonic() + KILL_SECONDS
    while not job["namespaces"] and time.monotonic() < until:
        # Orphans are adopted by this process: without a child left there is no descendant left.
        for pid in _children(os.getpid()):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def _family(job: Job) -> list[int]:
    """The program and all it started."""
    if job["namespaces"]:
        return [pid for pid in _numbers("/proc") if pid != 1]
    found: list[int] = []
    ahead = [os.getpid()]
    while ahead:
        children = _children(ahead.pop())
        found += children
        ahead += children
    return found


def _children(parent: int) -> list[int]:
    found: list[int] = []
    for thread in _numbers(f"/proc/{parent}/task"):
        with suppress(OSError), open(f"/proc/{parent}/task/{thread}/children", encoding="utf-8") as file:
            found += [int(pid) for pid in file.read().split()]
    return found


def _memory(pids: list[int], limit: int) -> int:
    """Bytes in use by the processes together. Shared pages count once, which is only looked at near the
    limit."""
    resident = 0
    for pid in pids:
        with suppress(OSError, IndexError), open(f"/proc/{pid}/statm", encoding="utf-8") as file:
            resident += int(file.read().split()[1]) * PAGE_BYTES
    if resident <= limit:
        return resident
    shared_once = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as file:
                shared_once += next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue  # it has just ended
    return shared_once


def _numbers(folder: str) -> list[int]:
    try:
        return [int(name) for name in os.listdir(folder) if name.isdigit()]
    except OSError:
        return []
