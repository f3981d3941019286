"""The policy loss against a loop over sequences and tokens in float64, and known numbers by hand.

# T packed tokens, B sequences
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mega.algo.aggregate import Denominators
from grpo_mega.algo.objective import PolicyLoss, PolicyLossOutput, kl_penalty
from grpo_mega.monitor.metrics import merge, reduce

AGGREGATES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
ESTIMATORS = ("k1", "k2", "k3", "abs")
CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # the weights are float32, and losses of either sign cancel


@dataclass(frozen=True)
class Case:
    """A packed batch in float64."""

    trainer_T: torch.Tensor
    sampler_T: torch.Tensor
    reference_T: torch.Tensor
    entropy_T: torch.Tensor
    mask_T: torch.Tensor
    advantages_B: torch.Tensor
    cu_seqlens: tuple[int, ...]

    @classmethod
    def random(cls, shapes: list[tuple[int, int]], padding: int, seed: int, *, holes: bool = False) -> Case:
        """`shapes`: prompt and response length of each sequence; `holes`: some response tokens are not
        trained."""
        generator = torch.Generator().manual_seed(seed)
        mask, boundaries = [], [0]
        for prompt, response in shapes:
            mask += [False] * prompt + [True] * response
            boundaries.append(len(mask))
        if padding:
            mask += [False] * padding
            boundaries.append(len(mask))

        def normal(count: int = len(mask)) -> torch.Tensor:
            return torch.randn(count, generator=generator, dtype=torch.float64)

        mask_T = torch.tensor(mask, dtype=torch.bool)
        if holes:
            mask_T &= torch.rand(len(mask), generator=generator) < 0.7
        sampler_T = -3.0 + normal()
        return cls(
            trainer_T=sampler_T + normal() * 0.6,  # ratios from .3 to 3: every clip is met
            sampler_T=sampler_T,
            reference_T=sampler_T + normal() * 0.6,
            entropy_T=normal().abs(),
            mask_T=mask_T,
            advantages_B=normal(len(shapes)),
            cu_seqlens=tuple(boundaries),
        )

    @property
    def sequences(self) -> list[list[int]]:
        """The response tokens of each sequence (padding aside)."""
        count = len(self.advantages_B)
        spans = zip(self.cu_seqlens[:count], self.cu_seqlens[1:], strict=False)
        return [[t for t in range(start, stop) if self.mask_T[t]] for start, stop in spans]

    @property
    def counts(self) -> Denominators:
        return Denominators(
            tokens=float(sum(map(len, self.sequences))),
            sequences=float(sum(map(bool, self.sequences))),
        )

    def part(self, first: int, last: int) -> Case:
        """Sequences first to last - 1, without padding."""
        start, stop = self.cu_seqlens[first], self.cu_seqlens[last]
        tensors = ("trainer_T", "sampler_T", "reference_T", "entropy_T", "mask_T")
        return Case(
            **{name: getattr(self, name)[start:stop] for name in tensors},
            advantages_B=self.advantages_B[first:last],
            cu_seqlens=tuple(cu - start for cu in self.cu_seqlens[first : last + 1]),
        )

    def compute(self, config: dict, denominators: Denominators | None = None) -> PolicyLossOutput:
        return PolicyLoss(config)(
            self.trainer_T,
            self.sampler_T,
            self.advantages_B,
            torch.tensor(self.cu_seqlens, dtype=torch.int32),
            reference_logprobs_T=self.reference_T,
            entropy_T=self.entropy_T,
            response_mask_T=self.mask_T,
            denominators=denominators,
        )

    def leaves(self) -> Case:
        return replace(
            self,
            trainer_T=self.trainer_T.clone().requires_grad_(),
            entropy_T=self.entropy_T.clone().requires_grad_(),
        )


def _clip(low: float = 0.2, high: float = 0.2, dual: float | None = 3.0) -> dict:
    return {"clip": {"low": low, "high": high, "dual": dual}}


def _token_loss(case: Case, config: dict, t: int, advantage: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy part and the whole of one token's loss."""
    clip = config["objective"]["clip"]
    difference = case.trainer_T[t] - case.sampler_T[t]
    assert abs(difference) < 9, "the guards are tested by hand"
    ratio = difference.exp()
    if advantage >= 0:
        ratio = ratio if ratio < 1 + clip["high"] else ratio.new_tensor(1 + clip["high"])
    else:
        ratio = ratio if ratio > 1 - clip["low"] else ratio.new_tensor(1 - clip["low"])
        if clip["dual"] is not None and ratio > clip["dual"]:
            ratio = ratio.new_tensor(clip["dual"])
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


def _gradients(loss: torch.Tensor, case: Case) -> tuple[torch.Tensor, ...]:
    leaves = (case.trainer_T, case.entropy_T)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))


SHAPES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 6)).filter(lambda shape: sum(shape) > 0),
    min_size=1,
    max_size=5,
)
CASES = st.builds(Case.random, SHAPES, st.integers(0, 4), st.integers(0, 2**31), holes=st.booleans())
CONFIGS = st.fixed_dictionaries(
    {
        "objective": st.builds(
            _clip,
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
    for ours, expected in zip(_gradients(output.loss, case), _gradients(loss, case), strict=True):
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
    clip = config["objective"]["clip"]
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
            [(a > 0 and r > 1 + clip["high"]) or (a < 0 and r < 1 - clip["low"]) for r, a in pairs]
        ),
        "actor/clip_fraction_lower": mean(
            [clip["dual"] is not None and a < 0 and r > clip["dual"] for r, a in pairs]
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
    for ours, expected in zip(_gradients(total, case), _gradients(whole.loss, case), strict=True):
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
    for ours, wanted in zip(_gradients(output.loss, spoilt), _gradients(expected.loss, plain), strict=True):
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


# --- by hand ------------------------------------------------------------------------------------------------


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
    found, (slope,), _ = _tokens([ratio], [advantage], objective=_clip(dual=dual))
    assert (found, slope) == (pytest.approx(loss), pytest.approx(gradient))


def test_low_and_high_are_two_numbers():
    # .1 below, .28 above. A = 1: 1.2 passes, 1.28 is the end; A = -1: .95 passes, .9 is the end
    options = {"objective": _clip(0.1, 0.28)}
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
    loss, gradient, metrics = _tokens(ratios, [-1.0] * 4, [1] * 4, objective=_clip(dual=None))
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
    gradient_T, _ = _gradients(output.loss, case)
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
        for gradient in _gradients(output.loss, empty):
            assert (gradient == 0.0).all()
