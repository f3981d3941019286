"""A local Slurm as tests see it: jobs are submitted, watched and cancelled, and no call waits for ever."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "local_slurm.sh"
CALL_SECONDS = 180
START_SECONDS = 120
JOB_SECONDS = 900
"""Many jobs beside one another on a busy machine; alone on a quiet one each takes about ten."""
ASK_EVERY_SECONDS = 1.0
LOOK_EVERY_SECONDS = 0.2
"""Slurm is asked through a process of its own, a file only read."""
RESUMED = "resumed after step"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
ON_TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
THIRD_OF_A_NODE = "--cpus-per-task=42"
"""Three jobs at a time."""
NODES = 6
SHARED = "--nodelist=node1,node2"
APART = ("--partition=apart", "--nodelist=node3,node4", "--exclusive")
"""For a job that is pushed out and loses a node, which then happens to no other one."""
SERVING = ("node5", "node6")
ELSEWHERE = f"--nodelist={','.join(SERVING)}"


class Cluster:
    def __init__(self, folder: Path):
        self.folder = folder
        self.jobs = folder / "jobs"
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("RANK", "OMP_NUM_THREADS")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "GRPO_MEGA": str(ROOT),
            "LOCAL_SLURM_NODES": str(NODES),
        }
        self.is_ending = threading.Event()

    def start(self) -> None:
        self._tool("start")
        self.jobs.mkdir()
        rest = ",".join(f"node{number}" for number in range(1, NODES + 1) if number not in (3, 4))
        self.call("scontrol", "update", "PartitionName=debug", f"Nodes={rest}")
        own = ("Nodes=node3,node4", "PriorityTier=1", "GraceTime=60", "MaxTime=INFINITE", "State=UP")
        self.call("scontrol", "create", "PartitionName=apart", *own)

    def stop(self) -> None:
        self._tool("stop")

    def _tool(self, verb: str) -> None:
        # Not captured through pipes: the daemons would hold those open.
        with (self.folder.parent / f"{verb}.txt").open("w+") as said:
            command = [str(TOOL), verb, str(self.folder)]
            done = subprocess.run(
                command,
                stdout=said,
                stderr=said,
                env=self.environment,
                timeout=START_SECONDS,
                check=False,
            )
            said.seek(0)
            assert done.returncode == 0, said.read()

    def call(
        self, *command: str, environment: Mapping[str, str] | None = None, folder: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=CALL_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def submit(self, file: str, *options: str, **environment: str) -> Job:
        """On two nodes, unless the options say otherwise."""
        return self.submit_as_it_is(file, *ON_TWO_NODES, THIRD_OF_A_NODE, SHARED, *options, **environment)

    def submit_as_it_is(self, file: str, *options: str, **environment: str) -> Job:
        command = ["sbatch", "--parsable", f"--output={self.jobs}/%j.txt", *options]
        path = ROOT / "slurm" / file
        return Job(self, self.call(*command, str(path), environment=environment).stdout.strip())

    def command(self, line: str, *options: str) -> Job:
        said = self.call("sbatch", "--parsable", f"--output={self.jobs}/%j.txt", *options, f"--wrap={line}")
        return Job(self, said.stdout.strip())


@dataclass(frozen=True)
class Job:
    cluster: Cluster
    number: str

    @property
    def output(self) -> str:
        path = Path(self.facts()["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def facts(self) -> dict[str, str]:
        """What `scontrol show job` says, of the first of its tasks if it is an array."""
        said = self.cluster.call("scontrol", "--oneliner", "show", "job", self.number).stdout
        return dict(re.findall(r"(\w+)=(\S*)", said.splitlines()[0]))

    @property
    def state(self) -> str:
        return self.facts()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.facts()["Restarts"])

    def until(self, condition: Callable[[], bool], every: float = ASK_EVERY_SECONDS) -> None:
        deadline = time.monotonic() + JOB_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"job {self.number}: {self.facts()}\n{self.output}"
            assert not self.cluster.is_ending.wait(every), "nobody waits for this job any more"

    def finish(self) -> str:
        """Its last state. A requeued job is pending in between."""
        self.until(lambda: self.state in OVER)
        self.until(lambda: not self.processes())
        return self.state

    def after_step(self, step: int, run_dir: Path) -> None:
        metrics = run_dir / "metrics.jsonl"
        self.says(f'"step": {step},', metrics)

    def says(self, text: str, path: Path, times: int = 1) -> None:
        """Wait until a file of the job has these words so often."""
        asked = time.monotonic()

        def is_there() -> bool:
            nonlocal asked
            if path.exists() and path.read_text(errors="replace").count(text) >= times:
                return True
            if time.monotonic() > asked + ASK_EVERY_SECONDS:
                asked = time.monotonic()
                assert self.state not in OVER, self.output
            return False

        self.until(is_there, LOOK_EVERY_SECONDS)

    def comes_back(self, times: int, run_dir: Path) -> int:
        """Wait for this start of the job; the step that it went on from."""
        self.until(lambda: self.restarts == times)
        log = run_dir / "logs" / "rank_0.txt"
        self.says(RESUMED, log, times)
        return int(re.findall(rf"{RESUMED} (\d+)", log.read_text())[-1])

    def tell_batch_script(self, signal: str) -> None:
        self.cluster.call("scancel", f"--signal={signal}", "--batch", self.number)

    def cancel(self) -> None:
        self.cluster.call("scancel", self.number)

    def processes(self, **variables: str) -> list[psutil.Process]:
        """Those on the nodes that belong to it and have these variables in their environment."""
        wanted = {"SLURM_JOB_ID": self.facts()["JobId"], "SLURM_CONF": self.cluster.environment["SLURM_CONF"]}
        return [process for process in psutil.process_iter() if _has(process, {**wanted, **variables})]

    def rank(self, number: int) -> psutil.Process:
        ranks = self.processes(RANK=str(number))
        return min(ranks, key=lambda process: process.create_time())  # the others are its helpers


def _has(process: psutil.Process, variables: Mapping[str, str]) -> bool:
    with suppress(psutil.Error):
        return process.environ().items() >= variables.items()
    return False


def words(changes: Mapping[str, object]) -> str:
    """OVERRIDES of a job."""
    return " ".join(f"{key}={value}" for key, value in changes.items())
