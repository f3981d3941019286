"""Runs whose samples have several turns are the same on every layout, and what was told moves nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests import tiny
from tests.matrices import by_hand

BLOCKS = {"rollout": {"generate": "tests.calculator:interrupt"}}


@pytest.fixture(scope="module")
def single(ranks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("turns")
    recipe = tiny.recipe_dict(folder / "run", **BLOCKS)
    ranks(1).run(tiny.train_on_pool, recipe, dump=folder / "kept")
    return folder


@pytest.mark.parametrize(
    "parallel", [{"dp": 2}, by_hand({"tp": 2}), by_hand({"cp": 2})], ids=["dp2", "tp2", "cp2"]
)
def test_same_numbers_on_every_layout(parallel, single: Path, ranks, tmp_path: Path):
    ranks(2).run(tiny.train_on_pool, tiny.recipe_dict(tmp_path, parallel=parallel, **BLOCKS))
    for line, reference in zip(tiny.metrics_of(tmp_path), tiny.metrics_of(single / "run"), strict=True):
        assert line == pytest.approx(reference, rel=2e-4, abs=2e-5), f"step {line['step']}"


def test_sampler_and_trainer_agree_on_what_was_said(single: Path):
    steps = [line for line in tiny.metrics_of(single / "run") if "actor/loss" in line]
    assert len(steps) == 5
    assert all(line["mismatch/abs_max"] < 1e-4 and line["actor/grad_norm"] > 0 for line in steps)


def train_with_nonsense_where_told(recipe: dict, replay: Path) -> None:
    """Replays with made-up sampler log-probs at every token that was told."""
    from grpo_mega import steps

    weighed = steps.weighed

    def changed(*arguments):
        sequences, reported = weighed(*arguments)
        for place, sequence in enumerate(sequences):
            if sequence.trained is not None:
                logprobs = sequence.sampler_logprobs.copy()
                logprobs[~sequence.trained] = -50.0
                sequences[place] = replace(sequence, sampler_logprobs=logprobs)
        assert any(sequence.trained is not None for sequence in sequences)
        return sequences, reported

    steps.weighed = changed
    try:
        tiny.train_on_pool(recipe, replay=replay)
    finally:
        steps.weighed = weighed


def test_what_was_told_moves_nothing(single: Path, ranks, tmp_path: Path):
    ranks(1).run(train_with_nonsense_where_told, tiny.recipe_dict(tmp_path, **BLOCKS), single / "kept")
    told, plain = (
        [line for line in tiny.metrics_of(folder) if "actor/loss" in line]
        for folder in (tmp_path, single / "run")
    )
    assert told == plain
