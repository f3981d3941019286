"""A replayed run is the run that sampled: bit for bit on its layout, to rounding on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.matrices import by_hand
from tests.parallel.test_adversarial import recipe_of as adversarial_recipe


def sample_on_pool(recipe: dict[str, Any], dump: Path) -> None:
    from grpo_mega.parts import build
    from grpo_mega.recipe.schema import Recipe
    from grpo_mega.rollout_files import RolloutFiles
    from grpo_mega.rollout_only import sample_stages

    files = RolloutFiles(dump=dump, only=True)
    sample_stages(build(Recipe.model_validate(recipe), quiet=True, fresh=True, files=files))


def replay_without_a_sampler(recipe: dict[str, Any], replay: Path) -> None:
    from grpo_mega.parts import Parts

    def refuse(_: Parts) -> None:
        raise AssertionError("a replay made a sampler")

    made, Parts.sampler = Parts.sampler, property(refuse)  # type: ignore[misc]
    try:
        tiny.train_on_pool(recipe, replay=replay)
    finally:
        Parts.sampler = made  # type: ignore[misc]


def steps_of(run_dir: Path) -> list[dict[str, float]]:
    """Steps without evaluations, of which a replay has none."""
    lines = tiny.metrics_of(run_dir)
    return [line for line in lines if not any(name.startswith("eval_") for name in line)]


@pytest.fixture(scope="module")
def live(ranks, tmp_path_factory) -> Path:
    """A folder with a run on two ranks, `run`, and what it kept, `kept`."""
    folder = tmp_path_factory.mktemp("live")
    recipe = tiny.recipe_dict(folder / "run", parallel={"dp": 2})
    ranks(2).run(tiny.train_on_pool, recipe, dump=folder / "kept")
    return folder


def test_every_policy_step_is_kept(live: Path):
    kept = sorted(path.name for path in (live / "kept").iterdir())
    assert kept == [f"stage_1_step_{step:06d}" for step in range(5)]


@pytest.mark.parametrize("size", [by_hand(1), 2], ids=["one rank", "dp2"])
def test_replayed_it_has_the_same_metrics_bit_for_bit(size, live: Path, ranks, tmp_path: Path):
    recorded = live
    if size == 1:
        recorded = tmp_path
        ranks(1).run(tiny.train_on_pool, tiny.recipe_dict(tmp_path / "run"), dump=tmp_path / "kept")
    recipe = tiny.recipe_dict(tmp_path / "again", parallel={"dp": size})
    ranks(size).run(replay_without_a_sampler, recipe, recorded / "kept")
    again = steps_of(tmp_path / "again")
    assert len(again) == 7 and again == steps_of(recorded / "run")
    whole = (recorded / "run" / "hf" / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "hf" / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    "parallel", [by_hand({}), {"tp": 2}, by_hand({"pp": 2, "dp": 2})], ids=["one", "tp2", "dp2-pp2"]
)
def test_replayed_on_another_layout_it_differs_by_rounding(parallel, live: Path, ranks, tmp_path: Path):
    size = 1
    for ways in parallel.values():
        size *= ways
    recipe = tiny.recipe_dict(tmp_path, parallel=parallel)
    ranks(size).run(replay_without_a_sampler, recipe, live / "kept")
    for line, reference in zip(steps_of(tmp_path), steps_of(live / "run"), strict=True):
        assert line == pytest.approx(reference, rel=2e-4, abs=2e-5), f"step {line['step']}"


def test_another_loss_on_the_same_samples(live: Path, ranks, tmp_path: Path):
    """What it is for: two losses compared without the noise of sampling."""
    recipe = tiny.recipe_dict(tmp_path, parallel={"dp": 2}, loss={"innovations": {"ema": {}}})
    ranks(2).run(replay_without_a_sampler, recipe, live / "kept")
    ours, live_steps = steps_of(tmp_path), steps_of(live / "run")
    assert [line.get("reward/mean") for line in ours] == [line.get("reward/mean") for line in live_steps]
    assert ours[-1]["actor/loss"] != live_steps[-1]["actor/loss"]


def test_a_critics_run_is_replayed_with_its_critic(ranks, tmp_path: Path):
    live, again = (adversarial_recipe(tmp_path / name, parallel={"dp": 2}) for name in ("live", "again"))
    ranks(2).run(tiny.train_on_pool, live, dump=tmp_path / "kept")
    ranks(2).run(replay_without_a_sampler, again, tmp_path / "kept")
    assert steps_of(tmp_path / "again") == steps_of(tmp_path / "live")


def test_sampling_alone_brings_the_first_policys_samples(ranks, tmp_path: Path):
    stages = [{"sft": {"steps": 0, "batch_size": 16}}, {"grpo": {"steps": 2}}]
    live, alone = (tiny.recipe_dict(tmp_path / name, stages=stages) for name in ("live", "alone"))
    ranks(1).run(tiny.train_on_pool, live)
    ranks(1).run(sample_on_pool, alone, tmp_path / "kept")
    first, second = tiny.metrics_of(tmp_path / "alone")
    assert {name.split("/")[0] for name in first} == {"step", "reward", "group", "rollout"}
    expected = steps_of(tmp_path / "live")[0]
    assert first == {name: expected[name] for name in first}
    assert second["step"] == 2
    assert not (tmp_path / "alone" / "checkpoints").exists() and not (tmp_path / "alone" / "hf").exists()
    assert len(list((tmp_path / "kept").iterdir())) == 2
