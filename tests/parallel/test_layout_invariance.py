"""A run is the same run on every layout, and bitwise the same run twice."""

from __future__ import annotations

import pytest

from grpo_mega.recipe.blocks import ParallelBlock
from tests import tiny
from tests.matrices import covering

LAYERS = 4  # two chunks of a stage and two stages
LAYOUTS = {
    "dp2": {"dp": 2},
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2-vpp2": {"pp": 2, "vpp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "dp2-pp2": {"dp": 2, "pp": 2},
    "cp2": {"cp": 2},
    "cp2-tp2-sp": {"cp": 2, "tp": 2, "sequence_parallel": True},
}


@pytest.fixture(scope="module")
def single(ranks, tmp_path_factory):
    """The metrics of the run on one rank."""
    run_dir = tmp_path_factory.mktemp("one")
    ranks(1).run(tiny.train_on_pool, tiny.recipe_dict(run_dir, layers=LAYERS))
    return tiny.metrics_of(run_dir)


def test_the_run_has_something_to_compare(single):
    policy_steps = [metrics for metrics in single if "actor/loss" in metrics]
    assert len(policy_steps) == 5
    assert all(metrics["group/zero_std_fraction"] < 1 for metrics in policy_steps)
    assert all(metrics["actor/grad_norm"] > 1e-3 for metrics in policy_steps)
    assert policy_steps[-1]["actor/kl_penalty"] > 0


@pytest.mark.parametrize("layout", covering(LAYOUTS, default={"dp2", "tp2-sp", "pp2-vpp2", "cp2"}))
def test_same_numbers_on_every_layout(layout, single, ranks, tmp_path):
    parallel = LAYOUTS[layout]
    ranks(ParallelBlock(**parallel).world_size).run(
        tiny.train_on_pool, tiny.recipe_dict(tmp_path, layers=LAYERS, parallel=parallel)
    )
    _assert_close(tiny.metrics_of(tmp_path), single)


WEIGHTED = {
    "loss": {
        "kl": {"coef": 0.01},
        "correction": {"kind": "tis"},
        "innovations": {
            "ema": {"beta": 0.7},
            "gradient_adaptive": {"norm": "logit"},
            "temporal_decay": {},
            "asymmetric": {},
        },
    },
    "advantage": {"estimator": "reinforce_plus_plus", "group_baseline": True},
    "train": {
        "updates_per_batch": 2
    },  # the ratios differ from 1, and the correction needs its own forward pass
}
SEQUENCE_LEVEL = {
    "loss": {"innovations": {"gspo": {}}, "aggregate": "seq-mean-token-mean"},
    "train": {"updates_per_batch": 2},
}


@pytest.fixture(scope="module", params=[WEIGHTED, SEQUENCE_LEVEL], ids=["weighted", "sequence level"])
def innovative(request, ranks, tmp_path_factory):
    """Blocks of a recipe with innovations, and its metrics on one rank."""
    run_dir = tmp_path_factory.mktemp("one")
    ranks(1).run(tiny.train_on_pool, tiny.recipe_dict(run_dir, **request.param))
    metrics = tiny.metrics_of(run_dir)
    assert any(line.get("innovation/final_ratio_std", 0.0) > 1e-4 for line in metrics)
    return request.param, metrics


@pytest.mark.parametrize("layout", covering(["dp2", "tp2-sp", "pp2", "cp2"], default={"tp2-sp", "cp2"}))
def test_innovations_see_whole_sequences_on_every_layout(layout, innovative, ranks, tmp_path):
    blocks, expected = innovative
    recipe = tiny.recipe_dict(tmp_path, parallel=LAYOUTS[layout], **blocks)
    ranks(2).run(tiny.train_on_pool, recipe)
    _assert_close(tiny.metrics_of(tmp_path), expected)


@pytest.mark.parametrize("layout", covering(["dp2", "tp2-pp2"], default={"dp2"}))
def test_bitwise_the_same_twice(layout, ranks, tmp_path):
    parallel = LAYOUTS[layout]
    size = ParallelBlock(**parallel).world_size
    runs = []
    for name in ("first", "second"):
        ranks(size).run(tiny.train_on_pool, tiny.recipe_dict(tmp_path / name, parallel=parallel))
        runs.append(tiny.metrics_of(tmp_path / name))
    assert runs[0] == runs[1]


def test_another_seed_is_another_run(single, ranks, tmp_path):
    ranks(1).run(tiny.train_on_pool, tiny.recipe_dict(tmp_path, layers=LAYERS, seed=1))
    first, other = single[1], tiny.metrics_of(tmp_path)[1]
    assert other["sft/loss"] != first["sft/loss"]


def _assert_close(metrics, expected):
    assert [line["step"] for line in metrics] == [line["step"] for line in expected]
    for line, reference in zip(metrics, expected, strict=True):
        assert line == pytest.approx(reference, rel=2e-4, abs=2e-5), f"step {line['step']}"
