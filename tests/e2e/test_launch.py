"""Ranks start together and end together: real processes, real gloo, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.commands import Command

GONE_WITHIN_SECONDS = 30
START_WITHIN_SECONDS = 120
ROOT = Path(__file__).parents[2]
PLAIN = ()  # an interpreter that starts, and nothing between

PREAMBLE = """
    import os, signal, subprocess, sys, time
    from grpo_mega import launch
    from grpo_mega.errors import UserError

    def join():
        import torch.distributed as dist
        dist.init_process_group("gloo")
        return dist

    def up(rank):
        with open(f"{folder}/up-{rank}", "w") as note:
            note.write(str(os.getpid()))

    folder, world_size = sys.argv[1], int(sys.argv[2])
"""
POSTAMBLE = """
    if __name__ == "__main__":
        sys.exit(launch.guarded(lambda: launch.run_distributed(work, world_size, sys.argv)))
"""


class Script:
    """A worker of the test's own: `body` is what a rank does with `rank`, `before` what all processes do."""

    def __init__(self, folder: Path, body: str, before: str = ""):
        self.folder = folder
        self.path = folder / "script.py"
        work = "def work():\n    rank = int(os.environ['RANK'])\n" + textwrap.indent(
            textwrap.dedent(body), "    "
        )
        self.path.write_text("\n".join([textwrap.dedent(PREAMBLE), before, work, textwrap.dedent(POSTAMBLE)]))

    def start(
        self, world_size: int = 2, *, launcher: tuple[str, ...] | None = None
    ) -> Command | subprocess.Popen[str]:
        """Forked, or by an interpreter and `launcher`."""
        environment = {
            name: value for name, value in os.environ.items() if name not in ("RANK", "OMP_NUM_THREADS")
        } | {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.folder)}
        if launcher is None:
            return Command(self.folder, world_size, script=self.path, environment=environment)
        return subprocess.Popen(
            [sys.executable, *launcher, str(self.path), str(self.folder), str(world_size)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A background shell that ignores SIGINT passes that on; a person's terminal does not.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(
        self, world_size: int = 2, *, launcher: tuple[str, ...] | None = None
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(world_size, launcher=launcher)
        out, err = process.communicate(timeout=START_WITHIN_SECONDS)
        return subprocess.CompletedProcess(str(self.path), process.wait(), out, err)

    def ranks_up(self, world_size: int = 2) -> list[psutil.Process]:
        """Waits until every rank has said that it is up."""
        notes = [self.folder / f"up-{rank}" for rank in range(world_size)]
        deadline = time.monotonic() + START_WITHIN_SECONDS
        while not all(note.exists() and note.read_text() for note in notes):
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.05)
        return [psutil.Process(int(note.read_text())) for note in notes]


@contextmanager
def running(
    script: Script, world_size: int = 2
) -> Iterator[tuple[Command | subprocess.Popen[str], list[psutil.Process]]]:
    process = script.start(world_size)
    ranks: list[psutil.Process] = []
    try:
        ranks = script.ranks_up(world_size)
        yield process, ranks
    finally:
        for left in [process, *ranks]:
            with suppress(psutil.NoSuchProcess):
                left.kill()
        process.communicate()


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=GONE_WITHIN_SECONDS)
    assert not alive


def test_every_rank_joins_the_others_with_one_thread_each(tmp_path: Path):
    result = Script(
        tmp_path,
        """
        dist = join()
        import torch
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total)
        sys.stdout.write(f"{total.item()} {torch.get_num_threads()}\\n")
        dist.destroy_process_group()
        """,
    ).run(launcher=PLAIN)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == ["3.0 1", "3.0 1"]  # 1 + 2 on both
    assert not list(tmp_path.glob("*mega*")) and not list(tmp_path.glob("torchelastic*"))


def test_one_rank_runs_in_this_very_process(tmp_path: Path):
    process = Script(tmp_path, "join().destroy_process_group()\nprint(os.getpid())").start(1)
    out, err = process.communicate(timeout=START_WITHIN_SECONDS)
    assert (process.returncode, out.strip(), err) == (0, str(process.pid), "")


