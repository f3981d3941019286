"""The slow obvious loops themselves, by hand: one to three tokens for every rule.

Ratios are made by trainer = ln ratio and sampler = 0, so d s_t / d logp_t = s_t. Unless a test says otherwise
the loss is a sum over the tokens of one sequence, the clip is out of the way and A is 1: loss_t = -s_t.

# T packed tokens
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_mega.algo.reference import ReferenceOutput, reference_policy_loss
from grpo_mega.recipe.blocks import LossBlock

WIDE = {"clip": {"low": 0.999, "high": 1e5, "dual": None}}


def _tensor(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _log(ratios: list[float]) -> torch.Tensor:
    return _tensor([math.log(ratio) for ratio in ratios])


def _ask(
    ratios: list[float],
    advantages: float | list[float] = 1.0,
    *,
    boundaries: list[int] | None = None,
    loss: dict[str, Any] | None = None,
    objective: dict[str, Any] | None = WIDE,
    innovations: dict[str, Any] | None = None,
    **given: Any,
) -> ReferenceOutput:
    """A number for each sequence is an advantage each; loss is the block, less objective and innovations."""
    boundaries = boundaries or [0, len(ratios)]
    block = {"aggregate": "seq-mean-token-sum", "objective": objective, "innovations": innovations or {}}
    return reference_policy_loss(
        LossBlock.model_validate(block | (loss or {})),
        given.pop("trainer", _log(ratios)),
        given.pop("sampler", torch.zeros(len(ratios), dtype=torch.float64)),
        _tensor([advantages] * (len(boundaries) - 1) if isinstance(advantages, float) else advantages),
        torch.tensor(boundaries),
        **{name: _tensor(value) if isinstance(value, list) else value for name, value in given.items()},
    )


def _is(value_T: torch.Tensor, expected: list[float]) -> None:
    assert value_T.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def _credit(weights: list[float], **innovations: Any) -> None:
    """These weights are found; ratios of 1, 2, 4, ... stay, and loss and gradient are -w s."""
    ratios = [2.0**t for t in range(len(weights))]
    given = innovations.pop("given", {})
    output = _ask(ratios, innovations=innovations, **given)
    _is(output.weight_T, weights)
    _is(output.ratio_T, ratios)
    for value_T in (output.per_token_T, output.grad_trainer_T):
        _is(value_T, [-w * s for w, s in zip(weights, ratios, strict=True)])


def test_ratio_and_its_guards() -> None:
    """l = ln 2 -> 2; l = 9.5 -> e^9.5 = 13,360 > 1e4; l = 30 -> 10 -> 1e4; l = -30 -> e^-10 = 4.5e-5 < 1e-4.
    What a guard cut has no gradient."""
    output = _ask([1.0] * 4, trainer=_tensor([math.log(2.0), 9.5, 30.0, -30.0]))
    _is(output.ratio_T, [2.0, 1e4, 1e4, 1e-4])
    _is(output.grad_trainer_T, [-2.0, 0.0, 0.0, 0.0])


def test_ema() -> None:
    """beta .5 on 1, 2, 4: w' = 1, 1.5, .5 x 4 + .5 x 1.5 = 2.75.
    d sum / d w = 1 + .5 + .25, .5 + .25, .5; times w: 1.75, 1.5, 2."""
    output = _ask([1.0, 2.0, 4.0], innovations={"ema": {"beta": 0.5}})
    _is(output.ratio_T, [1.0, 1.5, 2.75])
    _is(output.grad_trainer_T, [-1.75, -1.5, -2.0])


def test_amic() -> None:
    """(1 + 2) / 2 = 1.5 at both tokens: loss -3; d / d w_t = -2 x 1/2."""
    output = _ask([1.0, 2.0], innovations={"amic": {}})
    _is(output.ratio_T, [1.5, 1.5])
    assert output.loss == pytest.approx(-3.0)
    _is(output.grad_trainer_T, [-1.0, -2.0])


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_gspo(level: str) -> None:
    """sqrt(1 x 4) = 2 at both. Sequence: d s / d logp = 2 x 1/2, at two tokens with A = 1, 3: -(1 + 3) for
    each token. Token: its own ratio's gradient, -A s = -2, -6."""
    advantages = [1.0, 3.0, 0.0]  # one for each token: there is a masked third
    given = {"boundaries": [0, 3], "response_mask_T": torch.tensor([True, True, False])}
    output = _ask([1.0, 4.0, 1.0], advantages, innovations={"gspo": {"level": level}}, **given)
    _is(output.ratio_T, [2.0, 2.0, 0.0])
    _is(output.grad_trainer_T, [-4.0, -4.0, 0.0] if level == "sequence" else [-2.0, -6.0, 0.0])


