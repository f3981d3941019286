"""Runs that choose their groups: the same choice on any layout, and the same run through a kill."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.checkpoints import complete_checkpoints
from grpo_mega.errors import UserError
from tests import tiny
from tests.matrices import by_hand
from tests.parallel.test_kill_and_resume import arm
from tests.processes import run_ranks

# Of groups of 2 samples, each with a digit below 5 about every second time, many teach nothing.
ROLLOUT = {"group_size": 2, "dynamic_sampling": {"over_sample": 1.5, "max_extra_rounds": 3}}


def recipe_of(run_dir: Path, **blocks: Any) -> dict[str, Any]:
    rollout = ROLLOUT | blocks.pop("rollout", {})
    return tiny.recipe_dict(run_dir, layers=4, rollout=rollout, **blocks)


def steps_of(run_dir: Path) -> list[dict[str, float]]:
    return [line for line in tiny.metrics_of(run_dir) if "rollout/groups_kept" in line]


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    ranks(1).run(tiny.train_on_pool, recipe_of(run_dir))
    return run_dir


def test_a_step_trains_on_groups_that_differ(alone):
    steps = steps_of(alone)
    assert len(steps) == 5
    for line in steps:
        assert line["rollout/groups_kept"] == 8 and line["rollout/groups_missing"] == 0
        assert line["actor/std_advantage"] == pytest.approx(1.0, abs=0.1)  # none of them is 0
    assert sum(line["rollout/groups_dropped"] for line in steps) > 0
    assert any(line["rollout/extra_rounds"] for line in steps)
    spare = [line["rollout/groups_spare"] for line in steps]
    for line, waiting in zip(steps, [0, *spare], strict=False):  # spare groups come from one step before
        assert line["rollout/staleness_max"] == (1 if waiting else 0)
        assert (line["rollout/staleness_mean"] > 0) == bool(waiting)
        assert line["rollout/partial_fraction"] == 0
    assert any(spare[:-1])


@pytest.mark.parametrize(
    "parallel",
    [{"dp": 2}, by_hand({"tp": 2}), by_hand({"tp": 2, "pp": 2})],
    ids=["dp2", "tp2", "tp2-pp2"],
)
def test_the_layout_chooses_nothing(parallel, alone, ranks, tmp_path):
    size = 4 if len(parallel) == 2 else 2
    ranks(size).run(tiny.train_on_pool, recipe_of(tmp_path, parallel=parallel))
    lines, reference = steps_of(tmp_path), steps_of(alone)
    for line, expected in zip(lines, reference, strict=True):
        chosen = {name: value for name, value in line.items() if name.startswith("rollout/groups_")}
        assert chosen == {name: expected[name] for name in chosen}
        assert line == pytest.approx(expected, rel=2e-4, abs=2e-5), f"step {line['step']}"


@pytest.mark.parametrize(
    "place, call",
    [
        by_hand("grpo_mega.rollout.local:LocalEngine.generate", 9),
        ("grpo_mega.engine.policy:apply_update", 5),
        by_hand("grpo_mega.engine.saver:publish", 5),
    ],
    ids=["in a round", "in an update", "in a checkpoint"],
)
def test_killed_and_resumed_it_is_the_same_run(place, call, tmp_path):
    """Bit for bit, with groups that were spare when the checkpoint was written."""
    whole, broken = (
        recipe_of(tmp_path / name, parallel={"dp": 2}, checkpoint={"every": 1, "keep": 9})
        for name in ("whole", "broken")
    )
    assert run_ranks(2, train, whole, None) == [0, 0]
    start = partial(run_ranks, 2, train, broken)
    assert -9 in start((place, call)), "the point was never reached"
    newest = complete_checkpoints(tmp_path / "broken" / "checkpoints")[-1]
    saved = json.loads((newest / "state.json").read_text())["parts"]["groups"]
    assert saved[0]["good"] and sum(len(rank["held"]) for rank in saved) == len(saved[0]["good"])
    assert start(None) == [0, 0]
    assert tiny.metrics_of(tmp_path / "broken") == tiny.metrics_of(tmp_path / "whole")


def train(recipe: dict[str, Any], kill: tuple[str, int] | None) -> None:
    if kill:
        arm(*kill)
    goes_on = bool(complete_checkpoints(Path(recipe["run"]["dir"]) / "checkpoints"))
    tiny.train_on_pool(recipe, resume=goes_on)


def test_a_bound_that_is_hit_is_told_and_trained_with(ranks, tmp_path):
    """One round of 8: less than 8 groups are good, and two updates share what there is."""
    rollout = {"dynamic_sampling": {"over_sample": 1.0, "max_extra_rounds": 0, "spare_steps": 0}}
    recipe = recipe_of(tmp_path, rollout=rollout, parallel={"dp": 2}, train={"updates_per_batch": 2})
    ranks(2).run(tiny.train_on_pool, recipe)
    steps = steps_of(tmp_path)
    assert len(steps) == 5 and any(line["rollout/groups_missing"] for line in steps)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    told = {event["step"] for event in events if event["kind"] == "groups missing"}
    assert told == {line["step"] for line in steps if line["rollout/groups_missing"]}
    for line in steps:
        assert line["rollout/groups_kept"] + line["rollout/groups_missing"] == 8
        assert "actor/loss" in line and line["actor/update_skipped"] == 0


def one(recipe: dict[str, Any]) -> str:
    try:
        tiny.train_on_pool(recipe)
    except UserError as error:
        return str(error)
    return ""


def test_rewards_that_never_differ_end_the_run(ranks, tmp_path):
    never = [{"rule": {"kind": "regex", "pattern": "^"}}]
    recipe = recipe_of(tmp_path, reward=never, parallel={"dp": 2})
    for said in ranks(2).run(one, recipe):
        assert "in none of the groups of 4 rounds do the rewards differ" in said


@pytest.mark.parametrize("truncated", ["mask", by_hand("drop")])
def test_cut_samples_are_left_out_on_any_layout(truncated, ranks, tmp_path):
    """Fewer tokens are trained on than were sampled, the same on one rank and on two."""
    rollout = {"truncated": truncated, "max_new_tokens": 12, "dynamic_sampling": None, "group_size": 4}
    found = []
    for size in (1, 2):
        recipe = recipe_of(tmp_path / str(size), rollout=rollout, parallel={"dp": size})
        ranks(size).run(tiny.train_on_pool, recipe)
        found.append([line for line in tiny.metrics_of(tmp_path / str(size)) if "actor/loss" in line])
    for line, other in zip(*found, strict=True):
        assert line == pytest.approx(other, rel=2e-4, abs=2e-5), f"step {line['step']}"
    assert len(found[0]) == 5
    assert all(0 < line["rollout/truncated_fraction"] < 1 for line in found[0])
