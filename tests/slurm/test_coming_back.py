"""Jobs that Slurm itself takes off their nodes, and how often one comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.slurm.cluster import Cluster, Job, words

pytestmark = pytest.mark.slurm
FILE = "innovation_2_1_ema.sbatch"
SWEEP = "sweep_ema_beta.sbatch"


def test_requeued_by_hand_it_goes_on_exactly(
    undisturbed: tuple[Job, Path], cluster: Cluster, recipe: str, tmp_path: Path
):
    run_dir = tmp_path / "run"
    changes = {"run.dir": run_dir, "train.updates_per_batch": 1, "checkpoint.every": 2}
    job = cluster.submit(FILE, RECIPE=recipe, OVERRIDES=words(changes))
    job.after_step(3, run_dir)
    cluster.call("scontrol", "requeue", job.number)
    assert job.finish() == "COMPLETED", job.output
    assert job.restarts == 1
    assert "resumed after step" in (run_dir / "logs" / "rank_0.txt").read_text()
    other, other_dir = undisturbed
    assert other.finish() == "COMPLETED", other.output
    assert tiny.metrics_of(run_dir) == tiny.metrics_of(other_dir)


def test_pushed_out_by_an_urgent_job_it_saves_and_comes_back(cluster: Cluster, recipe: str, tmp_path: Path):
    run_dir = tmp_path / "run"
    changes = {"run.dir": run_dir, "train.updates_per_batch": 1, "stages.grpo.steps": 100_000}
    job = cluster.submit(FILE, "--exclusive", RECIPE=recipe, OVERRIDES=words(changes))
    job.after_step(1, run_dir)
    urgent = cluster.command("sleep 1", "--partition=urgent", "--nodes=2", "--exclusive")
    assert urgent.finish() == "COMPLETED"
    log = run_dir / "logs" / "rank_0.txt"
    assert "saved after step" in log.read_text()  # nothing was lost: it was asked before it was pushed
    job.until(lambda: "resumed after step" in log.read_text())
    job.cancel()
    assert job.finish() == "CANCELLED"
    assert job.restarts == 1 and "resumed after step" in log.read_text()


def test_one_task_of_an_array_comes_back_alone_and_only_so_often(
    cluster: Cluster, recipe: str, tmp_path: Path
):
    """MAX_RESTARTS is 1: asked to leave a second time, it stays away."""
    endless = {"stages.grpo.steps": 100_000}
    options = ("--array=1,3", f"--chdir={tmp_path}")
    array = cluster.submit(SWEEP, *options, RECIPE=recipe, OVERRIDES=words(endless), MAX_RESTARTS="1")
    one, three = (Job(cluster, f"{array.number}_{task}") for task in (1, 3))
    run_dirs = [tmp_path / "runs" / "slurm" / f"ema_beta_{beta}" for beta in (0.7, 0.95)]
    one.after_step(1, run_dirs[0])
    three.after_step(1, run_dirs[1])
    one.tell_batch_script("USR1")
    log = run_dirs[0] / "logs" / "rank_0.txt"
    one.until(lambda: "resumed after step" in log.read_text())
    assert (one.restarts, three.restarts, three.state) == (1, 0, "RUNNING")
    three.cancel()
    one.tell_batch_script("USR1")
    one.until(lambda: one.state == "FAILED")
    assert one.restarts == 1
    assert "come back 1 times, and MAX_RESTARTS is 1" in one.output and "remedy:" in one.output
    assert not list(run_dirs[0].glob("slurm_lock*"))
