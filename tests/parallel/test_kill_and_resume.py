"""A run that is killed, wherever that is, and resumed ends with the very numbers of the undisturbed run."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from grpo_mega.checkpoints import complete_checkpoints, faults
from tests import tiny
from tests.matrices import covering_rows
from tests.processes import die, run_ranks
from tests.wandb_files import logs, rows

EVALUATED = "eval_avg_test_pass_rate"

LAYOUTS = {"tp2": {"tp": 2}, "dp2": {"dp": 2}}
ON_BOTH = {"after backward", "writing shards"}
"""What the layouts do differently; the other points take turns."""

# Where it dies: the function that is about to be called, and the call (from 1) that is its last. Checkpoints
# are due after steps 2 (the end of the warm-up), 4, 6 and 7.
POINTS = {
    "rollout": ("grpo_mega.rollout.local:LocalEngine.generate", 5),
    "reward": ("grpo_mega.reward.assembly:RewardAssembly.score_groups", 6),
    "forward": ("grpo_mega.steps:drift_metrics", 4),
    "after backward": ("grpo_mega.engine.schedule:finalize_model_grads", 5),
    "optimizer": ("grpo_mega.engine.policy:apply_update", 5),
    "probe": ("grpo_mega.steps:probe", 3),
    "weight sync": ("grpo_mega.rollout.local:LocalEngine.load", 6),
    "evaluation": ("grpo_mega.parts:evaluate", 4),
    "writing metrics": ("grpo_mega.monitor.trackers:Trackers.write", 8),
    "writing shards": ("grpo_mega.engine.saver:_Writing.complete", 3),
    "naming the checkpoint": ("grpo_mega.engine.saver:publish", 3),
    "between save and latest": ("grpo_mega.engine.saver:point_to", 4),
    "dropping old ones": ("grpo_mega.engine.saver:prune", 2),
    "first save": ("grpo_mega.engine.saver:publish", 1),
    "reference": ("grpo_mega.engine.saver:save_weights", 1),
}


# At the start, in the middle of a step, and in each part of a checkpoint that can be left half done.
DEFAULT = {
    ("rollout", "tp2"),
    ("after backward", "dp2"),
    ("writing metrics", "tp2"),
    ("writing shards", "tp2"),
    ("between save and latest", "dp2"),
    ("first save", "dp2"),
}


def recipe_of(run_dir: Path, layout: str) -> dict[str, Any]:
    return tiny.recipe_dict(
        run_dir,
        parallel=LAYOUTS[layout],
        checkpoint={"every": 2, "keep": 2, "async": True},
        eval={"every": 2, "samples": 8, "at_start": True},
        tracker=["wandb"],
    )


def train(recipe: dict[str, Any], point: str | None) -> None:
    """As `grpo-mega train --resume`: from the newest checkpoint, or the start while there is none."""
    if point is not None:
        place, last = POINTS[point]
        arm(place, last)
    os.environ["WANDB_MODE"] = "offline"
    goes_on = bool(complete_checkpoints(Path(recipe["run"]["dir"]) / "checkpoints"))
    tiny.train_on_pool(recipe, resume=goes_on)


def arm(place: str, last: int) -> None:
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    whole, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            die()
        return whole(*arguments, **options)

    setattr(owner, name, counted)


def tracked(run_dir: Path) -> list[tuple[int, bool, float | None]]:
    """The W&B record over all the run's offline files: step, whether it is an evaluation, and a number of it.
    The wire steps of each file grow, and no record is there twice."""
    found = []
    for log in logs(run_dir / "wandb_sync"):
        records = [row for row in rows(log) if "stage" in row]
        wire = [row["_wire_step"] for row in records]
        assert wire == sorted(set(wire))
        found += [
            (row["_trainer_step"], EVALUATED in row, row.get(EVALUATED, row.get("actor/grad_norm")))
            for row in records
        ]
    assert len({row[:2] for row in found}) == len(found), "a record is there twice"
    return sorted(found)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[[str], Path]:
    @cache
    def run_of(layout: str) -> Path:
        run_dir = tmp_path_factory.mktemp(layout) / "run"
        assert run_ranks(2, train, recipe_of(run_dir, layout), None) == [0, 0]
        return run_dir

    return run_of


def _cases() -> list[tuple[str, str]]:
    first, second = LAYOUTS
    turns = [(point, second if turn % 2 else first) for turn, point in enumerate(POINTS)]
    return turns + [
        (point, first if layout == second else second) for point, layout in turns if point in ON_BOTH
    ]


@pytest.mark.parametrize(("point", "layout"), covering_rows(_cases(), DEFAULT))
def test_killed_and_resumed_it_is_the_same_run(point, layout, undisturbed, tmp_path):
    whole = undisturbed(layout)
    recipe = recipe_of(tmp_path / "run", layout)
    start = partial(run_ranks, 2, train, recipe)
    assert -9 in start(point), "the point was never reached"
    assert start(None) == [0, 0]
    assert tiny.metrics_of(tmp_path / "run") == tiny.metrics_of(whole)
    assert tracked(tmp_path / "run") == tracked(whole)
    kept = complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in kept] == [path.name for path in complete_checkpoints(whole / "checkpoints")]
    assert [faults(path) for path in kept] == [[]] * len(kept)
