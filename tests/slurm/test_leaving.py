"""Jobs that end before their work does: asked to, killed, hung, cancelled, without a node, or unwanted."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from grpo_mega.checkpoints import complete_checkpoints
from tests import tiny
from tests.slurm.cluster import Cluster, Job, words

pytestmark = pytest.mark.slurm
FILE = "innovation_2_1_ema.sbatch"


def _submit(cluster: Cluster, recipe: str, run_dir: Path, **changes: object) -> Job:
    overrides = {"run.dir": run_dir, "train.updates_per_batch": 1}
    overrides |= {key.replace("__", "."): value for key, value in changes.items()}
    return cluster.submit(FILE, RECIPE=recipe, OVERRIDES=words(overrides))


def _endless(cluster: Cluster, recipe: str, run_dir: Path, **changes: object) -> Job:
    return _submit(cluster, recipe, run_dir, stages__grpo__steps=100_000, **changes)


def test_asked_to_leave_it_saves_is_requeued_and_goes_on_exactly(
    undisturbed: tuple[Job, Path], cluster: Cluster, recipe: str, tmp_path: Path
):
    run_dir = tmp_path / "run"
    job = _submit(cluster, recipe, run_dir)
    job.after_step(2, run_dir)
    job.tell_batch_script("USR1")  # as --signal=B:USR1@180 does
    job.until(lambda: job.restarts == 1)
    assert "saved after step" in (run_dir / "logs" / "rank_0.txt").read_text()
    assert 2 <= int(complete_checkpoints(run_dir / "checkpoints")[-1].name[5:]) < 8
    assert job.finish() == "COMPLETED", job.output
    other, other_dir = undisturbed
    assert other.finish() == "COMPLETED", other.output
    assert "resumed after step" in (run_dir / "logs" / "rank_0.txt").read_text()
    assert tiny.metrics_of(run_dir) == tiny.metrics_of(other_dir)


def test_the_limit_comes_two_jobs_want_one_directory_and_a_cancelled_one_leaves_nothing(
    cluster: Cluster, recipe: str, tmp_path: Path
):
    run_dir = tmp_path / "run"
    job = _endless(cluster, recipe, run_dir)
    job.after_step(2, run_dir)
    second = _submit(cluster, recipe, run_dir)
    assert second.finish() == "FAILED"
    assert f"job {job.number} writes to {run_dir}" in second.output and "remedy:" in second.output
    # Less than the 180 seconds of --signal are left: Slurm asks at its next look, within half a minute.
    cluster.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=3")
    job.until(lambda: job.restarts == 1)
    cluster.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    job.until(lambda: "resumed after step" in (run_dir / "logs" / "rank_0.txt").read_text())
    job.cancel()
    assert job.finish() == "CANCELLED"
    assert job.restarts == 1 and not list(run_dir.glob("slurm_lock*"))


def test_a_node_that_goes_down_takes_the_job_along_and_it_comes_back(
    cluster: Cluster, recipe: str, tmp_path: Path
):
    run_dir = tmp_path / "run"
    job = _submit(cluster, recipe, run_dir, checkpoint__every=2)
    job.after_step(4, run_dir)
    cluster.call("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    try:
        job.until(lambda: job.restarts == 1)
        job.until(lambda: not job.processes())
    finally:
        cluster.call("scontrol", "update", "NodeName=node2", "State=RESUME")
    assert job.finish() == "COMPLETED", job.output
    assert "resumed after step" in (run_dir / "logs" / "rank_0.txt").read_text()
    assert tiny.metrics_of(run_dir)[-1]["step"] == 8


def test_a_killed_rank_fails_the_job_with_a_reason(cluster: Cluster, recipe: str, tmp_path: Path):
    run_dir = tmp_path / "run"
    job = _endless(cluster, recipe, run_dir)
    job.after_step(1, run_dir)
    job.rank(1).send_signal(signal.SIGKILL)
    assert job.finish() == "FAILED" and job.restarts == 0
    assert "error: rank 1 of 2 on node2 was killed by signal 9 (SIGKILL)" in job.output
    assert "memory" in job.output


def test_a_hung_rank_is_found_and_the_job_starts_again(cluster: Cluster, recipe: str, tmp_path: Path):
    run_dir = tmp_path / "run"
    job = _submit(cluster, recipe, run_dir, checkpoint__every=1, guard__hang_minutes=1)
    job.after_step(2, run_dir)
    job.rank(1).send_signal(signal.SIGSTOP)
    job.until(lambda: job.restarts == 1)
    stack = (run_dir / "logs" / "stacks" / "rank_0.txt").read_text()
    assert "nothing finished in 1 minutes" in stack and "train.py" in stack
    assert "  rank 1: missing; left no stack" in job.output and re.search(
        r"  rank 0: grpo_mega/\S+ in ", job.output
    )
    assert job.finish() == "COMPLETED", job.output
    assert tiny.metrics_of(run_dir)[-1]["step"] == 8


def test_a_recipe_that_does_not_fit_the_tasks_is_refused_before_any_rank(
    cluster: Cluster, recipe: str, tmp_path: Path
):
    job = _submit(cluster, recipe, tmp_path / "run", parallel__dp=3)
    assert job.finish() == "FAILED"
    assert "2 processes were started for a layout of 3" in job.output and "meet at" not in job.output
    assert not (tmp_path / "run").exists()
