"""What a job checks before its ranks start, and what it makes of how they end."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from grpo_mega.cli import app
from grpo_mega.errors import UserError
from grpo_mega.recipe import load_recipe
from grpo_mega.slurm_command import Resources, job_file
from grpo_mega.slurm_job import (
    OPTIONS_WITH_VALUES,
    begin,
    endings,
    explain,
    free_port,
    release_lock,
    take_lock,
    verdict,
)

QUICKSTART = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
KILLED = "srun: error: node2: task 1: Killed"
LOST = "srun: error: node1: task 0: Exited with exit code 1"
SAVED = "srun: error: node[1-2]: tasks 0-1: Exited with exit code 85"
HUNG = "srun: error: node1: task 0: Exited with exit code 85"
NOISE = "srun: launch/slurm: _step_signal: Terminating StepId=1.0"


@pytest.fixture
def known_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A squeue that knows the jobs in this file, one a line."""
    known = tmp_path / "known"
    known.write_text("")
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(
        "#!/bin/bash\n"
        f'grep -qx "$3" {known} && echo RUNNING && exit\n'
        "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n"
    )
    squeue.chmod(squeue.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    return known


def test_one_job_at_a_time_writes_to_a_directory(tmp_path: Path, known_jobs: Path):
    known_jobs.write_text("7\n")
    take_lock(tmp_path, "7")
    take_lock(tmp_path, "7")  # requeued, it finds its own
    with pytest.raises(UserError, match="job 7 writes to"):
        take_lock(tmp_path, "8")
    release_lock(tmp_path, "8")  # not its own
    with pytest.raises(UserError):
        take_lock(tmp_path, "8")
    release_lock(tmp_path, "7")
    take_lock(tmp_path, "8")


def test_the_lock_of_a_dead_job_is_taken_over_once(tmp_path: Path, known_jobs: Path):
    take_lock(tmp_path, "7")
    known_jobs.write_text("8\n")
    take_lock(tmp_path, "8")
    release_lock(tmp_path, "7")  # the dead one's clean-up, late
    with pytest.raises(UserError, match="job 8 writes to"):
        take_lock(tmp_path, "9")
    assert [path.name for path in (tmp_path / "slurm_lock").iterdir()] == ["8"]


def test_a_holder_that_cannot_be_asked_about_is_taken_for_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    take_lock(tmp_path, "7")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="job 7 writes to"):
        take_lock(tmp_path, "8")


@pytest.mark.parametrize(
    ("said", "srun_code", "code", "ranks"),
    [
        ([], 0, 0, None),
        ([SAVED], 85, 85, None),
        ([HUNG, NOISE, KILLED], 137, 85, None),  # srun kills the rank that was stopped
        ([KILLED, NOISE, LOST], 137, 137, "1"),
        ([LOST, KILLED, NOISE], 137, 137, "1"),  # the same, heard in another order
        (["srun: error: node1: task 0: User defined signal 1"], 138, 85, None),  # asked before it listened
        (["srun: error: node1: tasks 0-7: Exited with exit code 2"], 2, 2, "0-7"),
        (["srun: error: node2: task 1: Segmentation fault (core dumped)"], 139, 139, "1"),
        (["srun: error: Node failure on node2"], 1, 1, None),
    ],
)
def test_the_cause_of_an_ending(said: list[str], srun_code: int, code: int, ranks: str | None):
    found, cause = verdict(endings(said), srun_code)
    assert (found, cause and cause.ranks) == (code, ranks)


def test_a_failure_is_told_with_the_words_of_the_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "srun.txt").write_text("srun: error: node2: task 1: Exited with exit code 2\n")
    (tmp_path / "rank_0.txt").write_text("error: of an earlier start\n")
    (tmp_path / "rank_1.txt").write_text("error: of an earlier start\nerror: heads = 6\n  remedy: tp 1\n")
    assert explain(tmp_path, 2, {"SLURM_NTASKS": "2"}) == 2
    said = capsys.readouterr().err
    assert "error: rank 1 of 2 on node2 ended with exit code 2" in said
    assert said.endswith("rank_1.txt:\nerror: heads = 6\n  remedy: tp 1\n")


def test_a_hang_is_told_with_the_rank_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    hung = "rank 0: nothing finished in 30 minutes (guard.hang_minutes)\n  rank 1: missing\n"
    (tmp_path / "srun.txt").write_text(f"{HUNG}\n")
    (tmp_path / "rank_0.txt").write_text(f"step 3\n{hung}")
    assert explain(tmp_path, 85, {"SLURM_NTASKS": "2"}) == 85
    assert capsys.readouterr().err == hung
    (tmp_path / "rank_0.txt").write_text(f"{hung}saved after step 5\n")  # of an earlier start
    explain(tmp_path, 85, {"SLURM_NTASKS": "2"})
    assert capsys.readouterr().err == ""


