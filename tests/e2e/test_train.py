"""Whole runs through the command line, as a user starts, breaks, resumes, measures and exports them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_mega.monitor.jsonl import read_metrics
from tests import tiny
from tests.commands import Command, run_command, users_environment
from tests.matrices import by_hand

ROOT = Path(__file__).parents[2]
LONGEST_SECONDS = 300


def _environment() -> dict[str, str]:
    return users_environment() | {"WANDB_MODE": "offline"}


def _run(*arguments: object, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Forked, or as `prefix` starts it."""
    if not prefix:
        return run_command(*arguments, environment=_environment())
    return subprocess.run(
        [*prefix, *map(str, arguments)],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=LONGEST_SECONDS,
        check=False,
    )


def _recipe_file(folder: Path, **blocks: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny.recipe_dict(folder / "run", **blocks)))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished two-rank run: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    trackers = [f"--tracker={name}" for name in ("wandb", "tensorboard")]
    recipe = _recipe_file(folder, parallel={"dp": 2}, checkpoint={"every": 3})
    done = _run("train", recipe, *trackers)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_a_run_leaves_what_it_promises(finished: tuple[Path, str]):
    folder, printed = finished
    run = folder / "run"
    kept = {path.name for path in run.iterdir()}
    assert kept >= {"recipe.yaml", "metrics.jsonl", "events.jsonl", "checkpoints", "hf", "curves.png"}
    assert kept >= {"wandb_sync", "tensorboard"} and not tiny.beyond_overwrite(run)
    records = read_metrics(run / "metrics.jsonl")
    evaluated = [record.step for record in records if "eval_avg_test_pass_rate" in record.metrics]
    assert evaluated == [0, 2, 5, 7]  # the start, the end of the warm-up, every third step, the end
    assert [record.step for record in records if "perf/step_seconds" in record.metrics] == list(range(1, 8))
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "s left" in printed and "step" in printed  # rate and time left, in a pipe too


def test_the_exported_model_is_the_trained_one(finished: tuple[Path, str], tmp_path: Path):
    folder, _ = finished
    exported = _run("export", folder / "run", tmp_path / "out")
    assert exported.returncode == 0, exported.stderr
    trained, start = (
        AutoModelForCausalLM.from_pretrained(folder / "run" / name).state_dict() for name in ("hf", "init")
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in trained.items())
    assert not torch.equal(trained["lm_head.weight"], start["lm_head.weight"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("52=25")) == "52=25"


def test_eval_repeats_the_last_evaluation(finished: tuple[Path, str]):
    folder, _ = finished
    last = read_metrics(folder / "run" / "metrics.jsonl")[-1].metrics["eval_avg_test_pass_rate"]
    shown = _run("eval", folder / "run", "parallel.dp=1")  # and on another layout
    assert f"eval_avg_test_pass_rate {last:.6g}" in shown.stdout.splitlines()


def test_torchrun_is_a_way_to_start_it(finished: tuple[Path, str], tmp_path: Path):
    recipe = _recipe_file(tmp_path, parallel={"dp": 2}, checkpoint={"every": 3})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "grpo_mega"]
    done = _run("train", recipe, "--quiet", prefix=launcher)
    assert done.returncode == 0, done.stderr
    assert tiny.metrics_of(tmp_path / "run") == tiny.metrics_of(finished[0] / "run")


def test_interrupted_nothing_is_left_and_resume_goes_on(finished: tuple[Path, str], tmp_path: Path):
    """Ctrl-C after the first checkpoint; resumed, the run ends with the numbers of the undisturbed one."""
    recipe = _recipe_file(tmp_path, parallel={"dp": 2}, checkpoint={"every": 3})
    process = Command("train", recipe, environment=_environment())
    family = psutil.Process(process.pid)
    latest = tmp_path / "run" / "checkpoints" / "latest"
    deadline = time.monotonic() + LONGEST_SECONDS
    while not latest.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    members = [family, *family.children(recursive=True)]
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(members, timeout=30)
    assert not alive
    resumed = _run("train", recipe, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step" in resumed.stdout
    assert tiny.metrics_of(tmp_path / "run") == tiny.metrics_of(finished[0] / "run")


def test_a_killed_run_leaves_no_helper_behind(tmp_path: Path):
    """SIGKILL after a checkpoint, whose writer has a process of its own."""
    process = Command("train", _recipe_file(tmp_path, checkpoint={"every": 1}), environment=_environment())
    latest = tmp_path / "run" / "checkpoints" / "latest"
    deadline = time.monotonic() + LONGEST_SECONDS
    while not latest.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    helpers = psutil.Process(process.pid).children(recursive=True)
    assert helpers
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(helpers, timeout=30)
    assert not alive


USER_MISTAKES = {
    "a typo": (["rollout.group_sise=4"], "group_size"),
    "an innovation that is not there": (["loss.innovations.emma={}"], "emma"),
    "heads over tp": (["parallel.tp=3", "parallel.dp=1"], "parallel.tp"),
    "missing model": (["model.hf=/nowhere/model"], "/nowhere/model"),
    "missing file": (
        ["data.source=jsonl", "data.train=/nowhere/train.jsonl", "data.eval=null"],
        "/nowhere/train.jsonl",
    ),
    "several-token stop": (["rollout.stop=[abc]"], "rollout.stop"),
}


@pytest.mark.parametrize(
    ("mistake", "ranks"),
    [
        *((mistake, 1) for mistake in USER_MISTAKES),
        ("missing file", 2),
        *(by_hand(mistake, 2) for mistake in USER_MISTAKES if mistake != "missing file"),
    ],
)
def test_a_users_mistake_is_one_clear_message(mistake: str, ranks: int, tmp_path: Path):
    overrides, named = USER_MISTAKES[mistake]
    recipe = _recipe_file(tmp_path)
    done = _run("train", recipe, f"parallel.dp={ranks}", *overrides)
    _assert_one_message(done, named)


@pytest.mark.parametrize("ranks", [1, by_hand(2)])
def test_a_bad_line_of_data_is_named(ranks: int, tmp_path: Path):
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer":\n')
    recipe = _recipe_file(
        tmp_path, parallel={"dp": ranks}, stages=[{"grpo": {"steps": 1}}],
        data={"source": "jsonl", "task": None, "train": str(data), "eval": None},
    )  # fmt: skip
    _assert_one_message(_run("train", recipe), f"{data}:2")


def _assert_one_message(done: subprocess.CompletedProcess[str], named: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1, done.stderr
    assert named in done.stderr
    assert "remedy:" in done.stderr


def test_hf_conversion_tool_goes_there_and_back(finished: tuple[Path, str], tmp_path: Path):
    source = finished[0] / "run" / "hf"
    there, back = tmp_path / "megatron", tmp_path / "hf"
    tool = ROOT / "tools" / "convert_hf.py"
    first = run_command("to-megatron", source, there, "--dtype", "float32", script=tool)
    assert first.returncode == 0, first.stderr
    second = run_command("to-hf", there, source, back, "--dtype", "float32", script=tool)
    assert second.returncode == 0, second.stderr
    original, returned = (AutoModelForCausalLM.from_pretrained(d).state_dict() for d in (source, back))
    assert all(torch.equal(returned[name], weight) for name, weight in original.items())
