"""A heterogeneous job: ranks on one node sample from real SGLang servers on the other."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import psutil
import pytest

from tests import tiny
from tests.slurm.cluster import ROOT, Cluster, Job, words

pytestmark = pytest.mark.slurm
COMPONENT = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=4")
OPTIONS = (*COMPONENT, "--nodelist=node1", ":", *COMPONENT, "--nodelist=node2")


def _submit(cluster: Cluster, recipe: str, python: str, run_dir: Path, **changes: object) -> Job:
    overrides = {"run.dir": run_dir, "parallel.dp": 1, "rollout.sglang.servers": 1, **changes}
    command = ["sbatch", "--parsable", f"--output={cluster.jobs}/%j.txt", *OPTIONS]
    environment = {"RECIPE": recipe, "OVERRIDES": words(overrides), "GRPO_MEGA_SGLANG_PYTHON": python}
    said = cluster.call(*command, str(ROOT / "slurm" / "rollout_node.sbatch"), environment=environment)
    return Job(cluster, said.stdout.strip())


def _about(run_dir: Path, *wanted: str) -> list[psutil.Process]:
    """Processes whose command line names the run and these words."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(run_dir) in line and all(word in line for word in wanted):
            found.append(process)
    return found


def test_a_dead_server_is_started_again_and_both_components_end_together(
    cluster: Cluster, recipe: str, sglang_python: str, tmp_path: Path
):
    run_dir = tmp_path / "run"
    job = _submit(cluster, recipe, sglang_python, run_dir, **{"train.updates_per_batch": 1})
    job.after_step(1, run_dir)
    (url,) = (run_dir / "servers" / "urls.txt").read_text().split()
    assert url.startswith("http://node2:")
    guard = min(_about(run_dir, "sglang.launch_server"), key=lambda process: process.create_time())
    guard.send_signal(signal.SIGKILL)  # its server dies with it
    assert job.finish() == "COMPLETED", job.output
    job.until(lambda: not _about(run_dir))
    assert "died: starting it again" in (run_dir / "logs" / "serve.txt").read_text()
    rows = [row for row in tiny.metrics_of(run_dir) if "mismatch/abs_max" in row]
    assert rows[-1]["step"] == 8
    assert all(row["mismatch/abs_max"] < 1e-3 for row in rows)  # every sample is of the trainer's weights
    assert re.search(r"servers on node2 write their addresses to \S+", job.output)


def test_without_its_servers_a_job_ends(cluster: Cluster, recipe: str, sglang_python: str, tmp_path: Path):
    run_dir = tmp_path / "run"
    job = _submit(cluster, recipe, sglang_python, run_dir)
    serving = ("grpo_mega", " serve ", "--host")
    job.until(lambda: bool(_about(run_dir, *serving)) and bool(_about(run_dir, "grpo_mega train")))
    for process in _about(run_dir, *serving):
        process.send_signal(signal.SIGKILL)
    assert job.finish() == "FAILED", job.output
    assert "error: the servers ended, with exit code" in job.output
    job.until(lambda: not _about(run_dir))
    assert not list(run_dir.glob("slurm_lock*"))
