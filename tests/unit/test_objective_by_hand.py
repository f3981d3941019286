"""The policy loss by hand: one to four tokens for every rule.

# T packed tokens, B sequences
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from grpo_mega.algo.aggregate import Denominators
from grpo_mega.algo.objective import PolicyLoss, kl_penalty
from grpo_mega.monitor.metrics import reduce
from tests.objective import Case, clip, gradients


def _tokens(ratios: list[float], advantages: list[float], lengths: list[int] | None = None, **config):
    """Loss, gradient with respect to the trainer's log-probs, and metrics; one sequence unless `lengths` says
    more."""
    trainer_T = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
    boundaries = torch.tensor([0, *(lengths or [len(ratios)])]).cumsum(0).to(torch.int32)
    advantages_ = torch.tensor(advantages, dtype=torch.float64)
    output = PolicyLoss(config)(trainer_T, torch.zeros_like(trainer_T), advantages_, boundaries)
    (gradient_T,) = torch.autograd.grad(output.loss, trainer_T)
    return output.loss.item(), gradient_T.tolist(), reduce(output.metrics)


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "loss", "gradient"),
    [
        (1.5, 1.0, 3.0, -1.2, 0.0),  # -min(1.5, 1.2)
        (1.1, 1.0, 3.0, -1.1, -1.1),  # inside; d ratio / d log-prob = ratio
        (0.5, 1.0, 3.0, -0.5, -0.5),  # too low for a good token: the way back stays open
        (0.5, -1.0, 3.0, 0.8, 0.0),  # -min(-.5, -.8)
        (1.5, -1.0, 3.0, 1.5, 1.5),  # too high for a bad token: the way back stays open
        (5.0, -1.0, 3.0, 3.0, 0.0),  # -max(-5, -3)
        (5.0, -1.0, None, 5.0, 5.0),  # no dual bound
        (5.0, -2.0, 3.0, 6.0, 0.0),  # the bound scales with the advantage: -max(-10, -6)
        (5.0, 1.0, 3.0, -1.2, 0.0),  # and concerns bad tokens only
        (1.5, 0.0, 3.0, 0.0, 0.0),
    ],
)
def test_one_token(ratio, advantage, dual, loss, gradient):
    found, (slope,), _ = _tokens([ratio], [advantage], objective=clip(dual=dual))
    assert (found, slope) == (pytest.approx(loss), pytest.approx(gradient))


def test_low_and_high_are_two_numbers():
    # .1 below, .28 above. A = 1: 1.2 passes, 1.28 is the end; A = -1: .95 passes, .9 is the end
    options = {"objective": clip(0.1, 0.28)}
    assert _tokens([1.2], [1.0], **options)[0] == pytest.approx(-1.2)
    assert _tokens([1.4], [1.0], **options)[0] == pytest.approx(-1.28)
    assert _tokens([0.95], [-1.0], **options)[0] == pytest.approx(0.95)
    assert _tokens([0.7], [-1.0], **options)[0] == pytest.approx(0.9)


def test_defaults_are_the_ppo_clip_with_a_dual_bound():
    assert _tokens([1.5], [1.0])[0] == pytest.approx(-1.2)
    assert _tokens([5.0], [-1.0])[0] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("aggregate", "loss"),
    [
        # response lengths 1 and 3, A = 1 and 2, ratio 1: token losses -1 | -2 -2 -2
        ("token-mean", -7 / 4),
        ("seq-mean-token-sum", (-1 - 6) / 2),
        ("seq-mean-token-mean", (-1 - 2) / 2),
        ("seq-mean-token-sum-norm", (-1 - 6) / (2 * 8)),
    ],
)
def test_aggregates(aggregate, loss):
    found, _, _ = _tokens([1.0] * 4, [1.0, 2.0], [1, 3], aggregate=aggregate, norm_length=8)
    assert found == pytest.approx(loss)


def test_norm_length_has_a_default_and_must_come_from_somewhere():
    config = {"aggregate": "seq-mean-token-sum-norm"}
    with pytest.raises(ValueError, match="norm_length"):
        PolicyLoss(config)
    one = torch.ones(1)
    cu_seqlens = torch.tensor([0, 1], dtype=torch.int32)

    def loss(policy_loss: PolicyLoss) -> float:
        return policy_loss(one, one, one, cu_seqlens).loss.item()

    assert loss(PolicyLoss(config, default_norm_length=4)) == -0.25  # -1 / (1 sequence * 4)
    assert loss(PolicyLoss(config | {"norm_length": 2}, default_norm_length=4)) == -0.5


def test_the_log_ratio_is_guarded_and_counted():
    # exp(12) -> exp(10) = 22,026 -> 1e4; exp(-12) -> exp(-10) = 4.5e-5 -> 1e-4; exp(9.5) is beyond 1e4 too
    ratios = [math.exp(12.0), math.exp(-12.0), 1.0, math.exp(9.5)]
    loss, gradient, metrics = _tokens(ratios, [-1.0] * 4, [1] * 4, objective=clip(dual=None))
    assert metrics["actor/log_ratio_clamped_fraction"] == 0.75  # all but the ratio of 1
    assert metrics["actor/log_ratio_abs_max"] == pytest.approx(12.0)  # as it was before the guard
    assert metrics["actor/ratio_max"] == pytest.approx(1e4)
    assert metrics["actor/ratio_min"] == pytest.approx(1e-4)
    # A = -1: 1e4 + max(1e-4, .8) + 1 + 1e4 (exp(9.5) = 13,360 is over the bound too), over four tokens
    assert loss == pytest.approx((1e4 + 0.8 + 1.0 + 1e4) / 4)
    assert gradient == pytest.approx([0.0, 0.0, 0.25, 0.0])  # what is clamped pulls no more


def test_an_infinite_gap_stays_finite():
    """Weights broken by one bad update give log-probs like these; the guard must see a number."""
    trainer_T = torch.tensor([-1e5, -1.0], requires_grad=True)
    sampler_T = torch.tensor([-1.0, -1e5])
    cu_seqlens = torch.tensor([0, 2], dtype=torch.int32)
    config = {"kl": {"coef": 1.0, "estimator": "k3"}}
    output = PolicyLoss(config)(
        trainer_T,
        sampler_T,
        torch.tensor([-1.0]),
        cu_seqlens,
        reference_logprobs_T=torch.tensor([-1.0, -1e5]),
    )
    output.loss.backward()
    assert trainer_T.grad is not None and trainer_T.grad.isfinite().all()
    metrics = reduce(output.metrics)
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert metrics["actor/log_ratio_clamped_fraction"] == 1.0


def test_the_mismatch_is_never_negative():
    """k3 is a divergence: at any log ratio it is at least 0."""
    trainer_T, sampler_T = torch.tensor([-1.0]), torch.tensor([-1e5])
    output = PolicyLoss({})(trainer_T, sampler_T, torch.ones(1), torch.tensor([0, 1], dtype=torch.int32))
    assert reduce(output.metrics)["mismatch/k3_kl"] >= 0.0


def test_a_sampler_that_agrees_with_the_trainer():
    case = Case.random([(2, 3), (1, 1), (0, 4)], 3, seed=0)
    case = replace(case, trainer_T=case.sampler_T).leaves()
    output = case.compute({})
    metrics = reduce(output.metrics)
    assert metrics["actor/mean_ratio"] == metrics["actor/ratio_min"] == metrics["actor/ratio_max"] == 1.0
    for name in (
        "actor/clip_fraction",
        "actor/clip_fraction_lower",
        "actor/log_ratio_abs_max",
        "actor/log_ratio_clamped_fraction",
        "mismatch/k3_kl",
    ):
        assert metrics[name] == 0.0, name
    # the loss is minus the mean advantage, and its gradient that of REINFORCE: -A / tokens
    a, b, c = case.advantages_B.tolist()
    assert output.loss.item() == pytest.approx(-(3 * a + b + 4 * c) / 8)
    gradient_T, _ = gradients(output.loss, case)
    expected = torch.tensor([-a] * 3 + [-b] + [-c] * 4, dtype=torch.float64) / 8
    torch.testing.assert_close(gradient_T[case.mask_T], expected)


@pytest.mark.parametrize(
    ("estimator", "closer", "farther"),
    [
        # trainer .5; d = reference - trainer = ln(.25/.5) = -.6931472, or ln(1/.5) = +.6931472
        ("k1", 0.6931472, -0.6931472),  # -d
        ("k2", 0.2402265, 0.2402265),  # d^2 / 2
        ("k3", 0.1931472, 0.3068528),  # e^d - 1 - d = .5 - 1 + .6931472, 2 - 1 - .6931472
        ("abs", 0.6931472, 0.6931472),
    ],
)
def test_kl_estimators(estimator, closer, farther):
    trainer_T = torch.full((2,), 0.5, dtype=torch.float64).log()
    reference_T = torch.tensor([0.25, 1.0], dtype=torch.float64).log()
    assert kl_penalty(trainer_T, reference_T, estimator).tolist() == pytest.approx([closer, farther])


@pytest.mark.parametrize(
    ("estimator", "far_below", "far_above"),
    # d = -50 and 50 count as -10 and 10
    [("k1", 10, -10), ("k2", 50, 50), ("k3", math.exp(-10) + 9, math.exp(10) - 11), ("abs", 10, 10)],
)
def test_kl_estimators_are_clamped(estimator, far_below, far_above):
    reference_T = torch.tensor([-50.0, 50.0], dtype=torch.float64)
    found = kl_penalty(torch.zeros(2, dtype=torch.float64), reference_T, estimator)
    assert found.tolist() == pytest.approx([far_below, far_above])


def test_kl_and_entropy_enter_with_their_signs():
    # ratio 1, A = 1: -1. KL k1 = ln 2, coefficient .5: + .3465736. Entropy 2, coefficient .1: - .2
    trainer_T = torch.tensor([math.log(0.5)], dtype=torch.float64)
    output = PolicyLoss({"kl": {"coef": 0.5, "estimator": "k1"}, "entropy_coef": 0.1})(
        trainer_T,
        trainer_T,
        torch.ones(1, dtype=torch.float64),
        torch.tensor([0, 1], dtype=torch.int32),
        reference_logprobs_T=torch.tensor([math.log(0.25)], dtype=torch.float64),
        entropy_T=torch.tensor([2.0], dtype=torch.float64),
    )
    assert output.loss.item() == pytest.approx(-1 + 0.3465736 - 0.2)
    assert output.per_token.tolist() == pytest.approx([-1 + 0.3465736 - 0.2])
    metrics = reduce(output.metrics)
    assert metrics["actor/policy_loss"] == -1.0
    assert metrics["actor/kl_penalty"] == pytest.approx(0.6931472)  # without its coefficient
    assert metrics["actor/entropy"] == 2.0


def test_without_coefficients_entropy_is_reported_and_nothing_else():
    case = Case.random([(1, 3)], 0, seed=1)
    metrics = reduce(case.compute({}).metrics)
    assert metrics["actor/loss"] == metrics["actor/policy_loss"]
    assert "actor/entropy" in metrics and "actor/kl_penalty" not in metrics


def test_advantages_of_each_token():
    case = Case.random([(1, 2), (2, 3)], 2, seed=2)
    a, b = case.advantages_B.tolist()
    per_token = replace(case, advantages_B=torch.tensor([a] * 3 + [b] * 5 + [0.0] * 2, dtype=torch.float64))
    assert per_token.compute({}).loss.item() == case.compute({}).loss.item()


def test_a_micro_batch_of_padding_adds_nothing():
    empty = Case.random([], 4, seed=3).leaves()
    for denominators in (Denominators(tokens=7.0, sequences=2.0), None):
        output = empty.compute({"kl": {"coef": 0.1}, "entropy_coef": 0.1}, denominators)
        assert output.loss.item() == 0.0
        for gradient in gradients(output.loss, empty):
            assert (gradient == 0.0).all()
