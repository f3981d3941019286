"""A heterogeneous job: ranks on one node sample from real SGLang servers on the other."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import psutil
import pytest

from tests import tiny
from tests.beside import beside_others
from tests.slurm.cluster import LOOK_EVERY_SECONDS, SERVING, Job, words
from tests.slurm.world import World

pytestmark = pytest.mark.slurm
STEPS = 4
RANKS_AT, SERVERS_AT = SERVING
COMPONENT = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=4")
OPTIONS = (*COMPONENT, f"--nodelist={RANKS_AT}", ":", *COMPONENT, f"--nodelist={SERVERS_AT}")


def _submit(world: World, run_dir: Path, **changes: object) -> Job:
    overrides = {"run.dir": run_dir, "parallel.dp": 1, "rollout.sglang.servers": 1, "train.steps": STEPS}
    return world.cluster.submit_as_it_is(
        "rollout_node.sbatch",
        *OPTIONS,
        RECIPE=world.recipe,
        OVERRIDES=words({**overrides, **changes}),
        GRPO_MEGA_SGLANG_PYTHON=world.sglang_python(),
    )


def _about(run_dir: Path, *wanted: str) -> list[psutil.Process]:
    """Processes whose command line names the run and these words."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(run_dir) in line and all(word in line for word in wanted):
            found.append(process)
    return found


@beside_others
def test_a_dead_server_is_started_again_and_both_components_end_together(world: World, folder: Path):
    run_dir = folder / "run"
    job = _submit(world, run_dir, **{"train.updates_per_batch": 1})
    job.after_step(1, run_dir)
    (url,) = (run_dir / "servers" / "urls.txt").read_text().split()
    assert url.startswith(f"http://{SERVERS_AT}:")
    guard = min(_about(run_dir, "sglang.launch_server"), key=lambda process: process.create_time())
    guard.send_signal(signal.SIGKILL)  # its server dies with it
    assert job.finish() == "COMPLETED", job.output
    job.until(lambda: not _about(run_dir))
    assert "died: starting it again" in (run_dir / "logs" / "serve.txt").read_text()
    rows = [row for row in tiny.metrics_of(run_dir) if "mismatch/abs_max" in row]
    assert rows[-1]["step"] == STEPS
    assert all(row["mismatch/abs_max"] < 1e-3 for row in rows)  # every sample is of the trainer's weights
    assert re.search(rf"servers on {SERVERS_AT} write their addresses to \S+", job.output)


@beside_others
def test_without_its_servers_a_job_ends(world: World, folder: Path):
    run_dir = folder / "run"
    job = _submit(world, run_dir)
    serving = ("grpo_mega", " serve ", "--host")
    job.until(
        lambda: bool(_about(run_dir, *serving)) and bool(_about(run_dir, "grpo_mega train")),
        LOOK_EVERY_SECONDS,
    )
    for process in _about(run_dir, *serving):
        process.send_signal(signal.SIGKILL)
    assert job.finish() == "FAILED", job.output
    assert "error: the servers ended, with exit code" in job.output
    job.until(lambda: not _about(run_dir))
    assert not list(run_dir.glob("slurm_lock*"))
