"""PolicyLoss agrees with the slow obvious loops: loss, per-token loss and both gradients.

Any two choices on two axes (innovations, objective, penalty, aggregation, correction) come together on a
batch of 206 tokens in three precisions. The full product of innovations and objectives, 1,848 combinations,
is asked on one of 10 tokens in float64: the loops take minutes for all of it on 206.

# T packed tokens, B sequences
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mega.algo import PolicyLoss
from grpo_mega.algo.reference import ReferenceOutput
from tests.strategies import (
    SURROGATES,
    Answer,
    Batch,
    Config,
    Names,
    config_of,
    every_pair,
    every_policy,
    loss_configs,
    packed_batches,
    random_batch,
)

PAIRS = every_pair()
POLICIES = every_policy()
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}
BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
EVERYTHING: Config = {
    "innovations": {
        "ema": {},
        "gradient_adaptive": {"norm": "logit"},
        "temporal_decay": {},
        "asymmetric": {},
    },
    "kl": {"coef": 0.1},
    "entropy_coef": 0.01,
    "correction": {"kind": "tis"},
}


def _label(names: Names) -> str:
    return "-".join(filter(None, names))


@cache
def _batch(dtype: torch.dtype) -> Batch:
    return random_batch((0, 1, 5, 70, 130), seed=28, advantages="tokens").to(dtype)


def assert_agrees(answer: Answer, expected: ReferenceOutput, tolerance: float, smallest: float = 0.0) -> None:
    """Relative to the largest entry. A loss is a sum of terms of either sign: they are its measure, too."""
    largest = max(smallest, float(expected.per_token_T.abs().max()) if len(expected.per_token_T) else 0.0)
    assert abs(float(answer.loss) - expected.loss) <= tolerance * max(abs(expected.loss), largest)
    for name in ("per_token_T", "grad_trainer_T", "grad_entropy_T"):
        value_T, right_T = getattr(answer, name).double(), getattr(expected, name)
        assert value_T.shape == right_T.shape
        if not len(right_T):
            continue
        error, scale = float((value_T - right_T).abs().max()), max(smallest, float(right_T.abs().max()))
        assert error <= tolerance * scale, f"{name}: off by {error} of {scale}"


@pytest.mark.parametrize("names", PAIRS, ids=_label)
def test_every_two_choices_agree_in_every_precision(names: Names) -> None:
    config = config_of(names)
    expected = _batch(torch.float32).expect(config)  # float64 input of the same values
    for dtype in (torch.float64, torch.float32):
        assert_agrees(_batch(torch.float32).to(dtype).ask(config), expected, TOLERANCES[dtype])
    half = _batch(torch.bfloat16)
    assert_agrees(half.ask(config), half.expect(config), TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_combination_of_innovations_agrees(surrogate: str) -> None:
    batch = random_batch((0, 1, 6, 3), seed=2)
    chosen = [names for names in POLICIES if names[4] == surrogate]
    assert len(chosen) == (56 if surrogate == "gmpo" else 224)
    for names in chosen:
        config = config_of(names)
        assert_agrees(batch.ask(config), batch.expect(config), TOLERANCES[torch.float64])


def test_the_batch_reaches_every_bound() -> None:
    """Else agreement would say little: clips, the dual bound, the guards, the cap of each weight."""
    batch = _batch(torch.float64)
    ratio_T = batch.expect({}).ratio_T
    valid_T = ratio_T > 0
    assert int(valid_T.sum()) == 206
    assert int(batch.mask_T.sum()) > 206  # outside of every sequence the mask does not count
    for sign in (-1, 1):
        signed_T = ratio_T[valid_T & (batch.advantages * sign > 0)]
        for low, high in ((0.0, 0.8), (0.8, 1.2), (1.2, 3.0), (3.0, 1e5)):
            assert ((signed_T > low) & (signed_T < high)).any()
        assert (signed_T == 1e-4).any() and (signed_T == 1e4).any()
    assert set(batch.segments_T[valid_T].tolist()) == {0, 1, 2, 3}
    capped_T = batch.expect({"innovations": {"gradient_adaptive": {"max_weight": 3.0}}}).weight_T
    assert (capped_T == 3.0).any() and (capped_T[valid_T] < 3.0).any()
    difference_T = (batch.proximal_T - batch.sampler_T)[valid_T]
    assert (difference_T > math.log(1.1)).any() and (difference_T < math.log(1.1)).any()


@settings(max_examples=60)
@given(packed_batches(), loss_configs())
def test_any_batch_agrees(batch: Batch, config: Config) -> None:
    assert_agrees(batch.ask(config), batch.expect(config), TOLERANCES[torch.float64])


@settings(max_examples=30)
@given(packed_batches(), loss_configs())
def test_any_batch_agrees_in_float32(batch: Batch, config: Config) -> None:
    """Wider than on the fixed batch: a ptrw weight of e^-77 has the error of its exponent, and where its
    gradient turns around digits cancel."""
    batch = batch.to(torch.float32)
    assert_agrees(batch.ask(config), batch.expect(config), 10 * TOLERANCES[torch.float32], smallest=1e-6)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    "field", ["trainer_T", "sampler_T", "reference_T", "proximal_T", "entropy_T", "sq_prob_T"]
)
def test_a_value_that_is_not_finite_is_named(field: str, value: str) -> None:
    """The 3rd valid token of the 3rd sequence: sample 2, token 2, by counting from 0."""
    batch = random_batch((4, 0, 6), seed=3)
    start, stop = batch.cu_seqlens[2:].tolist()
    place = [t for t in range(start, stop) if batch.mask_T[t]][2]
    broken_T = getattr(batch, field).clone()
    broken_T[place] = BAD[value]
    with pytest.raises(ValueError, match=r"token 2 of sample 2\b"):
        replace(batch, **{field: broken_T}).ask(EVERYTHING)


@settings(max_examples=30)
@given(packed_batches(), loss_configs(), st.sampled_from(list(BAD.values())))
def test_what_is_masked_is_never_read(batch: Batch, config: Config, value: float) -> None:
    inside_T = torch.zeros_like(batch.mask_T)
    inside_T[int(batch.cu_seqlens[0]) : int(batch.cu_seqlens[-1])] = True
    valid_T = batch.mask_T & inside_T
    spoilt = {
        name: getattr(batch, name).where(valid_T, value)
        for name in ("trainer_T", "sampler_T", "reference_T", "proximal_T", "entropy_T", "sq_prob_T")
    }
    if len(batch.advantages) == len(valid_T) != len(batch.cu_seqlens) - 1:
        spoilt["advantages"] = batch.advantages.where(valid_T, value)
    clean, answer = batch.ask(config), replace(batch, **spoilt).ask(config)
    assert torch.equal(answer.loss, clean.loss)
    assert torch.equal(answer.per_token_T, clean.per_token_T)
    for gradient_T, clean_T in (
        (answer.grad_trainer_T, clean.grad_trainer_T),
        (answer.grad_entropy_T, clean.grad_entropy_T),
    ):
        assert torch.equal(gradient_T, clean_T)
        assert not gradient_T[~valid_T].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_long_sequence_is_smoothed_like_a_short_one(dtype: torch.dtype) -> None:
    """20,000 tokens at beta .01. With a clip of .01 to 11 and A = 1 the objective is w'_t itself, and

    d loss / d logp_t = -1/L r_t k_t h_t,   k_0 = 1, k_t = beta;   h_t = 1 + (1 - beta) h_{t+1}
    """
    length, beta = 20_000, 0.01
    generator = torch.Generator().manual_seed(0)
    trainer_T = (-1.0 + 0.5 * torch.randn(length, generator=generator, dtype=torch.float64)).to(dtype)
    sampler_T = (-1.0 + 0.5 * torch.randn(length, generator=generator, dtype=torch.float64)).to(dtype)
    ratio_T = (trainer_T.double() - sampler_T.double()).exp().tolist()
    smooth_T, behind_T = ratio_T[:1], [1.0]
    for ratio in ratio_T[1:]:
        smooth_T.append(beta * ratio + (1 - beta) * smooth_T[-1])
        behind_T.append(1 + (1 - beta) * behind_T[-1])
    behind_T.reverse()
    gradient_T = [-r * beta * h / length for r, h in zip(ratio_T, behind_T, strict=True)]
    gradient_T[0] /= beta

    config = {"innovations": {"ema": {"beta": beta}}, "objective": {"clip": {"low": 0.99, "high": 10.0}}}
    leaf_T = trainer_T.clone().requires_grad_()
    output = PolicyLoss(config)(leaf_T, sampler_T, torch.ones(1, dtype=dtype), torch.tensor([0, length]))
    output.loss.backward()
    assert leaf_T.grad is not None
    tolerance = TOLERANCES[dtype]
    assert float(output.loss.detach()) == pytest.approx(-sum(smooth_T) / length, rel=tolerance)
    for value_T, right_T in ((-output.per_token, smooth_T), (leaf_T.grad, gradient_T)):
        right_T = torch.tensor(right_T, dtype=torch.float64)
        assert (value_T.double() - right_T).abs().max() <= tolerance * right_T.abs().max()
