"""Jobs that leave their nodes and come back: asked to, taken off by Slurm, hung; and how often."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from grpo_mega.checkpoints import complete_checkpoints
from grpo_mega.recipe import load_recipe
from tests import tiny
from tests.beside import beside_others
from tests.slurm.cluster import APART, ELSEWHERE, Job, words
from tests.slurm.world import ENDLESS, INNOVATION, STEPS, World, assert_trained

pytestmark = pytest.mark.slurm
SWEEP = "sweep_ema_beta.sbatch"


@beside_others
def test_asked_to_leave_it_saves_and_requeued_by_hand_it_goes_on_exactly(world: World, folder: Path):
    run_dir, log = folder / "run", folder / "run" / "logs" / "rank_0.txt"
    job = world.submit(INNOVATION, run_dir, checkpoint__every=2)
    job.after_step(2, run_dir)
    job.tell_batch_script("USR1")  # as --signal=B:USR1@180 does
    job.until(lambda: job.restarts == 1)
    assert "saved after step" in log.read_text()
    saved = int(complete_checkpoints(run_dir / "checkpoints")[-1].name[5:])
    assert 2 <= saved < STEPS - 2
    assert job.comes_back(1, run_dir) == saved
    job.after_step(saved + 1, run_dir)
    world.cluster.call("scontrol", "requeue", job.number)
    assert job.comes_back(2, run_dir) >= saved
    assert_trained(INNOVATION, job, run_dir, STEPS)
    assert job.restarts == 2
    assert world.undisturbed.finish() == "COMPLETED", world.undisturbed.output
    assert tiny.metrics_of(run_dir) == tiny.metrics_of(world.undisturbed_dir)


@beside_others
def test_pushed_out_it_saves_and_with_a_lost_node_it_comes_back_but_with_a_killed_rank_it_fails(
    world: World, folder: Path
):
    """Meanwhile another job wants its directory, and does not get it."""
    run_dir, log, call = folder / "run", folder / "run" / "logs" / "rank_0.txt", world.cluster.call
    job = world.submit(INNOVATION, run_dir, *APART, **ENDLESS)
    job.after_step(1, run_dir)
    second = world.submit(INNOVATION, run_dir, ELSEWHERE)
    assert second.finish() == "FAILED"
    assert f"job {job.number} writes to {run_dir}" in second.output and "remedy:" in second.output

    urgent = world.cluster.command("sleep 1", "--partition=urgent", APART[1], "--nodes=2", "--exclusive")
    assert urgent.finish() == "COMPLETED"
    assert log.read_text().count("saved after step") == 1  # it was asked before it was pushed
    pushed = job.comes_back(1, run_dir)
    assert pushed >= 1  # nothing was lost

    job.after_step(pushed + 1, run_dir)
    call("scontrol", "update", "NodeName=node4", "State=DOWN", "Reason=test")
    try:
        job.until(lambda: job.restarts == 2)
        job.until(lambda: not job.processes())
    finally:
        call("scontrol", "update", "NodeName=node4", "State=RESUME")
    assert job.comes_back(2, run_dir) >= pushed

    job.rank(1).send_signal(signal.SIGKILL)
    assert job.finish() == "FAILED" and job.restarts == 2
    assert "error: rank 1 of 2 on node4 was killed by signal 9 (SIGKILL)" in job.output
    assert "memory" in job.output
    assert not list(run_dir.glob("slurm_lock*"))


@beside_others
def test_a_hung_task_of_a_sweep_comes_back_alone_and_at_its_limit_stays_away_as_a_cancelled_one_does(
    world: World, folder: Path
):
    """MAX_RESTARTS is 1: asked to leave as its time ends, it saves, and no more. Each task has its beta."""
    changes = {**ENDLESS, "checkpoint.every": 1, "guard.hang_minutes": 0.7}
    options = ("--array=1,3", f"--chdir={folder}")
    array = world.cluster.submit(
        SWEEP, *options, RECIPE=world.recipe, OVERRIDES=words(changes), MAX_RESTARTS="1"
    )
    one, three = (Job(world.cluster, f"{array.number}_{task}") for task in (1, 3))
    betas = (0.7, 0.95)
    run_dirs = [folder / "runs" / "slurm" / f"ema_beta_{beta}" for beta in betas]
    log = run_dirs[0] / "logs" / "rank_0.txt"
    one.after_step(2, run_dirs[0])
    three.after_step(1, run_dirs[1])
    for beta, run_dir in zip(betas, run_dirs, strict=True):
        loss = load_recipe(run_dir / "recipe.yaml").recipe.loss
        assert loss.innovations.model_dump() == {"ema": {"beta": beta}}

    one.rank(1).send_signal(signal.SIGSTOP)
    one.until(lambda: one.restarts == 1)
    assert (three.restarts, three.state) == (0, "RUNNING")
    three.cancel()
    stack = (run_dirs[0] / "logs" / "stacks" / "rank_0.txt").read_text()
    assert "nothing finished in 0.7 minutes" in stack and "train.py" in stack
    assert "  rank 1: missing; left no stack" in one.output
    assert re.search(r"  rank 0: grpo_mega/\S+ in ", one.output)
    step = one.comes_back(1, run_dirs[0])
    one.after_step(step + 1, run_dirs[0])
    assert "saved after step" not in log.read_text()

    # Less than the 180 seconds of --signal are left: Slurm asks at its next look, within half a minute.
    world.cluster.call("scontrol", "update", f"JobId={one.number}", "TimeLimit=3")
    assert one.finish() == "FAILED"
    assert one.restarts == 1
    assert "saved after step" in log.read_text()
    assert "come back 1 times, and MAX_RESTARTS is 1" in one.output and "remedy:" in one.output
    assert three.finish() == "CANCELLED" and three.restarts == 0
    for run_dir in run_dirs:
        assert not list(run_dir.glob("slurm_lock*"))


@beside_others
def test_a_recipe_that_does_not_fit_the_tasks_is_refused_before_any_rank(world: World, folder: Path):
    job = world.submit(INNOVATION, folder / "run", ELSEWHERE, parallel__dp=3)
    assert job.finish() == "FAILED"
    assert "2 processes were started for a layout of 3" in job.output and "meet at" not in job.output
    assert not (folder / "run").exists()
