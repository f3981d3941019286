"""Job files by real srun: real gloo between the network namespaces of nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_mega.recipe import load_recipe
from tests.beside import beside_others
from tests.slurm.cluster import ROOT, SERVING, Cluster, Job, words
from tests.slurm.world import INNOVATION, STEPS, World, assert_picked, assert_trained

pytestmark = pytest.mark.slurm

FILES = sorted(path.name for path in (ROOT / "slurm").glob("*.sbatch"))
SWEEP = "sweep_ema_beta.sbatch"
TRAINING = [name for name in FILES if name not in (SWEEP, "eval.sbatch", "rollout_node.sbatch")]


@pytest.mark.parametrize("name", FILES)
def test_a_cluster_accepts_it_as_it_is(name: str, cluster: Cluster):
    said = cluster.call("sbatch", "--test-only", f"slurm/{name}").stderr
    assert "to start at" in said


@pytest.mark.parametrize("name", TRAINING)
def test_the_innovations_that_it_names_are_picked(name: str, recipe: str):
    changes = [word for word in (ROOT / "slurm" / name).read_text().split() if word.startswith("loss.")]
    assert_picked(name, load_recipe(Path(recipe), changes).recipe)


@beside_others
def test_the_command_submits_a_file_that_trains_on_two_nodes_and_eval_measures_the_run(
    world: World, folder: Path
):
    job = world.undisturbed
    measuring = world.cluster.submit(
        "eval.sbatch",
        f"--dependency=afterok:{job.number}",
        RUN=str(world.undisturbed_dir),
        OVERRIDES="eval.temperature=0",
    )
    assert "wrote any.sbatch: 2 node(s) with 1 rank(s) each" in world.said and "to start at" in world.said
    assert_trained(INNOVATION, job, world.undisturbed_dir, STEPS)
    assert measuring.finish() == "COMPLETED", measuring.output
    assert "pass@1" in measuring.output


@beside_others
def test_a_job_of_one_node_trains_as_its_file_says(world: World, folder: Path):
    name = "debug_single_node.sbatch"
    changes = words({"run.dir": folder / "run", "train.steps": 2})
    job = world.cluster.submit_as_it_is(
        name, f"--nodelist={SERVING[0]}", f"--chdir={folder}", RECIPE=world.recipe, OVERRIDES=changes
    )
    assert_trained(name, job, folder / "run", 2)


class Queue:
    """All jobs, submitted at once: Slurm runs three at a time, each with a third of both nodes."""

    def __init__(self, cluster: Cluster, recipe: str, folder: Path):
        self.folder = folder
        self.jobs = {name: self._train(cluster, name, recipe) for name in TRAINING}
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


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TRAINING)
def test_every_file_trains_on_two_nodes(name: str, queue: Queue):
    assert_trained(name, queue.jobs[name], queue.run_dir(name), 2)


@pytest.mark.exhaustive
def test_each_task_of_the_sweep_trains_to_its_end_with_its_beta(queue: Queue):
    job = queue.sweep
    for task, beta in ((1, 0.7), (3, 0.95)):
        element = Job(job.cluster, f"{job.number}_{task}")
        assert element.finish() == "COMPLETED", job.output
        run = load_recipe(queue.folder / f"runs/slurm/ema_beta_{beta}/recipe.yaml").recipe
        assert run.loss.innovations.model_dump() == {"ema": {"beta": beta}}
