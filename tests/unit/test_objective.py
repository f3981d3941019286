"""The policy loss against a loop over sequences and tokens in float64.

# T packed tokens, B sequences
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mega.algo.objective import kl_penalty
from grpo_mega.monitor.metrics import merge, reduce
from tests.objective import Case, clip, gradients

AGGREGATES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
ESTIMATORS = ("k1", "k2", "k3", "abs")
CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # the weights are float32, and losses of either sign cancel


def _token_loss(case: Case, config: dict, t: int, advantage: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy part and the whole of one token's loss."""
    bounds = config["objective"]["clip"]
    difference = case.trainer_T[t] - case.sampler_T[t]
    assert abs(difference) < 9, "the guards are tested by hand"
    ratio = difference.exp()
    if advantage >= 0:
        ratio = ratio if ratio < 1 + bounds["high"] else ratio.new_tensor(1 + bounds["high"])
    else:
        ratio = ratio if ratio > 1 - bounds["low"] else ratio.new_tensor(1 - bounds["low"])
        if bounds["dual"] is not None and ratio > bounds["dual"]:
            ratio = ratio.new_tensor(bounds["dual"])
    policy = -advantage * ratio
    log_quotient = case.trainer_T[t] - case.reference_T[t]  # log of trainer / reference
    kl = {
        "k1": log_quotient,
        "k2": log_quotient**2 / 2,
        "k3": torch.exp(-log_quotient) - 1 + log_quotient,
        "abs": log_quotient.abs(),
    }[config["kl"]["estimator"]]
    return policy, policy + config["kl"]["coef"] * kl - config["entropy_coef"] * case.entropy_T[t]


