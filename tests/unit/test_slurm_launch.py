"""slurm/launch.sh without a Slurm: srun, scontrol and squeue are stubs that note what they were asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "quickstart.yaml")
STUBS = {
    "srun": """
        trap 'echo USR1 >> "$NOTES"; exit "$SRUN_CODE"' USR1
        printf '%s\\n' "srun $*" >> "$NOTES"
        touch "$NOTES.up"
        [ "$SRUN_CODE" = 0 ] || echo "srun: error: node1: task 0: Exited with exit code $SRUN_CODE" >&2
        if [ "${SRUN_WAITS:-}" ]; then while true; do sleep 0.05; done; fi
        exit "$SRUN_CODE"
    """,
    "scontrol": """
        case "$*" in
          *hostnames*) printf 'node1\\nnode2\\n' ;;
          *"show job"*) echo "JobId=7 JobState=${JOB_STATE:-RUNNING} Reason=None" ;;
          *) echo "scontrol $*" >> "$NOTES" ;;
        esac
    """,
    "squeue": "echo RUNNING",
}


def _start(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    bin_dir = folder / "bin"
    bin_dir.mkdir(exist_ok=True)
    for name, body in STUBS.items():
        path = bin_dir / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    notes = {"NOTES": str(folder / "notes"), "PATH": f"{bin_dir}:{os.environ['PATH']}"}
    python = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [ROOT / "slurm" / "launch.sh", *arguments],
        env={**os.environ, **job, **notes, **python, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _run(folder: Path, **variables: str) -> tuple[int, str, str]:
    """Exit code, what was printed, what the stubs were asked."""
    process = _start(folder, "train", RECIPE, f"run.dir={folder}/run", **variables)
    printed, errors = process.communicate(timeout=120)
    notes = folder / "notes"
    return process.returncode, printed + errors, notes.read_text() if notes.exists() else ""


def test_ranks_start_with_all_arguments_and_the_lock_is_gone_afterwards(tmp_path: Path):
    overrides = "train.steps=3 data.system='two words' loss.innovations.ema={}"
    code, printed, notes = _run(tmp_path, SRUN_CODE="0", OVERRIDES=overrides, OPTIONS="--resume --quiet")
    assert code == 0 and "2 ranks meet at node1:20007" in printed
    assert notes.startswith("srun --kill-on-bad-exit=1 --distribution=block")
    assert f"-m grpo_mega train {RECIPE}" in notes
    assert "train.steps=3 data.system=two words loss.innovations.ema={} --resume --quiet" in notes
    assert not list((tmp_path / "run").glob("slurm_lock*"))


@pytest.mark.parametrize(
    ("variables", "code", "requeued"),
    [
        ({"SRUN_CODE": "85"}, 85, True),
        ({"SRUN_CODE": "85", "JOB_STATE": "CANCELLED"}, 85, False),
        ({"SRUN_CODE": "85", "SLURM_RESTART_COUNT": "2", "MAX_RESTARTS": "2"}, 85, False),
        ({"SRUN_CODE": "1"}, 1, False),
        ({"SRUN_CODE": "0"}, 0, False),
    ],
    ids=["saved", "cancelled", "too-often", "failed", "done"],
)
def test_only_a_job_that_saved_comes_back(
    tmp_path: Path, variables: dict[str, str], code: int, requeued: bool
):
    found, printed, notes = _run(tmp_path, **variables)
    assert (found, "scontrol requeue 7" in notes) == (code, requeued), printed
    assert ("MAX_RESTARTS is 2" in printed) == ("MAX_RESTARTS" in variables)


def test_one_task_of_an_array_requeues_itself_and_not_the_array(tmp_path: Path):
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    _, _, notes = _run(tmp_path, SRUN_CODE="85", **task)
    assert "scontrol requeue 7_3\n" in notes


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_ranks_once_and_as_usr1(tmp_path: Path, number: signal.Signals):
    command = ("train", RECIPE, f"run.dir={tmp_path}/run")
    process = _start(tmp_path, *command, SRUN_CODE="85", SRUN_WAITS="yes")
    deadline = time.monotonic() + 60
    while not (tmp_path / "notes.up").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    notes = (tmp_path / "notes").read_text()
    assert process.returncode == 85, printed + errors
    assert notes.count("USR1\n") == 1 and "scontrol requeue 7" in notes


def test_a_layout_that_does_not_fit_starts_no_rank(tmp_path: Path):
    code, printed, notes = _run(tmp_path, SLURM_NTASKS="3")
    assert (code, notes) == (2, "")
    assert printed.startswith("error: 3 processes were started for a layout of 2")
