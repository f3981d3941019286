"""What tests have whose jobs run beside one another: most of the time each waits."""

from __future__ import annotations

import json
import re
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from grpo_mega.recipe import load_recipe
from grpo_mega.recipe.schema import Recipe
from tests.sglang.conftest import installed_sglang
from tests.slurm.cluster import ROOT, Cluster, Job, words

INNOVATION = "innovation_2_1_ema.sbatch"
STEPS = 10
ENDLESS = {"stages.grpo.steps": 100_000, "rollout.generate": "tests.slurm.unhurried:at_leisure"}


@dataclass(eq=False)
class World:
    """The cluster, and a job of `STEPS` steps in one go to compare with, which the command has submitted."""

    cluster: Cluster
    recipe: str
    undisturbed_dir: Path
    undisturbed: Job = field(init=False)
    said: str = field(init=False)  # by the command
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        """What the file INNOVATION asks for."""
        folder = self.undisturbed_dir.parent
        folder.mkdir()
        changes = {"run.name": "any", "run.dir": self.undisturbed_dir, "train.updates_per_batch": 1}
        changes |= {"loss.innovations.ema.beta": 0.9}
        options = (
            "--nodes=2",
            "--gpus-per-node=1",
            "--cpus-per-rank=42",
            "--partition=debug",
            "--time=2:00:00",
        )
        command = (sys.executable, "-m", "grpo_mega", "slurm", self.recipe, *words(changes).split(), *options)
        self.said = self.cluster.call(*command, "--submit", folder=folder).stdout
        self.undisturbed = Job(self.cluster, re.findall(r"submitted: job (\d+)", self.said)[0])

    def submit(self, file: str, run_dir: Path, *options: str, **changes: object) -> Job:
        """A training job with one update a batch; guard__hang_minutes is guard.hang_minutes."""
        given = {"run.dir": run_dir, "train.updates_per_batch": 1}
        given |= {key.replace("__", "."): value for key, value in changes.items()}
        return self.cluster.submit(file, *options, RECIPE=self.recipe, OVERRIDES=words(given))

    def sglang_python(self) -> str:
        with self._lock:
            return installed_sglang()


def assert_trained(name: str, job: Job, run_dir: Path, count: int) -> None:
    assert job.finish() == "COMPLETED", job.output
    assert "2 ranks meet at node" in job.output
    assert f":{20000 + int(job.number) % 10000};" in job.output
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == count
    assert (run_dir / "hf" / "config.json").is_file()
    assert {path.name for path in (run_dir / "logs").glob("rank_*")} == {"rank_0.txt", "rank_1.txt"}
    assert not list(run_dir.glob("slurm_lock*"))
    assert_picked(name, load_recipe(run_dir / "recipe.yaml").recipe)


def assert_picked(name: str, recipe: Recipe) -> None:
    """The recipe has the innovations that the file names, and no other ones."""
    text = (ROOT / "slurm" / name).read_text()
    named = {
        word.split(".")[2].split("=")[0] for word in text.split() if word.startswith("loss.innovations.")
    }
    assert set(recipe.loss.innovations.model_dump()) == named
