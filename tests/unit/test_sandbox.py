"""The sandbox: whatever a program does, it ends in time, sees nothing of the trainer's, and leaves
nothing."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import get_args

import pytest

from grpo_mega.errors import UserError
from grpo_mega.recipe.reward_blocks import SandboxLimits
from grpo_mega.reward.sandbox import (
    ENVIRONMENT,
    SEARCH_PATH,
    Isolation,
    Sandbox,
    SandboxResult,
    isolation,
    may_change_user,
    remove_folder,
    strongest_isolation,
)
from grpo_mega.reward.sandbox_walls import landlock_version

STRONGEST_FIRST = get_args(Isolation)
ROOT = os.geteuid() == 0


@pytest.fixture(params=STRONGEST_FIRST)
def mode(request) -> Isolation:
    if request.param == "namespaces" and strongest_isolation() != "namespaces":
        pytest.skip("this kernel or container refuses namespaces")
    if request.param == "landlock" and not landlock_version():
        pytest.skip("this kernel has no Landlock")
    return request.param


@pytest.fixture
def home(monkeypatch):
    """A folder for the sandboxes' folders, which users that programs run as may enter."""
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o711)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    yield Path(folder)
    remove_folder(folder)


@pytest.fixture
def python(mode) -> tuple[str, list[str]]:
    """An interpreter and what it reads. As root without namespaces it must be one that other users can
    run."""
    if ROOT and mode == "process group":
        if not may_change_user():
            pytest.skip("refused, as documented: root cannot become another user here")
        found = shutil.which("python3", path=SEARCH_PATH)
        if found is None:
            pytest.skip(f"there is no Python in {SEARCH_PATH} for other users")
        return found, [str(Path(os.path.realpath(found)).parent.parent)]
    path = Path(os.path.realpath(Path(sys.executable).parent)) / Path(sys.executable).name
    return str(path), [sys.prefix, sys.base_prefix]


@pytest.fixture
def run(mode, home, python):
    """run(source, stdin=..., hidden=..., limits...) -> result. Nothing may be left, of processes at once."""
    interpreter, needed = python

    def run_source(source, stdin=b"", hidden=(), readable=(), **changed) -> SandboxResult:
        marker = uuid.uuid4().hex
        limits = SandboxLimits(**({"wall_seconds": 5.0, "memory_mib": 512} | changed))
        sandbox = Sandbox(limits, readable=[*needed, *readable], hidden=hidden, isolation=mode)
        files = {"main.py": source.encode()}
        result = sandbox.run([interpreter, "main.py", marker], files=files, stdin=stdin)
        assert processes_with(marker) == []
        return result

    yield run_source
    assert list(home.iterdir()) == []


def processes_with(marker: str) -> list[int]:
    """Processes whose command line has the marker, which forks inherit."""
    found: list[int] = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with suppress(OSError):
            if pid != os.getpid() and marker.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def test_a_program_reads_prints_and_ends(run):
    source = "import sys; print(input()[::-1]); print('no', file=sys.stderr); sys.exit(3)"
    result = run(source, stdin=b"abc\n")
    assert (result.exit_code, result.stdout, result.stderr) == (3, b"cba\n", b"no\n")
    assert not (result.timed_out or result.out_of_memory or result.truncated or result.succeeded)
    assert run("pass").succeeded


def test_a_crash_is_the_signal(run):
    assert run("import ctypes; ctypes.string_at(0)").exit_code == -signal.SIGSEGV


def test_bytes_come_through_as_they_are(run):
    echo = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"
    assert run(echo, stdin=bytes(range(256))).stdout == bytes(range(256))
    assert run("pass", stdin=b"x" * 2**20).succeeded


def test_fork_bomb(run):
    bomb = "import os\nwhile True:\n try: os.fork()\n except OSError: pass\n"
    assert not run(bomb, wall_seconds=1.0, processes=16).succeeded


def test_endless_output_is_cut_and_ends_the_program(run):
    result = run("while True: print('x' * 1000)", output_kib=64, wall_seconds=20.0, cpu_seconds=20)
    assert result.truncated and len(result.stdout) == 64 * 1024 and not result.succeeded
    assert result.seconds < 10


def test_huge_standard_error_is_cut_as_well(run):
    source = "import sys\nprint('out', flush=True)\nwhile True: sys.stderr.write('e' * 9999)"
    result = run(source, output_kib=16)
    assert result.truncated and len(result.stderr) == 16 * 1024 and result.stdout == b"out\n"


def test_a_file_cannot_fill_the_disk(run):
    result = run("open('big', 'wb').write(b'0' * 3_000_000)", file_mib=1)
    assert result.exit_code == 1 and b"File too large" in result.stderr