def test_ema_comes_before_the_level() -> None:
    """beta .5 on 1, 3: 1, 2. amic: 1.5; gspo: sqrt 2."""
    _is(_ask([1.0, 3.0], innovations={"ema": {"beta": 0.5}, "amic": {}}).ratio_T, [1.5, 1.5])
    _is(_ask([1.0, 3.0], innovations={"ema": {"beta": 0.5}, "gspo": {}}).ratio_T, [2**0.5] * 2)


def test_gradient_adaptive_by_log_probability() -> None:
    """|logp| = 0, ln 2, ln 4: exp 1, 2, 4 of 7, times 3. At temperature .5: 1, 4, 16 of 21, capped at 2.
    One token has 1, whatever the cap."""
    _credit([3 / 7, 6 / 7, 12 / 7], gradient_adaptive={})
    _credit([1 / 7, 4 / 7, 2.0], gradient_adaptive={"temperature": 0.5, "max_weight": 2.0})
    _credit([1.0], gradient_adaptive={"max_weight": 0.5})


def test_gradient_adaptive_by_logit_norm() -> None:
    """p = 1/2, 1/4; sum p^2 = 1/2, 1/4: g^2 = 1 - 1 + 1/2, 1 - 1/2 + 1/4. Where rounding makes g^2 = -1e-9
    (p = 1), g is 0."""
    logp, square = _log([0.5, 0.25]), _tensor([0.5, 0.25])
    options = {"gradient_adaptive": {"norm": "logit"}}
    given: dict[str, Any] = {"trainer": logp, "sampler": logp, "sq_prob_T": square, "innovations": options}
    a, b = math.exp(0.5**0.5), math.exp(0.75**0.5)
    _is(_ask([1.0, 1.0], **given).weight_T, [2 * a / (a + b), 2 * b / (a + b)])
    certain = {**given, "trainer": _log([1.0, 1.0]), "sq_prob_T": _tensor([1.0 - 1e-9, 1.0])}
    _is(_ask([1.0, 1.0], **certain).weight_T, [1.0, 1.0])


def test_temporal_decay_exponential() -> None:
    """gamma .5: 1, 1/2, 1/4, together 7/4."""
    _credit([12 / 7, 6 / 7, 3 / 7], temporal_decay={"gamma": 0.5})
    _credit([4 / 7, 2 / 7, 1 / 7], temporal_decay={"gamma": 0.5, "normalize": "sum"})
    _credit([1.0, 0.5, 0.25], temporal_decay={"gamma": 0.5, "normalize": "none"})


def test_temporal_decay_lspd() -> None:
    """tau 1, L = 4: ln(1 + t) / ln 4 = 0, 1/2, ln 3 / ln 4, 1 -> e^0, e^-1, 3^(-1/ln 2), e^-2 at alpha 2.
    One token has 1."""
    options = {"mode": "lspd", "tau": 1.0, "normalize": "none"}
    _credit([1.0, math.e**-1, 3 ** (-1 / math.log(2)), math.e**-2], temporal_decay=options)
    _credit([1.0], temporal_decay=options)


