"""The ranking loss by hand, against float64, and with its batch statistics over ranks.

# P pairs
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from grpo_mega.kernels.discriminator import RankingOptions, discriminator_loss

PLAIN = RankingOptions(temperature=1.0, batch_norm=False, regularisation_weight=0.0)


def _softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_one_pair_by_hand() -> None:
    output = discriminator_loss(torch.tensor([1.0]), torch.tensor([-1.0]), PLAIN)
    assert output.loss.item() == pytest.approx(_softplus(-2.0))
    output = discriminator_loss(
        torch.tensor([1.0]), torch.tensor([-1.0]), RankingOptions(5.0, 0.5, False, 3.0, 0.0)
    )
    assert output.loss.item() == pytest.approx(_softplus(-1.5 / 5))


def test_scores_beyond_the_threshold_are_drawn_back() -> None:
    # relu(4 - 3)^2 + relu(5 - 3)^2 = 1 + 4, times .01
    output = discriminator_loss(torch.tensor([4.0]), torch.tensor([-5.0]), RankingOptions(batch_norm=False))
    assert output.regularisation.item() == pytest.approx(0.05)


def test_label_smoothing_and_gap_penalty() -> None:
    options = RankingOptions(1.0, 0.0, False, 9.0, 0.0, label_smoothing=0.1, gap_penalty=2.0, gap_max=1.0)
    output = discriminator_loss(torch.tensor([2.0]), torch.tensor([0.0]), options)
    assert output.loss.item() == pytest.approx(0.9 * _softplus(-2.0) + 0.1 * _softplus(2.0) + 2.0 * 1.0)


def test_batch_norm_caps_what_separation_can_earn() -> None:
    """All teachers at t, all students at s: the pooled std is |t - s| / 2, the difference 2, whatever t and
    s."""
    for gap in (0.1, 1.0, 50.0):
        output = discriminator_loss(torch.full((4,), gap), torch.zeros(4), RankingOptions())
        assert output.difference_P.tolist() == pytest.approx([2.0] * 4, rel=1e-5)
        assert output.ranking.item() == pytest.approx(_softplus(-0.4), rel=1e-5)


def test_identical_scores_stay_finite() -> None:
    teacher_P = torch.ones(3, requires_grad=True)
    output = discriminator_loss(teacher_P, torch.ones(3), RankingOptions())
    output.loss.backward()
    assert output.ranking.item() == pytest.approx(math.log(2.0))
    assert teacher_P.grad is not None and teacher_P.grad.isfinite().all()


def _on_rank(teacher_P: torch.Tensor, student_P: torch.Tensor, cuts: list[int] | None):
    """Loss and gradients of this rank's pairs."""
    from grpo_mega.engine.parallel import initialize_process_group

    initialize_process_group()
    group = None
    if cuts is not None:
        rank, group = dist.get_rank(), dist.group.WORLD
        teacher_P, student_P = (v[cuts[rank] : cuts[rank + 1]] for v in (teacher_P, student_P))
    leaves = [v.clone().requires_grad_() for v in (teacher_P, student_P)]
    output = discriminator_loss(*leaves, RankingOptions(temperature=0.7, regularisation_threshold=0.5), group)
    output.loss.backward()
    return output.loss.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("cuts", [[0, 5, 9], [0, 0, 9]], ids=["uneven", "a rank without pairs"])
def test_pairs_over_two_ranks_equal_one(cuts, ranks) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher_P, student_P = torch.randn(2, 9, generator=generator)
    loss, *gradients = ranks(1).run(_on_rank, teacher_P, student_P, None)[0]
    parts = ranks(2).run(_on_rank, teacher_P, student_P, cuts)
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss)
    for side, expected in enumerate(gradients, start=1):
        torch.testing.assert_close(torch.cat([part[side] for part in parts]), expected)


def test_the_gradient_is_that_of_the_value() -> None:
    teacher_P, student_P = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = RankingOptions(regularisation_threshold=0.5, label_smoothing=0.1, gap_penalty=0.3, gap_max=0.2)

    def loss(teacher_P: torch.Tensor, student_P: torch.Tensor) -> torch.Tensor:
        return discriminator_loss(teacher_P, student_P, options).loss

    leaves = (teacher_P.requires_grad_(), student_P.requires_grad_())
    assert torch.autograd.gradcheck(loss, leaves)