def _oracle(case: Case, config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy part and the whole of the loss."""
    total = torch.zeros(2, dtype=torch.float64)
    counts = case.counts
    for tokens, advantage in zip(case.sequences, case.advantages_B.tolist(), strict=True):
        for t in tokens:
            divisor = {
                "token-mean": counts.tokens,
                "seq-mean-token-sum": counts.sequences,
                "seq-mean-token-mean": counts.sequences * len(tokens),
                "seq-mean-token-sum-norm": counts.sequences * config["norm_length"],
            }[config["aggregate"]]
            total = total + torch.stack(_token_loss(case, config, t, advantage)) / divisor
    return total[0], total[1]


SHAPES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 6)).filter(lambda shape: sum(shape) > 0),
    min_size=1,
    max_size=5,
)
CASES = st.builds(Case.random, SHAPES, st.integers(0, 4), st.integers(0, 2**31), holes=st.booleans())
CONFIGS = st.fixed_dictionaries(
    {
        "objective": st.builds(
            clip,
            st.sampled_from([0.1, 0.2, 0.4]),
            st.sampled_from([0.1, 0.2, 0.5]),
            st.sampled_from([None, 1.2, 3.0]),
        ),
        "kl": st.fixed_dictionaries(
            {"coef": st.sampled_from([0.0, 0.05, 1.0]), "estimator": st.sampled_from(ESTIMATORS)}
        ),
        "entropy_coef": st.sampled_from([0.0, 0.01]),
        "norm_length": st.integers(1, 9),
    }
)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@settings(deadline=None, max_examples=60)
@given(CASES, CONFIGS)
def test_loss_and_gradient_equal_the_loop(aggregate, case, config):
    config = config | {"aggregate": aggregate}
    case = case.leaves()
    output = case.compute(config)
    policy, loss = _oracle(case, config)
    torch.testing.assert_close(output.loss, loss, **CLOSE)
    metrics = reduce(output.metrics)
    assert metrics["actor/loss"] == pytest.approx(loss.item(), rel=1e-6, abs=1e-6)
    assert metrics["actor/policy_loss"] == pytest.approx(policy.item(), rel=1e-6, abs=1e-6)
    if not loss.requires_grad:
        return  # not one response token
    for ours, expected in zip(gradients(output.loss, case), gradients(loss, case), strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)


@settings(deadline=None, max_examples=60)
@given(CASES, CONFIGS)
def test_metrics_equal_the_loop(case, config):
    config = config | {"kl": config["kl"] | {"coef": 0.1}}
    metrics = reduce(case.compute(config).metrics)
    rows = [
        (t, advantage)
        for tokens, advantage in zip(case.sequences, case.advantages_B.tolist(), strict=True)
        for t in tokens
    ]
    if not rows:  # nothing to speak of, so nothing is said
        assert metrics == {"actor/loss": 0.0, "actor/policy_loss": 0.0}
        return
    logs = [float(case.trainer_T[t] - case.sampler_T[t]) for t, _ in rows]
    ratios = [math.exp(log) for log in logs]
    advantages = [advantage for _, advantage in rows]
    bounds = config["objective"]["clip"]
    pairs = list(zip(ratios, advantages, strict=True))

    def mean(values: list) -> float:
        return float(sum(values)) / len(values)

    expected = {
        "actor/mean_ratio": mean(ratios),
        "actor/ratio_max": max(ratios),
        "actor/ratio_min": min(ratios),
        "actor/log_ratio_abs_mean": mean([abs(log) for log in logs]),
        "actor/log_ratio_abs_max": max(abs(log) for log in logs),
        "actor/log_ratio_clamped_fraction": 0.0,
        "actor/clip_fraction": mean(
            [(a > 0 and r > 1 + bounds["high"]) or (a < 0 and r < 1 - bounds["low"]) for r, a in pairs]
        ),
        "actor/clip_fraction_lower": mean(
            [bounds["dual"] is not None and a < 0 and r > bounds["dual"] for r, a in pairs]
        ),
        "actor/mean_advantage": mean(advantages),
        "actor/mean_log_prob_current": mean([case.trainer_T[t] for t, _ in rows]),
        "actor/mean_log_prob_ref": mean([case.reference_T[t] for t, _ in rows]),
        "actor/entropy": mean([case.entropy_T[t] for t, _ in rows]),
        # the sampler drew the tokens, so its k3 estimate is ratio - 1 - log ratio
        "mismatch/k3_kl": mean([r - 1 - log for r, log in zip(ratios, logs, strict=True)]),
    }
    chosen_T = kl_penalty(case.trainer_T, case.reference_T, config["kl"]["estimator"])[case.mask_T]
    expected["actor/kl_penalty"] = mean(chosen_T.tolist())
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("aggregate", AGGREGATES)
@settings(deadline=None, max_examples=30)
@given(CASES, CONFIGS, st.data())
def test_parts_add_up_to_the_whole(aggregate, case, config, data):
    """However sequences are cut into micro-batches, loss, gradient and metrics are those of the batch."""
    config = config | {"aggregate": aggregate}
    case = case.leaves()
    whole = case.compute(config)
    count = len(case.advantages_B)
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1)))) if count > 1 else []
    bounds = [0, *cuts, count]
    parts = [case.part(first, last).compute(config, case.counts) for first, last in pairwise(bounds)]
    total = torch.stack([part.loss for part in parts]).sum()
    torch.testing.assert_close(total, whole.loss, **CLOSE)
    for ours, expected in zip(gradients(total, case), gradients(whole.loss, case), strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)
    merged = reduce(merge(part.metrics for part in parts))
    assert merged == pytest.approx(reduce(whole.metrics), rel=1e-6, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(CASES, CONFIGS, st.sampled_from(AGGREGATES), st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_masked_tokens_change_nothing(case, config, aggregate, extreme):
    """Prompts and padding carry whatever the model made of them, and none of it may reach a number."""
    config = config | {"aggregate": aggregate}
    plain = case.leaves()
    spoilt = replace(
        case,
        **{
            name: getattr(case, name).where(case.mask_T, extreme)
            for name in ("trainer_T", "sampler_T", "reference_T", "entropy_T")
        },
    ).leaves()
    expected, output = plain.compute(config), spoilt.compute(config)
    assert output.loss.item() == expected.loss.item()
    assert reduce(output.metrics) == reduce(expected.metrics)
    assert torch.equal(output.per_token, expected.per_token)
    for ours, wanted in zip(gradients(output.loss, spoilt), gradients(expected.loss, plain), strict=True):
        assert torch.equal(ours, wanted)
        assert (ours[~case.mask_T] == 0).all()


@settings(deadline=None, max_examples=30)
@given(SHAPES, st.integers(1, 9), st.integers(0, 2**31), CONFIGS, st.sampled_from(AGGREGATES))
def test_padding_changes_nothing(shapes, padding, seed, config, aggregate):
    config = config | {"aggregate": aggregate}
    padded = Case.random(shapes, padding, seed)
    assert len(padded.cu_seqlens) == len(shapes) + 2
    plain = padded.part(0, len(shapes))
    assert padded.compute(config).loss.item() == pytest.approx(
        plain.compute(config).loss.item(), rel=1e-6, abs=1e-6
    )