def test_credits_multiply() -> None:
    """|logp| = 0, ln 2: 2/3, 4/3; decay at .5, mean: 4/3, 2/3."""
    _credit([8 / 9, 8 / 9], gradient_adaptive={}, temporal_decay={"gamma": 0.5})


def test_legacy_credit_is_inside_the_ratio() -> None:
    """Decay 1, 1/2 over 3/2 (legacy means sum): ratios 1, 2 become 2/3, 2/3; below the clip of .8, A = -1 has
    the constant -.8, A = 1 the ratio. Times |logp| weights 2/3, 4/3: 4/9, 8/9."""
    decay = {"temporal_decay": {"gamma": 0.5, "legacy": True}}
    output = _ask([1.0, 2.0], -1.0, innovations=decay, objective=None)
    _is(output.ratio_T, [2 / 3, 2 / 3])
    _is(output.weight_T, [1.0, 1.0])
    _is(output.per_token_T, [0.8, 0.8])
    _is(output.grad_trainer_T, [0.0, 0.0])
    _is(_ask([1.0, 2.0], innovations=decay, objective=None).grad_trainer_T, [-2 / 3, -2 / 3])
    both = decay | {"gradient_adaptive": {"legacy": True}}
    _is(_ask([1.0, 2.0], innovations=both).ratio_T, [4 / 9, 8 / 9])
    spread = {"temporal_decay": {"gamma": 0.5, "legacy": True, "normalize": "mean"}}
    _is(_ask([1.0, 2.0], innovations=spread).ratio_T, [4 / 3, 4 / 3])
    # after the level: the mean 1.5, times 2/3 and 1/3
    _is(_ask([1.0, 2.0], innovations=decay | {"amic": {}}).ratio_T, [1.0, 0.5])


def test_structured_credit() -> None:
    """L = 6: marker, two of thought, marker, two of answer. Thought 3, by 1 and e^-2; markers .6 each; answer
    .9 each. Without thought, L = 4: markers 4 x .2/.5 / 2 = .8, answer 4 x .3/.5 / 2 = 1.2. Unparsed: 1."""
    small = math.exp(-2)
    thought = [3 / (1 + small), 3 * small / (1 + small)]
    for segments, weights in (
        ([1, 2, 2, 1, 3, 3], [0.6, *thought, 0.6, 0.9, 0.9]),
        ([1, 3, 3, 1], [0.8, 1.2, 1.2, 0.8]),
        ([2], [1.0]),
        ([0, 0, 0], [1.0, 1.0, 1.0]),
    ):
        _credit(weights, sca={}, given={"segments_T": torch.tensor(segments, dtype=torch.int8)})
    silent = {"process": 1.0, "structure": 0.0, "answer": 0.0}  # no part that is there has a share
    _credit([0.0, 0.0], sca=silent, given={"segments_T": torch.tensor([1, 3], dtype=torch.int8)})


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        (1.1, 1.0, 1.1, 1.1),
        (1.5, 1.0, 1.2, 0.0),  # cut above
        (0.5, 1.0, 0.5, 0.5),  # leads back: not cut
        (0.5, -1.0, -0.8, 0.0),  # cut below
        (1.5, -1.0, -1.5, -1.5),  # leads back
        (5.0, -1.0, -3.0, 0.0),  # dual bound
        (5.0, -2.0, -6.0, 0.0),  # of the advantage, not of 1
        (1.0, 1.0, 1.0, 1.0),  # a tie has the whole gradient
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_clip(ratio: float, advantage: float, value: float, gradient: float) -> None:
    output = _ask([ratio], advantage, objective=None)
    _is(output.per_token_T, [-value])
    _is(output.grad_trainer_T, [-gradient])


