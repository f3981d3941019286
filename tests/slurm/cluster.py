"""A local Slurm as tests see it: jobs are submitted, watched and cancelled, and no call waits for ever."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "local_slurm.sh"
CALL_SECONDS = 60
START_SECONDS = 120
JOB_SECONDS = 300
"""A queue of jobs on a busy machine; on a quiet one each takes about ten."""
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
ON_TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
HALF_A_NODE = "--cpus-per-task=64"
"""Two jobs at a time."""


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
        }

    def start(self) -> None:
        self._tool("start")
        self.jobs.mkdir()

    def stop(self) -> None:
        self._tool("stop")

    def _tool(self, verb: str) -> None:
        # Not captured through pipes: the daemons would hold those open.
        with (self.folder.parent / f"{verb}.txt").open("w+") as said:
            command = [str(TOOL), verb, str(self.folder)]
            done = subprocess.run(command, stdout=said, stderr=said, timeout=START_SECONDS, check=False)
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

    def submit(self, file: str | Path, *options: str, **environment: str) -> Job:
        command = ["sbatch", "--parsable", f"--output={self.jobs}/%j.txt", *ON_TWO_NODES, HALF_A_NODE]
        path = ROOT / "slurm" / file
        return Job(self, self.call(*command, *options, str(path), environment=environment).stdout.strip())

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

    def until(self, condition: Callable[[], bool], seconds: float = JOB_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"job {self.number}: {self.facts()}\n{self.output}"
            time.sleep(0.3)

    def finish(self) -> str:
        """Its last state. A requeued job is pending in between."""
        self.until(lambda: self.state in OVER)
        self.until(lambda: not self.processes())
        return self.state

    def after_step(self, step: int, run_dir: Path) -> None:
        metrics = run_dir / "metrics.jsonl"

        def is_past() -> bool:
            past = metrics.exists() and f'"step": {step},' in metrics.read_text()
            assert past or self.state not in OVER, self.output
            return past

        self.until(is_past)

    def tell_batch_script(self, signal: str) -> None:
        self.cluster.call("scancel", f"--signal={signal}", "--batch", self.number)

    def cancel(self) -> None:
        self.cluster.call("scancel", self.number)

    def processes(self, **variables: str) -> list[psutil.Process]:
        """Those on the nodes that belong to it and have these variables in their environment."""
        wanted = {"SLURM_JOB_ID": self.number, "SLURM_CONF": self.cluster.environment["SLURM_CONF"]}
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