def test_many_files_cannot_fill_the_disk(run, mode):
    fill = "for n in range(6): open(str(n), 'wb').write(b'0' * 1_000_000)\nprint('full')"
    result = run(fill, file_mib=2, disk_mib=4)
    if mode == "namespaces":
        assert result.exit_code == 1 and b"No space left" in result.stderr
    else:  # as documented: the disk is the machine's
        assert result.stdout == b"full\n"


def test_signals_can_be_ignored_but_not_the_end(run):
    source = """
import signal, time
for number in (1, 2, 15): signal.signal(number, signal.SIG_IGN)
while True: time.sleep(1)
"""
    result = run(source, wall_seconds=0.5)
    assert result.timed_out and result.exit_code == -signal.SIGKILL and 0.5 <= result.seconds < 5


def test_processor_time_ends_too(run):
    result = run("while True: pass", cpu_seconds=1, wall_seconds=30.0)
    assert result.timed_out and result.seconds < 20


def test_a_daemon_ends_with_its_program(run):
    daemon = """
import os, sys, time
if os.fork() == 0:
    try: os.setsid()
    except OSError: pass
    if os.fork() == 0:
        for stream in (0, 1, 2): os.close(stream)
        time.sleep(60)
    os._exit(0)
os.wait()
print("started")
"""
    result = run(daemon)
    assert result.stdout == b"started\n" and result.succeeded and result.seconds < 4


@pytest.fixture
def checkpoints():
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))
    folder.chmod(0o755)
    (folder / "weights").write_text("the weights")
    yield folder
    shutil.rmtree(folder)


def test_hidden_folders_are_hidden(run, mode, checkpoints):
    read = f"print(open({str(checkpoints / 'weights')!r}).read())"
    hidden = run(read, hidden=[checkpoints])
    inside_readable = run(read, hidden=[checkpoints], readable=[checkpoints.parent])
    if mode == "namespaces":
        assert b"weights" not in hidden.stdout + inside_readable.stdout
    elif mode == "landlock":  # as documented: what may be read is a list of folders, without exceptions
        assert b"weights" not in hidden.stdout and b"weights" in inside_readable.stdout
    else:  # as documented: files are as their permissions say
        assert b"weights" in hidden.stdout


def test_folders_that_nobody_hid_are_not_there_either(run, mode, checkpoints):
    found = run(f"import os; print(os.listdir({str(checkpoints)!r}))")
    assert found.succeeded == (mode == "process group")


def test_nothing_can_be_written_outside(run, mode, checkpoints):
    checkpoints.chmod(0o777)
    places = [str(checkpoints), sys.prefix, "/usr", "/etc", "/var/tmp", "/"]
    name = f"sandbox-{uuid.uuid4().hex}"
    write = f"""
import os
for place in {places!r}:
    try: open(os.path.join(place, {name!r}), "w")
    except OSError: pass
"""
    assert run(write, readable=[sys.prefix] if mode == "namespaces" else []).succeeded
    written = [place for place in places if os.path.exists(os.path.join(place, name))]
    for place in written:
        os.remove(os.path.join(place, name))
    if mode == "process group":  # as documented: what its user may write, it may
        assert {str(checkpoints), "/var/tmp"} <= set(written)
    else:
        assert written == []


def test_the_environment_holds_no_secret(run, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "own-secret")
    names = run("import os; print(*os.environ)").stdout.decode().split()
    assert set(names) <= {*ENVIRONMENT, "HOME", "TMPDIR", "LC_CTYPE"}  # Python itself sets the last one


def test_other_processes_environments_cannot_be_read(run, mode):
    """Another process of the same user stands for the trainer."""
    read = """
import os
for pid in os.listdir("/proc"):
    try: print(open(f"/proc/{pid}/environ").read())
    except OSError: pass
"""
    with subprocess.Popen(["sleep", "60"], env={"SECRET_TOKEN": "trainers-secret"}) as trainer:
        try:
            found = b"trainers-secret" in run(read, output_kib=4096).stdout
        finally:
            trainer.kill()
    # As documented: without namespaces and Landlock a program of the trainer's own user can.
    assert found == (mode == "process group" and not ROOT)


def test_there_is_no_network(run):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        connect = f"""
import socket
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    try:
        sender = socket.socket(socket.AF_INET, kind)
        sender.connect(("127.0.0.1", {port}))
        sender.send(b"x")
        print("sent")
    except OSError: pass
"""
        result = run(connect)
        assert result.succeeded
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_memory_hog_runs_out_of_memory(run):
    result = run("x = bytearray(2**31)", memory_mib=256)
    assert result.out_of_memory and result.exit_code == 1


