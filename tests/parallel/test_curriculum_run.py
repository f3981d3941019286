"""A curriculum in real runs: its stages swap the prompts of the next batch, and survive a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from tests import tiny
from tests.matrices import by_hand
from tests.parallel.test_kill_and_resume import arm
from tests.processes import run_ranks


def recipe_of(run_dir: Path) -> dict[str, Any]:
    stages = [
        {"name": "two digits", "options": {"digits": 2}, "threshold": 0.05, "min_steps": 2},
        {"name": "four digits", "options": {"digits": 4}, "threshold": 1.0, "min_steps": 1},
    ]
    return tiny.recipe_dict(
        run_dir,
        parallel={"dp": 2},
        loss={"kl": {"coef": 0.0}},
        curriculum={"kind": "staged", "stages": stages, "min_evaluations": 2, "recent": 1},
        eval={"every": 1, "samples": 16},
        checkpoint={"every": 1, "keep": 9},
    )


def train(recipe: dict[str, Any], kill: tuple[str, int] | None, resume: bool) -> None:
    """Notes the lengths of each step's prompts, then trains."""
    from grpo_mega.rollout.local import LocalEngine

    whole, notes = LocalEngine.generate, Path(recipe["run"]["dir"]).parent / "prompts.jsonl"

    def noted(engine: Any, prompts: Any, group_size: int, *arguments: Any, **options: Any) -> Any:
        if group_size > 1:  # not an evaluation's
            with notes.open("a") as file:
                file.write(json.dumps(sorted({len(prompt.text) for prompt in prompts})) + "\n")
        return whole(engine, prompts, group_size, *arguments, **options)

    cast("Any", LocalEngine).generate = noted
    if kill:
        arm(*kill)
    tiny.train_on_pool(recipe, resume=resume)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("curriculum") / "run"
    assert run_ranks(2, train, recipe_of(run_dir), None, False) == [0, 0]
    return run_dir


def test_the_next_batch_has_the_next_stages_prompts(undisturbed):
    steps = {
        line["step"]: line for line in tiny.metrics_of(undisturbed) if "curriculum/current_stage_idx" in line
    }
    stages = [steps[step]["curriculum/current_stage_idx"] for step in range(3, 8)]
    assert stages == [0, 1, 1, 1, 1]
    assert steps[4]["curriculum/can_advance"] == 1 and steps[5]["curriculum/can_advance"] == 0
    lengths = [json.loads(line) for line in (undisturbed.parent / "prompts.jsonl").read_text().splitlines()]
    # two ranks note each of the five policy steps; "52=" has three characters, "5213=" five
    assert lengths == [[3]] * 4 + [[5]] * 6


def test_each_evaluation_says_why_it_does_not_advance(undisturbed):
    events = [json.loads(line) for line in (undisturbed / "events.jsonl").read_text().splitlines()]
    lines = [event["message"] for event in events if event["kind"] == "curriculum"]
    assert lines[0] == "curriculum: stays in 'two digits': 1 of 2 evaluations, 1 of 2 steps"
    assert lines[1].startswith("curriculum: advances from 'two digits' to 'four digits'")
    assert lines[-1].startswith("curriculum: stays in 'four digits': ") and "< 0.95" in lines[-1]


@pytest.mark.parametrize("step", [by_hand(4), 6])
def test_killed_it_goes_on_in_its_stage(step, undisturbed, tmp_path):
    recipe = recipe_of(tmp_path / "run")
    kill = ("grpo_mega.steps:probe", step - 2)
    assert -9 in run_ranks(2, train, recipe, kill, False)
    assert run_ranks(2, train, recipe, None, True) == [0, 0]
    assert tiny.metrics_of(tmp_path / "run") == tiny.metrics_of(undisturbed)
