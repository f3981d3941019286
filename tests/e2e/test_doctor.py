"""The doctor as a user calls it: on this machine, on a finished run, on a damaged one, and on rubbish."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests import tiny
from tests.commands import run_command, users_environment

ROOT = Path(__file__).parents[2]


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_command(*arguments, environment=users_environment() | {"WANDB_MODE": "offline"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    recipe = folder / "recipe.yaml"
    blocks = {
        "stages": [{"sft": {"steps": 1, "batch_size": 8}}, {"grpo": {"steps": 2}}],
        "rollout": {"prompts_per_step": 2, "group_size": 2},
        "data": {"eval": 8},
        "eval": {"samples": 8},
        "checkpoint": {"every": 1},
    }
    recipe.write_text(yaml.safe_dump(tiny.recipe_dict(folder / "run", **blocks)))
    done = _run("train", recipe, "--quiet")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_finished_run(finished: Path):
    told = _run("doctor", finished)
    assert (told.returncode, told.stderr) == (0, ""), told.stdout + told.stderr
    assert "ok       end: finished" in told.stdout and "last: step 3 of 3" in told.stdout
    assert "step_000003 is whole" in told.stdout and "PROBLEM" not in told.stdout


def test_a_damaged_run_and_the_way_on(finished: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "hf")
    newest = run / "checkpoints" / "step_000003"
    shard = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    told = _run("doctor", run, "--json")
    found = json.loads(told.stdout)
    assert (told.returncode, told.stderr) == (1, "")
    problems = [check["text"] for check in found["checks"] if check["level"] == "PROBLEM"]
    assert problems == [f"step_000003/{shard.name} has other bytes than were written"]
    assert "step_000002" in found["checks"][-1]["text"]
    resumed = _run(*found["command"].split()[1:], "--quiet")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step 2" in resumed.stdout
    assert _run("doctor", run).returncode == 0


def test_an_empty_folder(tmp_path: Path):
    told = _run("doctor", tmp_path)
    assert (told.returncode, told.stderr) == (1, "") and "holds no recipe.yaml" in told.stdout


def test_a_folder_of_rubbish(finished: Path, tmp_path: Path):
    """Every file of a run, by its own name, with bytes that mean nothing."""
    noise = random.Random(0)
    for path in finished.rglob("*"):
        target = tmp_path / path.relative_to(finished)
        if path.is_dir():
            target.mkdir()
        else:
            target.write_bytes(noise.randbytes(noise.choice((0, 1, 300))))
    told = _run("doctor", tmp_path)
    assert (told.returncode, told.stderr) == (1, ""), told.stderr
    assert "cannot be examined" not in told.stdout and "\x1b" not in told.stdout


def test_this_machine():
    told = _run("doctor", "--json")
    found = json.loads(told.stdout)
    assert (told.returncode, found["problems"]) == (0, 0), told.stdout
    by_name = {check["name"]: check for check in found["checks"]}
    assert by_name["processes"]["text"].startswith(("gloo", "nccl"))
    assert by_name["kernels"]["facts"]["logprob_error"] < 1e-4