def test_many_small_hogs_do_too(run):
    hogs = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        x = bytearray(os.urandom(1)) * (60 * 2**20)
        time.sleep(30)
        os._exit(0)
time.sleep(30)
"""
    result = run(hogs, memory_mib=256, wall_seconds=20.0)
    assert result.out_of_memory and result.exit_code == -signal.SIGKILL and result.seconds < 15


def test_a_program_may_delete_its_own_folder(run):
    source = "import os, shutil; shutil.rmtree(os.getcwd(), ignore_errors=True); print('gone')"
    assert run(source).stdout == b"gone\n"


def test_folders_nobody_may_enter_and_deep_ones_are_removed(run):
    source = """
import os
for name in ("a", "b"):
    os.makedirs(name + "/c")
    open(name + "/c/file", "w").close()
    os.chmod(name + "/c", 0)
    os.chmod(name, 0)
for _ in range(1500):
    os.mkdir("d")
    os.chdir("d")
print("made")
"""
    assert run(source).stdout == b"made\n"  # and `run` looks whether anything is left


def test_nobody_else_can_be_killed(run):
    source = """
import os
for target in (os.getppid(), -1, 0 if os.getpgrp() != os.getpid() else -1):
    try: os.kill(target, 9)
    except OSError: pass
print("still here")
"""
    with subprocess.Popen(["sleep", "60"]) as bystander:
        try:
            result = run(source)
            assert bystander.poll() is None
        finally:
            bystander.kill()
    assert result.succeeded and result.stdout == b"still here\n"


def test_privileges_cannot_be_won_back(run, mode):
    source = """
import ctypes
lines = [] if LANDLOCK else open("/proc/self/status")  # Landlock closes /proc
print(*[line.split()[1] for line in lines if line.startswith(("CapPrm", "CapEff", "CapInh", "CapAmb"))])
print(ctypes.CDLL(None).unshare(0x10000000 | 0x00020000))
"""
    result = run(source.replace("LANDLOCK", str(mode == "landlock")))
    capabilities, unshared = result.stdout.decode().splitlines()
    assert set(capabilities) <= {"0", " "}
    # In namespaces root's programs may make further ones, where what is covered stays covered.
    assert unshared == "-1" or (ROOT and mode == "namespaces")


def test_the_programs_end_when_the_trainer_is_killed(mode, python, home):
    marker = uuid.uuid4().hex
    trainer = f"""
import sys, tempfile
from grpo_mega.reward.sandbox import Sandbox
tempfile.tempdir = {str(home)!r}
sandbox = Sandbox(isolation={mode!r}, readable={python[1]!r})
sandbox.run([{python[0]!r}, "-c", "import os, time; os.fork(); time.sleep(60)", {marker!r}])
"""
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen([sys.executable, "-c", trainer], cwd=root)
    wait_until(lambda: len(processes_with(marker)) > 2)
    process.kill()
    process.wait()
    wait_until(lambda: not processes_with(marker))


def wait_until(happened) -> None:
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_many_at_a_time(run):
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda number: run(f"print({number})", wall_seconds=20.0), range(8)))
    assert [int(result.stdout) for result in results] == list(range(8))


def test_a_program_that_is_not_there_is_the_users_mistake(mode, home):
    if ROOT and mode == "process group" and not may_change_user():
        pytest.skip("refused, as documented: root cannot become another user here")
    with pytest.raises(UserError, match="could not be started"):
        Sandbox(isolation=mode).run(["/usr/bin/no-such-interpreter"])


@pytest.mark.skipif(not ROOT, reason="an ordinary user has no other to become")
@pytest.mark.parametrize("isolation", STRONGEST_FIRST[:2])
def test_an_interpreter_that_is_roots_alone_runs_as_root_without_rights(isolation, checkpoints, home):
    if (isolation == "namespaces" and strongest_isolation() != "namespaces") or not landlock_version():
        pytest.skip("this kernel or container refuses it")
    checkpoints.chmod(0o700)
    sandbox = Sandbox(isolation=isolation, readable=[checkpoints])
    result = sandbox.run(["/bin/sh", "-c", f"id -u; cat {checkpoints}/weights; mount -t tmpfs none /tmp"])
    assert result.stdout.split() == [b"0", b"the", b"weights"] and result.exit_code != 0


@pytest.mark.skipif(not ROOT, reason="only root could give a program rights that others do not have")
def test_root_does_not_run_programs_as_root_without_walls(tmp_path):
    tmp_path.chmod(0o700)
    with pytest.raises(UserError, match="would run as root"):
        Sandbox(isolation="process group", readable=[tmp_path])


def test_the_isolation_has_a_name():
    assert isolation().startswith(strongest_isolation())
