"""Options that trade memory or precision: the first leave every number as it is, the second stays close."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.matrices import by_hand


def _policy_steps(ranks, run_dir, size=1, **blocks):
    ranks(size).run(tiny.train_on_pool, tiny.recipe_dict(run_dir, **blocks))
    return [line for line in tiny.metrics_of(run_dir) if "actor/loss" in line]


@pytest.fixture(scope="module")
def plain(ranks, tmp_path_factory):
    return _policy_steps(ranks, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "blocks",
    [
        {"model": {"recompute": "full"}},
        by_hand({"model": {"recompute": "selective"}}),
        {"loss": {"kl": {"coef": 0.01, "reference_on": "host"}}},
    ],
    ids=["recompute-full", "recompute-selective", "reference-on-host"],
)
def test_saving_memory_changes_no_number(blocks, plain, ranks, tmp_path):
    assert _policy_steps(ranks, tmp_path, **blocks) == plain


def test_bfloat16_follows_float32(plain, ranks, tmp_path):
    """Same prompts and random numbers; bfloat16 keeps 8 bits, so the first step agrees to about a percent."""
    half = _policy_steps(ranks, tmp_path, model={"dtype": "bfloat16"})
    assert half[0]["actor/entropy"] == pytest.approx(plain[0]["actor/entropy"], rel=0.02)
    assert half[0]["actor/mean_ratio"] == pytest.approx(1.0, abs=0.02)
    assert half[-1]["actor/update_skipped"] == 0


@pytest.mark.parametrize(
    "parallel", [{"tp": 2, "sequence_parallel": True}, by_hand({"pp": 2})], ids=["tp2-sp", "pp2"]
)
def test_bfloat16_trains_on_other_layouts(parallel, ranks, tmp_path):
    one = _policy_steps(ranks, tmp_path / "one", model={"dtype": "bfloat16"})
    two = _policy_steps(ranks, tmp_path / "two", 2, model={"dtype": "bfloat16"}, parallel=parallel)
    assert two[0]["actor/entropy"] == pytest.approx(one[0]["actor/entropy"], rel=0.02)
    assert two[0]["actor/mean_ratio"] == pytest.approx(1.0, abs=0.02)


def test_several_updates_on_one_batch(ranks, tmp_path):
    """Off-policy from the second update on: the ratio leaves 1; and two ranks agree with one."""
    blocks = {"train": {"updates_per_batch": 4, "lr": 3e-3}}
    one = _policy_steps(ranks, tmp_path / "one", **blocks)
    two = _policy_steps(ranks, tmp_path / "two", 2, parallel={"dp": 2}, **blocks)
    assert one[1]["actor/log_ratio_abs_max"] > 1e-2
    assert two[0] == pytest.approx(one[0], rel=1e-3, abs=1e-4)
