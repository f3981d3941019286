"""The value model's targets and clipped loss, by hand.

# T packed tokens
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo_mega.critic.value import (
    ValueTargets,
    token_rewards,
    token_targets,
    value_loss,
    value_losses,
    with_explained_variance,
)
from grpo_mega.data.packing import pack
from grpo_mega.recipe.critic_block import CriticBlock
from grpo_mega.types import TrainSequence

BLOCK = CriticBlock(kind="value", gamma=1.0, lam=0.5, value_clip=0.2)


def batch_of(*lengths: tuple[int, int], padded: int = 10):
    """Sequences of (prompt, response) tokens."""
    sequences = [
        TrainSequence(i, f"made-{i}", np.arange(p + r), p, np.zeros(r, np.float32))
        for i, (p, r) in enumerate(lengths)
    ]
    return pack(sequences, padded, torch.device("cpu"))


def test_a_reward_lies_on_the_last_token_of_its_sequence() -> None:
    batch = batch_of((2, 2), (1, 3))
    assert token_rewards(batch, torch.tensor([5.0, 7.0])).tolist() == [0, 0, 0, 5, 0, 0, 0, 7, 0, 0]
    full = batch_of((1, 1), padded=2)  # no padding behind
    assert token_rewards(full, torch.tensor([5.0])).tolist() == [0, 5]


def test_targets_by_hand() -> None:
    """Two response tokens, r = 0, 1; the model says .5 in front of each: delta 0, .5; A = .25, .5; R = .75,
    1."""
    batch = batch_of((2, 2), padded=5)
    model_values_T = torch.tensor([9.0, 0.5, 0.5, 9.0, 9.0])
    targets = token_targets(batch, model_values_T, token_rewards(batch, torch.ones(1)), BLOCK)
    assert targets.advantages_T.tolist() == [0, 0, 0.25, 0.5, 0]
    assert targets.returns_T.tolist() == [0, 0, 0.75, 1, 0]
    assert targets.values_T[2:4].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("value", "before", "target", "loss", "clipped"),
    [
        (1.0, 0.5, 0.0, 0.5, False),  # (1 - 0)^2 beats (.7 - 0)^2
        (1.0, 0.5, 2.0, 0.5 * 1.3**2, True),  # .7 is further from 2
        (0.6, 0.5, 2.0, 0.5 * 1.4**2, False),  # within the clip they are the same
        (-1.0, 0.5, -2.0, 0.5 * 2.3**2, True),
    ],
)
def test_the_clipped_loss_by_hand(value, before, target, loss, clipped) -> None:
    targets = ValueTargets(torch.tensor([before]), torch.zeros(1), torch.tensor([target]))
    mask_T, values_T = torch.ones(1, dtype=torch.bool), torch.tensor([value], requires_grad=True)
    loss_T, clipped_T = value_loss(values_T, targets, mask_T, 0.2)
    assert loss_T.item() == pytest.approx(loss) and clipped_T.item() is clipped
    (gradient,) = torch.autograd.grad(loss_T.sum(), values_T)
    assert gradient.item() == pytest.approx(0.0 if clipped else value - target)
    assert value_loss(values_T, targets, mask_T, None)[0].item() == pytest.approx((value - target) ** 2 / 2)


def test_the_gradient_is_that_of_the_value() -> None:
    generator = torch.Generator().manual_seed(0)
    values_T, before, returns = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    targets, mask_T = ValueTargets(before, before, returns), torch.arange(12) % 3 > 0

    def total(values_T: torch.Tensor) -> torch.Tensor:
        return value_loss(values_T, targets, mask_T, 0.2)[0].sum()

    assert torch.autograd.gradcheck(total, values_T.requires_grad_())


def test_a_mean_over_the_tokens_of_the_whole_update() -> None:
    batch = batch_of((2, 2), padded=5)
    model_values_T = torch.tensor([9.0, 0.5, 0.5, 9.0, 9.0])
    targets = token_targets(batch, model_values_T, token_rewards(batch, torch.ones(1)), BLOCK)
    terms = value_losses([batch], [targets], 8, BLOCK)(model_values_T, 0)
    # errors .25 and .5 of this micro-batch, 8 tokens in the update
    assert terms.loss.item() == pytest.approx(0.5 * (0.25**2 + 0.5**2) / 8)


def test_explained_variance() -> None:
    metrics = {"value/return_variance": 2.0, "value/error_variance": 0.5}
    assert with_explained_variance(metrics)["value/explained_variance"] == 0.75
    assert "value/explained_variance" not in with_explained_variance({"value/return_variance": 0.0})