def test_srun_names_ranks_in_ranges():
    (ending,) = endings(["srun: error: node[1-2]: tasks 0-2,5: Exited with exit code 1"])
    assert ending.numbers == [0, 1, 2, 5]


def test_begin(tmp_path: Path, known_jobs: Path):
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}
    arguments = ["train", QUICKSTART, f"run.dir={tmp_path}/run"]
    first = begin(arguments, job)
    assert first.run_dir == tmp_path / "run" and first.logs.is_dir() and first.resume == ""
    assert begin(arguments, {**job, "SLURM_RESTART_COUNT": "1"}).resume == ""  # died before it wrote a word
    (tmp_path / "run" / "recipe.yaml").write_text("")
    assert begin(arguments, {**job, "SLURM_RESTART_COUNT": "1"}).resume == "--resume"
    assert begin([*arguments, "--resume"], {**job, "SLURM_RESTART_COUNT": "1"}).resume == ""  # said already
    with pytest.raises(UserError, match="--overwrite in a job"):
        begin([*arguments, "--overwrite"], job)
    with pytest.raises(UserError, match="8 processes were started for a layout of 2"):
        begin(arguments, {**job, "SLURM_NTASKS": "8"})


@pytest.mark.parametrize("options", [["--dump-rollouts", "kept"], ["--dump-rollouts=kept"]])
def test_a_value_of_an_option_is_no_override(options: list[str], tmp_path: Path, known_jobs: Path):
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}
    for words in (options, [*options, "--tracker", "none", "--quiet"]):
        start = begin(["train", QUICKSTART, *words, f"run.dir={tmp_path}/run"], job)
        assert start.run_dir == tmp_path / "run"
    with pytest.raises(UserError, match="--overwrite in a job"):
        begin(["train", *options, "--overwrite", QUICKSTART], job)


def test_the_options_with_values_are_those_of_the_commands():
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    parameters = [each for name in ("train", "eval") for each in commands[name].params]
    options = [each for each in parameters if each.param_type_name == "option"]
    flags = {name for option in options if option.is_flag for name in option.opts}
    assert flags >= {"--resume", "--overwrite"} and not flags & OPTIONS_WITH_VALUES
    assert {name for option in options for name in option.opts} - flags - {"--help"} == OPTIONS_WITH_VALUES


def test_a_second_component_holds_servers(tmp_path: Path, known_jobs: Path):
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_HET_SIZE": "2", "SLURM_NTASKS_HET_GROUP_1": "1"}
    arguments = ["train", QUICKSTART, f"run.dir={tmp_path}/run"]
    assert begin(arguments, job).urls == tmp_path / "run" / "servers" / "urls.txt"
    with pytest.raises(UserError, match="top_p"):  # servers do not tell such log-probs
        begin([*arguments, "rollout.top_p=0.9"], job)
    with pytest.raises(UserError, match="2 components, 4 tasks in the second"):
        begin(arguments, {**job, "SLURM_NTASKS_HET_GROUP_1": "4"})


def test_jobs_on_one_node_meet_at_unlike_ports():
    import socket

    port = free_port(4_000_123)
    assert 20_000 <= port < 30_000
    with socket.socket() as busy:
        busy.bind(("", port))
        assert free_port(4_000_123) != port


def test_a_job_file_of_any_recipe():
    recipe = load_recipe(QUICKSTART, ["parallel.dp=4"]).recipe
    resources = Resources(2, 2, 0, 8, "1:00:00", "cpu")
    text = job_file(recipe, Path("recipes/quickstart.yaml"), ["data.system=a b", "parallel.dp=4"], resources)
    assert "#SBATCH --nodes=2 --ntasks-per-node=2 --cpus-per-task=8\n" in text
    assert "#SBATCH --time=1:00:00 --partition=cpu\n" in text
    assert "launch.sh train \"${RECIPE:-recipes/quickstart.yaml}\" 'data.system=a b' parallel.dp=4\n" in text
    with_servers = replace(resources, gpus_per_node=2, partition=None, rollout_node=True).lines()
    assert with_servers[0] == "--nodes=2 --ntasks-per-node=2 --gpus-per-node=2 --cpus-per-task=8"
    assert with_servers[3:] == [
        "hetjob",
        "--nodes=1 --ntasks-per-node=1 --gpus-per-node=2 --cpus-per-task=16",
        "--time=1:00:00",
    ]
