"""Every job file, two steps each, by real srun over two nodes: real gloo between two network namespaces."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from grpo_mega.recipe import load_recipe
from tests.slurm.cluster import ROOT, Cluster, Job, words

pytestmark = pytest.mark.slurm

FILES = sorted(path.name for path in (ROOT / "slurm").glob("*.sbatch"))
SWEEP = "sweep_ema_beta.sbatch"
TRAINING = [name for name in FILES if name not in (SWEEP, "eval.sbatch", "rollout_node.sbatch")]
SOURCE = "innovation_2_1_ema.sbatch"
"""The run that eval.sbatch measures."""


class Queue:
    """All jobs, submitted at once: Slurm runs two at a time, each with half of both nodes."""

    def __init__(self, cluster: Cluster, recipe: str, folder: Path):
        self.folder = folder
        self.jobs = {name: self._train(cluster, name, recipe) for name in TRAINING}
        self.jobs["eval.sbatch"] = cluster.submit(
            "eval.sbatch",
            f"--dependency=afterok:{self.jobs[SOURCE].number}",
            RUN=str(self.run_dir(SOURCE)),
            OVERRIDES="eval.temperature=0",
        )
        # Each task has the run.dir that the file gives it, below the directory it starts in.
        two = ("--array=1,3", f"--chdir={folder}")
        self.sweep = cluster.submit(SWEEP, *two, RECIPE=recipe, OVERRIDES="train.steps=2")

    def _train(self, cluster: Cluster, name: str, recipe: str) -> Job:
        changes = {"run.dir": self.run_dir(name), "train.steps": 2, "parallel.dp": 2}
        return cluster.submit(name, RECIPE=recipe, OVERRIDES=words(changes))

    def run_dir(self, name: str) -> Path:
        return self.folder / Path(name).stem


@pytest.fixture(scope="module")
def queue(cluster: Cluster, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Queue:
    return Queue(cluster, recipe, tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("name", FILES)
def test_a_cluster_accepts_it_as_it_is(name: str, cluster: Cluster):
    said = cluster.call("sbatch", "--test-only", f"slurm/{name}").stderr
    assert "to start at" in said


@pytest.mark.parametrize("name", TRAINING)
def test_it_trains(name: str, queue: Queue):
    job, run_dir = queue.jobs[name], queue.run_dir(name)
    assert job.finish() == "COMPLETED", job.output
    assert "2 ranks meet at node" in job.output
    assert f":{20000 + int(job.number) % 10000};" in job.output
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2
    assert (run_dir / "hf" / "config.json").is_file()
    assert {path.name for path in (run_dir / "logs").glob("rank_*")} == {"rank_0.txt", "rank_1.txt"}
    assert not list(run_dir.glob("slurm_lock*"))
    _assert_loss_of(name, run_dir)


def _assert_loss_of(name: str, run_dir: Path) -> None:
    """The run took the innovations that its file names."""
    picked = load_recipe(run_dir / "recipe.yaml").recipe.loss.innovations.model_dump()
    text = (ROOT / "slurm" / name).read_text()
    named = {
        word.split(".")[2].split("=")[0] for word in text.split() if word.startswith("loss.innovations.")
    }
    assert set(picked) == named


def test_eval_measures_the_run_when_it_is_done(queue: Queue):
    job = queue.jobs["eval.sbatch"]
    assert job.finish() == "COMPLETED", job.output
    assert "pass@1" in job.output


def test_each_task_of_the_sweep_has_its_beta(queue: Queue):
    job = queue.sweep
    for task, beta in ((1, 0.7), (3, 0.95)):
        element = Job(job.cluster, f"{job.number}_{task}")
        element.until(lambda element=element: element.state in ("COMPLETED", "FAILED"))
        assert element.state == "COMPLETED", job.output
        run = load_recipe(queue.folder / f"runs/slurm/ema_beta_{beta}/recipe.yaml").recipe
        assert run.loss.innovations.model_dump() == {"ema": {"beta": beta}}


def test_the_command_writes_a_file_that_slurm_takes_and_submits_it(
    cluster: Cluster, recipe: str, tmp_path: Path
):
    options = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-rank=64", "--partition=debug", "--time=10:00"]
    changes = [f"run.dir={tmp_path}/run", "train.steps=2", "run.name=any"]
    command = [sys.executable, "-m", "grpo_mega", "slurm", recipe, *changes, *options, "--submit"]
    said = cluster.call(*command, folder=tmp_path).stdout
    assert "wrote any.sbatch: 2 node(s) with 1 rank(s) each" in said and "to start at" in said
    job = Job(cluster, re.findall(r"submitted: job (\d+)", said)[0])
    assert job.finish() == "COMPLETED", (tmp_path / f"any-{job.number}.out").read_text()
    assert (tmp_path / "run" / "hf" / "config.json").is_file()
