"""The Triton kernels of the policy loss against what torch composes: loss, per-token loss, gradients and
every metric.

Without a GPU they run in Triton's interpreter, whose scans take 60 us for each token: batches are small, and
so are the kernels' blocks, so that sequences still have several.

# T packed tokens, B sequences
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from grpo_mega.algo import PolicyLoss, objective
from grpo_mega.algo.aggregate import Denominators
from grpo_mega.algo.innovations.ema import Ema
from grpo_mega.algo.objectives import ClipObjective
from grpo_mega.kernels import weighting, weighting_options
from grpo_mega.kernels.implementation import interpreting
from grpo_mega.kernels.weighting import WeightingInputs, WeightingOptions, supports, weighted_loss
from grpo_mega.recipe.blocks import LossBlock
from tests.matrices import by_hand, covering
from tests.strategies import (
    Batch,
    Config,
    config_of,
    every_pair,
    loss_configs,
    packed_batches,
    random_batch,
    with_every_choice,
)
from tests.weighting import COMBINATIONS, assert_agrees, assert_same_loss, composed, fused, on

pytest.importorskip("triton")

DEVICE = "cpu" if interpreting() else "cuda"
TOLERANCE = 1e-5
LENGTHS = (0, 1, 3, 40, 70)
PAIRS = every_pair()
CHOICES = with_every_choice(PAIRS[::3])


def _label(names: tuple[str, ...]) -> str:
    return "-".join(filter(None, names))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEQUENCE_BLOCK", "TOKEN_BLOCK"):
        monkeypatch.setattr(weighting, name, 32)


@cache
def _batch(advantages: str = "tokens", dtype: torch.dtype = torch.float32) -> Batch:
    """Its log-ratios reach +-50, and every clip, cap and bound: see test_policy_loss_oracle.py."""
    return on(random_batch(LENGTHS, seed=28, advantages=advantages).to(dtype), DEVICE)


@pytest.mark.parametrize("names", covering(PAIRS, CHOICES), ids=_label)
def test_every_two_choices_agree(names: tuple[str, ...]) -> None:
    config = config_of(names)
    assert_agrees(_batch("tokens"), config, TOLERANCE)


@pytest.mark.parametrize("names", covering(PAIRS[::3], CHOICES[:3]), ids=_label)
def test_half_precision_is_read_as_it_is(names: tuple[str, ...]) -> None:
    assert_agrees(_batch("sequences", torch.bfloat16), config_of(names), TOLERANCE)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations_agree(name: str) -> None:
    assert_agrees(_batch("sequences"), COMBINATIONS[name], TOLERANCE)


@settings(max_examples=10)
@given(packed_batches(), loss_configs())
def test_any_batch_agrees(batch: Batch, config: Config) -> None:
    """Sums of pulls of either sign, such as those of a differentiated trust, leave fewer digits."""
    batch = on(batch.to(torch.float32), DEVICE)
    assert_same_loss(fused(batch, config)[0], composed(batch, config)[0], TOLERANCE, gradients=1e-4)


def test_a_clip_by_hand() -> None:
    """Ratios 1.5, .5 at A = 1: the first is clipped to 1.2, the second keeps its gradient, -A s / 2
    tokens."""
    trainer_T = torch.tensor([1.5, 0.5], device=DEVICE).log().requires_grad_()
    result = weighted_loss(
        WeightingInputs(
            trainer_T=trainer_T,
            entropy_T=None,
            sampler_T=torch.zeros(2, device=DEVICE),
            advantages=torch.ones(1, device=DEVICE),
            cu_seqlens=torch.tensor([0, 2], device=DEVICE),
            valid_T=None,
        ),
        WeightingOptions.of(LossBlock(), None),
        tokens=2.0,
        sequences=1.0,
    )
    (3.0 * result.loss).backward()
    assert trainer_T.grad is not None
    assert result.loss.item() == pytest.approx(-(1.2 + 0.5) / 2)
    assert result.per_token_T.tolist() == pytest.approx([-1.2, -0.5])
    assert trainer_T.grad.tolist() == pytest.approx([0.0, -3.0 * 0.5 / 2])


def test_the_mean_of_a_smoothed_ratio_by_hand() -> None:
    """Ratios 1, 2, 2 at beta .5 -> 1, 1.5, 1.75, mean 17/12. With A = 1 and a clip it does not reach the loss
    is -17/12, and d loss / d log w_t = -w_t k_t h_t / 3 with h = 1.75, 1.5, 1 and k = 1, .5, .5."""
    config = {"innovations": {"ema": {"beta": 0.5}, "amic": {}}, "objective": {"clip": {"high": 10.0}}}
    trainer_T = torch.tensor([1.0, 2.0, 2.0], device=DEVICE).log().requires_grad_()
    result = weighted_loss(
        WeightingInputs(
            trainer_T=trainer_T,
            entropy_T=None,
            sampler_T=torch.zeros(3, device=DEVICE),
            advantages=torch.ones(1, device=DEVICE),
            cu_seqlens=torch.tensor([0, 3], device=DEVICE),
            valid_T=None,
        ),
        WeightingOptions.of(LossBlock.model_validate(config), None),
        tokens=3.0,
        sequences=1.0,
    )
    result.loss.backward()
    assert trainer_T.grad is not None
    assert result.loss.item() == pytest.approx(-17 / 12)
    assert trainer_T.grad.tolist() == pytest.approx([-1.75 / 3, -2 * 0.5 * 1.5 / 3, -2 * 0.5 / 3])


@pytest.mark.parametrize("level", ["ema", "amic", "gspo"])
def test_long_sequences_agree_at_the_blocks_of_a_gpu(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert weighting.SEQUENCE_BLOCK > 32
    batch = on(random_batch((1300, 2), seed=5, noise=0.1, outliers=0.0).to(torch.float32), DEVICE)
    assert_agrees(batch, {"innovations": {level: {}, "temporal_decay": {}}}, TOLERANCE)


@pytest.mark.parametrize("lengths", [(), (0, 0), (0, 2), (2, 0)])
@pytest.mark.parametrize("name", ["all", "gmpo, weights inside"])
def test_sequences_without_tokens(lengths: tuple[int, ...], name: str) -> None:
    for prompts in (False, True):
        batch = random_batch(lengths, seed=1, prompts=prompts, outside=1).to(torch.float32)
        answer, metrics = fused(on(batch, DEVICE), COMBINATIONS[name])
        expected, right = composed(on(batch, DEVICE), COMBINATIONS[name])
        assert_same_loss(answer, expected, TOLERANCE)
        assert metrics.keys() == right.keys()


def test_no_tokens_at_all() -> None:
    batch = on(random_batch((0, 0), prompts=False, outside=0).to(torch.float32), DEVICE)
    answer, _ = fused(batch, {})
    assert answer.loss == 0.0 and answer.per_token_T.shape == (0,)


def test_padding_that_is_a_sequence_of_its_own_has_no_advantage() -> None:
    batch = _batch("sequences")
    last = len(batch.advantages)
    padding_T = torch.arange(len(batch.mask_T), device=DEVICE) >= batch.cu_seqlens[last - 1]
    padded = replace(batch, mask_T=batch.mask_T & ~padding_T, advantages=batch.advantages[: last - 1])
    assert_agrees(padded, COMBINATIONS["gmpo, weights inside"], TOLERANCE)


@pytest.mark.parametrize("name", ["all", by_hand("aggressive"), "gmpo, weights inside", by_hand("a floor")])
def test_what_is_masked_is_never_read(name: str) -> None:
    config = {**COMBINATIONS[name], "kl": {"coef": 0.1}, "entropy_coef": 0.1}
    batch = _batch()
    place_T = torch.arange(len(batch.mask_T), device=DEVICE)
    inside_T = (place_T >= batch.cu_seqlens[0]) & (place_T < batch.cu_seqlens[-1])
    valid_T = batch.mask_T & inside_T
    names = ("trainer_T", "sampler_T", "reference_T", "proximal_T", "entropy_T", "sq_prob_T", "advantages")
    spoilt = replace(batch, **{name: getattr(batch, name).where(valid_T, math.nan) for name in names})
    (clean, metrics), (answer, found) = fused(batch, config), fused(spoilt, config)
    assert found == metrics
    for part in ("loss", "per_token_T", "grad_trainer_T", "grad_entropy_T"):
        assert torch.equal(getattr(answer, part), getattr(clean, part))
    assert not answer.grad_trainer_T[~valid_T].any() and not answer.grad_entropy_T[~valid_T].any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("value", [math.nan, by_hand(math.inf), -math.inf])
@pytest.mark.parametrize(
    "field", ["trainer_T", "sampler_T", "reference_T", "entropy_T", "sq_prob_T", "advantages"]
)
def test_a_value_that_is_not_finite(field: str, value: float) -> None:
    """The 3rd valid token of the 4th sequence is named, or makes the loss nan."""
    config = {"innovations": {"gradient_adaptive": {"norm": "logit"}}, "kl": {"coef": 0.1}}
    batch = _batch()
    start, stop = batch.cu_seqlens[3:5].tolist()
    place = [t for t in range(start, stop) if batch.mask_T[t]][2]
    broken_T = getattr(batch, field).clone()
    broken_T[place] = value
    broken = replace(batch, **{field: broken_T})
    with pytest.raises(ValueError, match=rf"{field[:7]}.*token 2 of sample 3\b"):
        fused(broken, config)
    assert fused(broken, config, reject=False)[0].loss.isnan()


@pytest.mark.parametrize("aggregate", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_denominators_are_those_of_the_update(aggregate: str) -> None:
    counts = Denominators(tokens=1000.0, sequences=17.0)
    config = {"aggregate": aggregate, "innovations": {"ema": {}}}
    answer, _ = fused(_batch(), config, denominators=counts)
    assert_same_loss(answer, composed(_batch(), config, counts)[0], TOLERANCE)


def test_any_integers_and_no_mask_will_do() -> None:
    batch = on(random_batch((5, 40), seed=3, prompts=False, outside=0).to(torch.float32), DEVICE)
    expected, _ = fused(batch, COMBINATIONS["all"])
    for cu_seqlens in (batch.cu_seqlens.long(), batch.cu_seqlens.int()):
        for mask_T in (batch.mask_T.int(), None):
            answer, _ = fused(replace(batch, cu_seqlens=cu_seqlens, mask_T=mask_T), COMBINATIONS["all"])
            assert torch.equal(answer.grad_trainer_T, expected.grad_trainer_T)


def test_what_sca_and_the_logit_norm_need_is_asked_for() -> None:
    for config, field, message in (
        ({"innovations": {"sca": {}}}, "segments_T", "segments_T"),
        ({"innovations": {"gradient_adaptive": {"norm": "logit"}}}, "sq_prob_T", "sq_prob_T"),
    ):
        with pytest.raises(ValueError, match=message):
            fused(replace(_batch(), **{field: None}), config)


def _block(innovations: dict[str, Any], surrogate: Any = None) -> Any:
    picked = SimpleNamespace(picked=lambda: innovations)
    return SimpleNamespace(innovations=picked, surrogate=surrogate or ClipObjective())


def test_what_the_kernels_do_not_know_is_named() -> None:
    class Mine(Ema):
        """Computes something else."""

    class MyClip(ClipObjective):
        """Likewise."""

    for config in COMBINATIONS.values():
        assert supports(LossBlock.model_validate(config)) is None
    assert supports(_block({"ema": Ema()})) is None
    assert supports(_block({"ema": Ema(), "mine": Mine()})) == "loss.innovations.mine"
    assert supports(_block({}, MyClip())) == "loss.objective"


def test_the_guards_are_those_of_the_composed_loss() -> None:
    for name in ("LOG_RATIO_BOUND", "RATIO_BOUNDS", "CLAMPED_BEYOND"):
        assert getattr(weighting_options, name) == getattr(objective, name)


def test_no_gradient_is_asked_for_without_a_leaf() -> None:
    batch = _batch()
    loss = PolicyLoss({})
    with torch.no_grad():
        inputs = WeightingInputs(
            batch.trainer_T, None, batch.sampler_T, batch.advantages, batch.cu_seqlens, None
        )
        result = weighted_loss(inputs, WeightingOptions.of(loss.config, None), tokens=1.0, sequences=1.0)
    assert not result.loss.requires_grad