def test_clip_options() -> None:
    """High .28 alone, no dual bound, and the range that gspo has of its own (3e-4 / 4e-4)."""
    options = {"clip": {"high": 0.28, "dual": None}}
    _is(_ask([1.25, 1.5], 1.0, objective=options).per_token_T, [-1.25, -1.28])
    _is(_ask([5.0], -1.0, objective=options).per_token_T, [5.0])
    _is(_ask([1.1], 1.0, objective=None, innovations={"gspo": {}}).per_token_T, [-1.0004])
    _is(_ask([0.9], -1.0, objective=None, innovations={"gspo": {}}).per_token_T, [0.9997])


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient", "legacy", "legacy_gradient"),
    [
        (1.2, 1.0, 1.2, 1.2, 1.2, 1.2),
        (1.4, 1.0, 1.3, 0.0, 1.3, 0.0),
        (0.5, 1.0, 0.5, 0.5, 0.7, 0.0),  # the original cuts what leads back, too
        (1.4, -1.0, -1.4, -1.4, -1.1, 0.0),
        (0.8, -1.0, -0.9, 0.0, -0.9, 0.0),
        (5.0, -1.0, -3.0, 0.0, -1.1, 0.0),  # and it has no dual bound
        (1.2, 0.0, 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_asymmetric(
    ratio: float, advantage: float, value: float, gradient: float, legacy: float, legacy_gradient: float
) -> None:
    for options, right, slope in (({}, value, gradient), ({"legacy": True}, legacy, legacy_gradient)):
        output = _ask([ratio], advantage, objective=None, innovations={"asymmetric": options})
        _is(output.per_token_T, [-right])
        _is(output.grad_trainer_T, [-slope])


def test_ptrw() -> None:
    """s = 1.2, .8 at sigma .2: phi = e^-1/2. With A = 1 .8 leads back, with A = -1 1.2 does. Differentiated,
    phi' = -phi (s - 1) / sigma^2 = -5 phi, 5 phi: s d(phi s)/ds = phi s (1 - 5 s), phi s (1 + 5 s)."""
    phi = math.exp(-0.5)

    def gradient(advantage: float, **options: Any) -> list[float]:
        output = _ask([1.2, 0.8], advantage, objective=None, innovations={"ptrw": options})
        return (-output.grad_trainer_T).tolist()

    assert gradient(1.0) == pytest.approx([1.2 * phi, 0.8])
    assert gradient(-1.0) == pytest.approx([-1.2, -0.8 * phi])
    assert gradient(1.0, keep_corrective=False) == pytest.approx([1.2 * phi, 0.8 * phi])
    assert gradient(1.0, detach=False) == pytest.approx([1.2 * phi * (1 - 6), 0.8])
    both = gradient(1.0, detach=False, keep_corrective=False)
    assert both == pytest.approx([1.2 * phi * (1 - 6), 0.8 * phi * (1 + 4)])


def test_ptrw_legacy() -> None:
    """Mean of 1.2 and 1.0 is 1.1: phi = e^(-.01/.08) = e^-1/8, objective 1.1 phi at both tokens.
    d (phi s)/d s = phi (1 - 1.1 x .1 / .04) = -1.75 phi, twice, half of it for each ratio: -1.75 phi w_t.
    Nothing is exempt: the mean of .8 alone with A = 1 has e^-1/2."""
    phi = math.exp(-1 / 8)
    output = _ask([1.2, 1.0], objective=None, innovations={"ptrw": {"legacy": True}})
    _is(output.per_token_T, [-1.1 * phi, -1.1 * phi])
    _is(output.grad_trainer_T, [1.75 * phi * 1.2, 1.75 * phi * 1.0])
    _is(
        _ask([0.8], innovations={"ptrw": {"legacy": True}}, objective=None).per_token_T,
        [-0.8 * math.exp(-0.5)],
    )


def test_cispo() -> None:
    """min(6, 5) A logp = 5 x 2 x ln 6; gradient 5 x 2. Below min_ratio .5: .5."""
    output = _ask([6.0, 0.2], 2.0, objective={"cispo": {"min_ratio": 0.5}})
    _is(output.per_token_T, [-10 * math.log(6.0), -math.log(0.2)])
    _is(output.grad_trainer_T, [-10.0, -1.0])


def test_gmpo() -> None:
    """Ratios 1, e at A = 1: q = 0, .4 -> e^.2; the cut token has no gradient, the other e^.2 / 2 from each of
    two tokens. At A = -1 nothing is cut above: e^.5. Ratios 1, 1/e: cut below for A = -1 only."""
    output = _ask([1.0, math.e], objective={"gmpo": {}})
    _is(output.per_token_T, [-math.exp(0.2)] * 2)
    _is(output.grad_trainer_T, [-math.exp(0.2), 0.0])
    _is(_ask([1.0, math.e], -1.0, objective={"gmpo": {}}).per_token_T, [math.exp(0.5)] * 2)
    _is(_ask([1.0, 1 / math.e], objective={"gmpo": {}}).per_token_T, [-math.exp(-0.5)] * 2)
    _is(_ask([1.0, 1 / math.e], -1.0, objective={"gmpo": {}}).grad_trainer_T, [math.exp(-0.2), 0.0])


@pytest.mark.parametrize(
    ("estimator", "values", "gradients"),
    [  # d = ln 2, -ln 2; gradient by the trainer's log-probability, d d / d logp = -1
        ("k1", [-math.log(2), math.log(2)], [1.0, 1.0]),
        ("k2", [math.log(2) ** 2 / 2] * 2, [-math.log(2), math.log(2)]),
        ("k3", [1 - math.log(2), math.log(2) - 0.5], [-1.0, 0.5]),
        ("abs", [math.log(2)] * 2, [-1.0, 1.0]),
    ],
)
def test_kl(estimator: str, values: list[float], gradients: list[float]) -> None:
    """Without advantage the penalty is all there is; credit does not multiply it."""
    options = {
        "loss": {"kl": {"coef": 3.0, "estimator": estimator}},
        "reference_logprobs_T": _log([2.0, 0.5]),
    }
    output = _ask([1.0, 1.0], 0.0, innovations={"temporal_decay": {}}, **options)
    _is(output.per_token_T, [3 * value for value in values])
    _is(output.grad_trainer_T, [3 * gradient for gradient in gradients])


def test_kl_is_clamped() -> None:
    """d = 50 counts as 10: e^10 - 11, without gradient."""
    output = _ask([1.0], 0.0, loss={"kl": {"coef": 1.0}}, reference_logprobs_T=[50.0])
    _is(output.per_token_T, [math.exp(10) - 11])
    _is(output.grad_trainer_T, [0.0])


def test_entropy() -> None:
    """-coef H, of weight 1 whatever the credit (mean of 2 tokens: gradient -.1 / 2)."""
    options = {"loss": {"entropy_coef": 0.1, "aggregate": "token-mean"}, "entropy_T": [2.0, 3.0]}
    output = _ask([1.0, 1.0], 0.0, innovations={"temporal_decay": {}}, **options)
    _is(output.per_token_T, [-0.2, -0.3])
    _is(output.grad_entropy_T, [-0.05, -0.05])
    assert output.loss == pytest.approx(-0.25)


@pytest.mark.parametrize(
    ("options", "weights"),
    [  # proximal / sampler = 4, 1/8; product 1/2
        ({"kind": "none"}, [1.0, 1.0]),
        ({"kind": "tis"}, [2.0, 0.125]),
        ({"kind": "tis", "cap": 8.0}, [4.0, 0.125]),
        ({"kind": "tis", "level": "sequence"}, [0.5, 0.5]),
        ({"kind": "mis"}, [0.0, 0.125]),
        ({"kind": "mis", "cap": 8.0, "floor": 0.25}, [4.0, 0.0]),
        ({"kind": "mis", "level": "sequence"}, [0.5, 0.5]),
        ({"kind": "mis", "level": "sequence", "floor": 0.75}, [0.0, 0.0]),
    ],
)
def test_correction(options: dict[str, Any], weights: list[float]) -> None:
    """The ratio is against proximal = 3, 3 under a correction, else against the sampler."""
    given = {"sampler": _log([3 / 4, 24.0]), "proximal_logprobs_T": _log([3.0, 3.0])}
    output = _ask([6.0, 9.0], loss={"correction": options}, **given)
    ratios = [8.0, 0.375] if options["kind"] == "none" else [2.0, 3.0]
    _is(output.ratio_T, ratios)
    for value_T in (output.per_token_T, output.grad_trainer_T):
        _is(value_T, [-w * s for w, s in zip(weights, ratios, strict=True)])


def test_correction_without_proximal() -> None:
    """The trainer's own log-probabilities now: ratio 1, and trainer / sampler = 1.5 weighs."""
    output = _ask([1.5], loss={"correction": {"kind": "tis"}})
    _is(output.ratio_T, [1.0])
    _is(output.per_token_T, [-1.5])
    _is(output.grad_trainer_T, [-1.5])


@pytest.mark.parametrize(
    ("aggregate", "shares"),
    [  # three valid tokens in two sequences of 2 and 1 tokens; a third has none, and denominators skip it
        ("token-mean", [1 / 3, 1 / 3, 1 / 3]),
        ("seq-mean-token-sum", [1 / 2, 1 / 2, 1 / 2]),
        ("seq-mean-token-mean", [1 / 4, 1 / 4, 1 / 2]),
        ("seq-mean-token-sum-norm", [1 / 20, 1 / 20, 1 / 20]),
    ],
)
def test_aggregation(aggregate: str, shares: list[float]) -> None:
    """Ratios 1: the gradient is minus each token's share times A = 1, 1, 2. In an update of twice as many
    tokens and sequences each share is half of that."""
    mask = torch.tensor([True, True, False, True, False])
    given: dict[str, Any] = {
        "advantages": [1.0, 5.0, 2.0],
        "boundaries": [0, 2, 3, 5],
        "response_mask_T": mask,
    }
    given |= {"loss": {"aggregate": aggregate}, "norm_length": 10}
    output = _ask([1.0] * 5, **given)
    expected = [-shares[0], -shares[1], 0.0, -2 * shares[2], 0.0]
    _is(output.grad_trainer_T, expected)
    assert output.loss == pytest.approx(sum(expected))
    _is(output.per_token_T, [-1.0, -1.0, 0.0, -2.0, 0.0])
    output = _ask([1.0] * 5, **given, denominators=SimpleNamespace(tokens=6.0, sequences=4.0))
    _is(output.grad_trainer_T, [value / 2 for value in expected])


def test_the_blocks_own_norm_length_counts_first() -> None:
    block = {"aggregate": "seq-mean-token-sum-norm", "norm_length": 4}
    assert _ask([1.0], loss=block, norm_length=10).loss == -1 / 4


def test_a_mask_closes_up_the_tokens() -> None:
    """t counts valid tokens: with a hole and tokens outside of the boundaries the decay is that of 2 tokens,
    and the ratio of 8 in the hole is in no mean."""
    decay = {"temporal_decay": {"gamma": 0.5}, "amic": {}}
    mask = torch.tensor([True, True, False, True, True])
    output = _ask([8.0, 1.0, 8.0, 2.0, 8.0], boundaries=[1, 4], response_mask_T=mask, innovations=decay)
    _is(output.weight_T, [0.0, 4 / 3, 0.0, 2 / 3, 0.0])
    _is(output.ratio_T, [0.0, 1.5, 0.0, 1.5, 0.0])
    _is(output.per_token_T, [0.0, -2.0, 0.0, -1.0, 0.0])


@pytest.mark.parametrize("mask", [None, torch.zeros(1, dtype=torch.bool)])
def test_nothing_to_learn_from_is_zero(mask: torch.Tensor | None) -> None:
    """An empty sequence, and padding, which comes without an advantage."""
    output = _ask([3.0], [], boundaries=[0, 0] if mask is None else [0, 1], response_mask_T=mask)
    assert output.loss == 0.0
    _is(output.grad_trainer_T, [0.0])
