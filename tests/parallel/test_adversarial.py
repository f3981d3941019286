"""Whole runs with a discriminator: the same on any layout, through a kill, and as its options say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.commands import run_command
from tests.matrices import by_hand
from tests.parallel.test_kill_and_resume import arm
from tests.processes import run_ranks

ROOT = Path(__file__).parents[2]


def recipe_of(run_dir: Path, **blocks: object) -> dict[str, Any]:
    stages = [
        {"seqkd": {"steps": 2, "batch_size": 16}},
        {"warmup": {"steps": 2, "samples": 2, "student": "sft"}},
        {"adversarial": {"steps": 4}},
    ]
    given: dict[str, Any] = {
        "stages": stages,
        "reward": [
            {"discriminator": {}, "weight": 0.5},
            {"rule": {"kind": "regex", "pattern": "[0-4]"}, "weight": 0.25},
        ],
        "critic": {"kind": "discriminator", "lr": 1e-3, "grad_clip": 1.0, "audit": {"pairs": 6, "every": 2}},
    }
    return tiny.recipe_dict(run_dir, **{**given, **blocks})


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    ranks(1).run(tiny.train_on_pool, recipe_of(run_dir))
    return run_dir


def test_a_critic_learns_in_its_stages_and_rewards_in_the_last(alone):
    steps = {line["step"]: line for line in tiny.metrics_of(alone) if "eval_reward_mean" not in line}
    assert "critic/d_loss" not in steps[2] and "sft/loss" in steps[2]
    assert {"critic/d_loss", "sft/loss"} <= steps[3].keys() and "actor/loss" not in steps[4]
    for step in range(5, 9):
        line = steps[step]
        expected = 0.5 * line["reward/raw/discriminator"] + 0.25 * line["reward/raw/regex"]
        assert line["reward/mean"] == pytest.approx(expected, rel=1e-6)
        assert line["reward/raw/discriminator"] == pytest.approx(line["critic/student_score_mean"], rel=1e-6)
        assert "actor/loss" in line and "critic/d_loss" in line
    audited = [step for step in steps if "critic_audit/d_acc" in steps[step]]
    assert audited == [3, 4, 6, 8]  # after the critic's first step, then every second
    assert json.loads((alone / "critic_audit.json").read_text())[0]["student_ids"]
    assert not tiny.beyond_overwrite(alone)


@pytest.mark.parametrize(
    "parallel",
    [{"dp": 2}, {"tp": 2}, by_hand({"pp": 2}), by_hand({"tp": 2, "pp": 2})],
    ids=["dp2", "tp2", "pp2", "tp2-pp2"],
)
def test_the_layout_changes_nothing(parallel, alone, ranks, tmp_path):
    size = 4 if len(parallel) == 2 else 2
    ranks(size).run(tiny.train_on_pool, recipe_of(tmp_path / "run", parallel=parallel))
    lines, reference = tiny.metrics_of(tmp_path / "run"), tiny.metrics_of(alone)
    assert [line["step"] for line in lines] == [line["step"] for line in reference]
    for line, expected in zip(lines, reference, strict=True):
        # Adam's first steps are as long for a tiny gradient as for a large one: rounding shows in the scores
        assert line == pytest.approx(expected, rel=5e-3, abs=2e-3), f"step {line['step']}"


def test_the_data_quality_tool_asks_the_critic_of_a_checkpoint(alone, tmp_path):
    """Teachers and students alike: the pairs that are equal have no gap, and lengths are the tokenizer's."""
    (alone / "recipe.yaml").write_text(json.dumps(recipe_of(alone)))
    rows = [
        {
            "content": f"sort: {n} 1 =",
            "teacher_response": f"1 {n}",
            "student_response": f"1 {n}" if n % 2 else "x",
        }
        for n in range(2, 8)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    checkpoint = sorted((alone / "checkpoints").glob("step_*"))[-1]
    done = run_command(data, "--critic", checkpoint, script=ROOT / "tools" / "analyze_data_quality.py")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "quality.json").read_text())["numbers"]
    assert found["critic/pairs"] == 6 and found["critic/identical_pairs"] == 3
    assert found["critic/identical_gap"] == 0.0 and found["critic/score_diff"] != 0.0
    # of the three pairs that differ; an equal pair is no win
    assert found["critic/teacher_wins"] == pytest.approx(2 * found["critic/d_acc"])


def train(recipe: dict[str, Any], kill: tuple[str, int] | None, resume: bool) -> None:
    if kill:
        arm(*kill)
    tiny.train_on_pool(recipe, resume=resume)


@pytest.mark.parametrize("call", [by_hand(2), 5], ids=["in the warm-up", "in the adversarial stage"])
def test_killed_inside_a_stage_it_goes_on_there(call, tmp_path):
    whole, broken = (
        recipe_of(tmp_path / name, parallel={"dp": 2}, checkpoint={"every": 1, "keep": 9})
        for name in ("whole", "broken")
    )
    assert run_ranks(2, train, whole, None, False) == [0, 0]
    assert -9 in run_ranks(2, train, broken, ("grpo_mega.adversary:Adversary.learn", call), False)
    assert run_ranks(2, train, broken, None, True) == [0, 0]
    assert tiny.metrics_of(tmp_path / "broken") == tiny.metrics_of(tmp_path / "whole")


def test_exactly_so_many_first_steps_move_the_critic_only(ranks, tmp_path):
    critic = {"kind": "discriminator", "lr": 1e-3, "critic_warmup_steps": 2, "audit": {"pairs": 0}}
    ranks(1).run(tiny.train_on_pool, recipe_of(tmp_path, critic=critic))
    steps = {line["step"]: line for line in tiny.metrics_of(tmp_path) if "critic/d_loss" in line}
    assert ["actor/loss" in steps[step] for step in range(5, 9)] == [False, False, True, True]


def test_a_stage_ends_when_its_metric_has_been_in_the_band(ranks, tmp_path):
    until = {"metric": "critic/d_loss", "high": 100.0, "steps": 2}
    stages = [{"warmup": {"steps": 50, "until": until}}, {"adversarial": {"steps": 1}}]
    ranks(1).run(tiny.train_on_pool, recipe_of(tmp_path, stages=stages, eval={"every": 0}))
    steps = [line["step"] for line in tiny.metrics_of(tmp_path) if "critic/d_loss" in line]
    assert steps == [1, 2, 3]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert kinds.count("stage over") == 1


def _refused(**blocks: object) -> str:
    return tiny.refusal(recipe_of(Path("run"), **blocks))


def test_recipes_that_cannot_be_are_refused():
    assert "trains a discriminator" in _refused(critic={"kind": "none"})
    assert "has no stage to learn in" in _refused(stages=[{"grpo": {"steps": 1}}], reward=[{"rule": {}}])
    assert "takes its reward from the critic" in _refused(reward=[{"rule": {}}])