@pytest.mark.parametrize("raising", ["True", "rank == 1"])
def test_a_user_error_is_said_once(tmp_path: Path, raising: str):
    body = f"""
        if {raising}:
            raise UserError("heads = 6", where="r.yaml:9", remedy="set parallel.tp to 1")
        time.sleep(600)
        """
    result = Script(tmp_path, body).run()
    expected = ["error: heads = 6", "  where:  r.yaml:9", "  remedy: set parallel.tp to 1"]
    assert (result.returncode, result.stderr.splitlines()) == (2, expected)


def test_a_user_error_of_a_lone_rank(tmp_path: Path):
    result = Script(tmp_path, "raise UserError('heads = 6')").run(1)
    assert (result.returncode, result.stderr) == (2, "error: heads = 6\n")


def test_an_exception_comes_with_its_rank_and_its_own_traceback(tmp_path: Path):
    body = """
        dist = join()
        if rank == 1:
            raise ZeroDivisionError("on purpose")
        dist.barrier()
        """
    result = Script(tmp_path, body).run()
    lines = result.stderr.splitlines()
    assert result.returncode == 1
    assert lines[:2] == ["rank 1 failed:", "Traceback (most recent call last):"]
    assert lines[-1] == "ZeroDivisionError: on purpose"
    assert result.stderr.count("Traceback") == 1
    assert "torch/distributed/elastic" not in result.stderr


def test_under_torchrun_nothing_is_launched_again_and_one_rank_speaks(tmp_path: Path):
    body = """
        sys.stdout.write(f"rank {rank} of {os.environ['WORLD_SIZE']}\\n")
        raise UserError("heads = 6")
        """
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    result = Script(tmp_path, body).run(2, launcher=torchrun)
    assert result.returncode != 0
    assert set(result.stdout.splitlines()) <= {"rank 0 of 2", "rank 1 of 2"}
    assert result.stderr.count("error: heads = 6") == 1


def test_a_killed_rank_is_named_with_its_signal(tmp_path: Path):
    body = """
        dist = join()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()
        """
    result = Script(tmp_path, body).run()
    assert result.returncode == 128 + signal.SIGKILL
    assert result.stderr.startswith("error: rank 1 of 2 was killed by signal 9 (SIGKILL)\n  remedy: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_to_the_parent_ends_all(tmp_path: Path, number: signal.Signals, code: int, world_size: int):
    with running(Script(tmp_path, "up(rank)\ntime.sleep(600)"), world_size) as (process, ranks):
        process.send_signal(number)
        _, err = process.communicate(timeout=GONE_WITHIN_SECONDS)
        assert (process.returncode, err) == (code, "interrupted\n")
        assert_gone(ranks)


def test_ctrl_c_reaches_the_whole_process_group(tmp_path: Path):
    with running(Script(tmp_path, "up(rank)\ntime.sleep(600)")) as (process, ranks):
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=GONE_WITHIN_SECONDS)
        assert (process.returncode, err) == (130, "interrupted\n")
        assert_gone(ranks)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ranks find out within a second, by polling")
def test_ranks_do_not_outlive_a_killed_parent(tmp_path: Path):
    # Deaf to everything that can be ignored.
    body = """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        up(rank)
        time.sleep(600)
        """
    with running(Script(tmp_path, body)) as (process, ranks):
        process.kill()
        assert_gone(ranks)


def test_a_deaf_rank_does_not_outlive_a_failed_one_and_helpers_go_too(tmp_path: Path):
    body = """
        helper = subprocess.Popen(["sleep", "600"])
        sys.stdout.write(f"{helper.pid}\\n")
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        up(rank)
        if rank == 1:
            while not os.path.exists(f"{folder}/up-0"):
                time.sleep(0.05)
            raise ZeroDivisionError("on purpose")
        time.sleep(600)
        """
    result = Script(tmp_path, body, before="launch.FAILURE_GRACE_SECONDS = 2").run()
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "ZeroDivisionError: on purpose"
    helpers = [int(line) for line in result.stdout.split()]
    assert len(helpers) == 2
    assert_gone([psutil.Process(pid) for pid in helpers if psutil.pid_exists(pid)])
