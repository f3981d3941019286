"""What each innovation is known for, in numbers: the effects that a curve of a run is explained by.

# T packed tokens
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from grpo_mega.algo import PolicyLoss
from grpo_mega.monitor.metrics import reduce


def _gradient(ratio_T: torch.Tensor, advantage: float, innovations: dict[str, Any]) -> torch.Tensor:
    """Of the loss by the log-probabilities of one sequence with these ratios."""
    trainer_T = ratio_T.log().requires_grad_()
    output = PolicyLoss({"innovations": innovations})(
        trainer_T,
        torch.zeros_like(ratio_T),
        torch.tensor([advantage], dtype=ratio_T.dtype),
        torch.tensor([0, len(ratio_T)]),
    )
    output.loss.backward()
    assert trainer_T.grad is not None
    return trainer_T.grad


def _gradient_at(ratio: float, advantage: float, innovations: dict[str, Any]) -> float:
    """Of a sequence that is a single token."""
    return _gradient(torch.tensor([ratio], dtype=torch.float64), advantage, innovations).item()


def _noisy_ratios(count: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (spread * torch.randn(count, generator=generator, dtype=torch.float64)).exp()


def test_decay_inside_the_ratio_forgets_negative_advantages() -> None:
    """Weights that sum to 1 over 500 tokens make every ratio about .05 or less, far below the clip of .8: for
    A < 0 the objective is the constant -.8. After the clip they leave every token its gradient."""
    ratio_T = _noisy_ratios(500, 0.01)
    inside = {"temporal_decay": {"legacy": True, "normalize": "sum"}}
    assert not _gradient(ratio_T, -1.0, inside).any()
    assert (_gradient(ratio_T, 1.0, inside) < 0).all()
    for normalize in ("sum", "mean"):
        after = {"temporal_decay": {"normalize": normalize}}
        assert (_gradient(ratio_T, -1.0, after) > 0).all()
        assert (_gradient(ratio_T, 1.0, after) < 0).all()


@pytest.mark.parametrize("beta", [0.5, 0.7, 0.9, 0.95, 0.99])
def test_ema_reduces_the_variance_of_independent_ratios(beta: float) -> None:
    """Var w' = beta^2 sum_k (1 - beta)^2k Var w = beta / (2 - beta) Var w, far from the first token."""
    lengths, width = 10, 20_000
    ratio_T = _noisy_ratios(lengths * width, 0.05)
    loss = PolicyLoss({"innovations": {"ema": {"beta": beta}}})
    output = loss(
        ratio_T.log(),
        torch.zeros_like(ratio_T),
        torch.ones(lengths, dtype=torch.float64),
        torch.arange(0, (lengths + 1) * width, width),
    )
    metrics = loss.derived(reduce(output.metrics))
    assert metrics["ema/variance_reduction_ratio"] == pytest.approx((2 - beta) / beta, rel=0.03)


def test_differentiating_the_trust_weight_turns_the_gradient_around() -> None:
    """d (phi s)/d s = phi (1 - s (s - 1) / sigma^2) changes sign at (1 + sqrt(1 + 4 sigma^2)) / 2: beyond it
    the loss pushes a good token's probability down."""
    turn = (1 + math.sqrt(1 + 4 * 0.2**2)) / 2
    assert turn == pytest.approx(1.0385, abs=5e-5)
    for options, signs in (
        ({"detach": False}, (1.0,)),  # a bad token far above is corrective: exempt
        ({"detach": False, "keep_corrective": False}, (1.0, -1.0)),
        ({"legacy": True}, (1.0, -1.0)),
    ):
        for advantage in signs:
            for ratio in (0.5, 0.9, 1.0, turn - 1e-3):
                assert _gradient_at(ratio, advantage, {"ptrw": options}) * advantage < 0
            for ratio in (turn + 1e-3, 1.2, 1.5):
                assert _gradient_at(ratio, advantage, {"ptrw": options}) * advantage > 0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_default_trust_weight_never_does(advantage: float) -> None:
    for step in range(-100, 101):
        ratio = 2.0 ** (step / 50)  # 1/4 to 4
        assert _gradient_at(ratio, advantage, {"ptrw": {}}) * advantage < 0


@pytest.mark.parametrize(("ratio", "advantage"), [(0.5, 1.0), (0.69, 1.0), (1.11, -1.0), (2.0, -1.0)])
def test_a_clamp_without_minimum_loses_what_leads_back(ratio: float, advantage: float) -> None:
    """A good token that has become too rare, a bad one too frequent: the original does not correct them."""
    assert _gradient_at(ratio, advantage, {"asymmetric": {"legacy": True}}) == 0
    assert _gradient_at(ratio, advantage, {"asymmetric": {}}) == pytest.approx(-advantage * ratio)


@pytest.mark.parametrize(("ratio", "advantage"), [(1.31, 1.0), (0.89, -1.0)])
@pytest.mark.parametrize("legacy", [False, True])
def test_both_forms_cut_what_leads_away(ratio: float, advantage: float, legacy: bool) -> None:
    assert _gradient_at(ratio, advantage, {"asymmetric": {"legacy": legacy}}) == 0
