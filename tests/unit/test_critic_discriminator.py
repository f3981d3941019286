"""The ranking loss of a step with every option, against plain Python in float64 and central differences.

# N sequences, P pairs
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from grpo_mega.critic.health import Remedies
from grpo_mega.critic.pairs import PairBatch
from grpo_mega.critic.ranking import DiscriminatorState, adaptive_temperature, judge, pair_scores
from grpo_mega.critic.report import correlation, pair_metrics
from grpo_mega.recipe.critic_block import AdaptiveRule, CriticBlock

# Four pairs: one teacher for the first two, and the last student's answer is the teacher's.
TEACHER, STUDENT, LENGTHS = [0, 0, 1, 2], [3, 4, 5, 2], [4.0, 7.0, 2.0, 5.0, 1.0, 9.0]
RAW = [1.3, -0.4, 2.9, 0.2, 1.9, -3.1]


def pairs_of(teacher: Sequence[int], student: Sequence[int], lengths: Sequence[float]) -> PairBatch:
    return PairBatch(
        batches=[],
        places_P=tuple(range(len(teacher))),
        teacher_P=torch.tensor(teacher, dtype=torch.int64),
        student_P=torch.tensor(student, dtype=torch.int64),
        identical_P=torch.tensor([t == s for t, s in zip(teacher, student, strict=True)], dtype=torch.bool),
        lengths_N=torch.tensor(lengths, dtype=torch.float64),
        tokens=int(sum(lengths)),
    )


PAIRS = pairs_of(TEACHER, STUDENT, LENGTHS)


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


@dataclass(frozen=True)
class Oracle:
    """Word for word what the recipe says, by loops."""

    block: CriticBlock
    batch_norm: bool

    def sides(self, raw: Sequence[float]) -> tuple[list[float], list[float]]:
        mix = self.block.length_mix
        score = [0.7 * r + 0.3 * r / n if mix else r for r, n in zip(raw, LENGTHS, strict=True)]
        return [score[i] for i in TEACHER], [score[i] for i in STUDENT]

    def differences(self, raw: Sequence[float]) -> list[float]:
        teacher, student = self.sides(raw)
        both, scale = [*teacher, *student], 1.0
        if self.batch_norm:
            mean = sum(both) / len(both)
            scale = math.sqrt(sum((x - mean) ** 2 for x in both) / len(both)) + 1e-8
        return [(t - s) / scale for t, s in zip(teacher, student, strict=True)]

    def loss(self, raw: Sequence[float], tau: float) -> float:
        block, differences = self.block, self.differences(raw)
        ranking = gap = 0.0
        for d in differences:
            logit, smoothing = (d - block.margin) / tau, block.label_smoothing
            ranking += (1 - smoothing) * softplus(-logit) + smoothing * softplus(logit)
            gap += max(0.0, d - block.gap_max)
        reg, given = 0.0, (block.score_reg.range.teacher, block.score_reg.range.student)
        for scores, bounds in zip(self.sides(raw), given, strict=True):
            low, high = bounds or (-block.score_reg.threshold, block.score_reg.threshold)
            reg += sum(max(0.0, low - x) ** 2 + max(0.0, x - high) ** 2 for x in scores)
        total = block.ranking_weight * ranking + block.score_reg.weight * reg + block.gap_penalty * gap
        return total / len(TEACHER)


def central_differences(function, at: Sequence[float], step: float = 1e-5) -> list[float]:
    slopes = []
    for i in range(len(at)):
        above, below = list(at), list(at)
        above[i] += step
        below[i] -= step
        slopes.append((function(above) - function(below)) / (2 * step))
    return slopes


VARIANTS = [
    {"batch_norm": norm, "length_mix": mix, "adaptive_temperature": adaptive, **extra}
    for norm, mix, adaptive, extra in itertools.product(
        (False, True),
        (False, True),
        ("off", "ema", "batch"),
        (
            {"score_reg": {"weight": 0.0}},
            {"temperature": 1.0, "margin": 0.3, "label_smoothing": 0.2},
            {"score_reg": {"threshold": 0.5, "weight": 0.3}, "ranking_weight": 2.0},
            {"score_reg": {"weight": 0.1, "range": {"teacher": [0.0, 1.0], "student": [-1.0, 0.5]}}},
            {"score_reg": {"weight": 0.1, "threshold": 1.0, "range": {"student": [-0.2, 0.1]}}},
            {"gap_penalty": 0.7, "gap_max": 0.4},
        ),
    )
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_loss_and_gradient_of_every_variant(options) -> None:
    block = CriticBlock(kind="discriminator", **options)
    oracle, state = Oracle(block, block.batch_norm), DiscriminatorState(2.0)
    raw_N = torch.tensor(RAW, dtype=torch.float64, requires_grad=True)
    judged = judge(pair_scores(raw_N, PAIRS, length_mix=block.length_mix), block, state)

    mean = sum(abs(d) for d in oracle.differences(RAW)) / len(TEACHER)
    tau, after = block.temperature, 2.0
    if block.adaptive_temperature != "off":
        after = mean if block.adaptive_temperature == "batch" else 0.9 * 2.0 + 0.1 * mean
        tau = min(max(1 + 0.6 * after, 1.0), 7.0)
    assert judged.temperature == pytest.approx(tau, rel=1e-12)
    assert judged.state.difference == pytest.approx(after, rel=1e-12)

    assert float(judged.loss.detach()) == pytest.approx(oracle.loss(RAW, tau), rel=1e-10)
    (gradient,) = torch.autograd.grad(judged.loss, raw_N)
    expected = central_differences(lambda raw: oracle.loss(raw, tau), RAW)
    assert gradient.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_remedies_win_over_the_recipe() -> None:
    block = CriticBlock(kind="discriminator", adaptive_temperature="ema")
    raw_N = torch.tensor(RAW, dtype=torch.float64)
    scores = pair_scores(raw_N, PAIRS, length_mix=False)
    judged = judge(scores, block, DiscriminatorState(), Remedies(temperature=3.0, batch_norm=False))
    assert judged.temperature == 3.0
    assert float(judged.loss) == pytest.approx(Oracle(block, False).loss(RAW, 3.0), rel=1e-10)


def test_the_adaptive_temperature_is_clamped() -> None:
    rule = AdaptiveRule()
    assert [adaptive_temperature(d, rule) for d in (0.0, 5.0, 50.0)] == [1.0, 4.0, 7.0]


def test_the_moving_average_starts_from_the_first_batch_and_survives_a_checkpoint() -> None:
    block = CriticBlock(kind="discriminator", adaptive_temperature="ema", batch_norm=False)
    scores = pair_scores(torch.tensor(RAW, dtype=torch.float64), PAIRS, length_mix=False)
    first = judge(scores, block, DiscriminatorState()).state
    # |1.3 - .2|, |1.3 - 1.9|, |-.4 + 3.1|, 0
    assert first.difference == pytest.approx((1.1 + 0.6 + 2.7) / 4)
    assert DiscriminatorState.from_json(json.loads(json.dumps(first.to_json()))) == first


@pytest.mark.parametrize("spread", [0.1, 3.0, 700.0])
def test_batch_norm_bounds_the_mean_difference_by_two(spread) -> None:
    """All teachers at one score and all students at another reach the bound; whatever else stays below it."""
    block = CriticBlock(kind="discriminator")
    apart = pairs_of([0, 1], [2, 3], [1.0] * 4)
    generator = torch.Generator().manual_seed(0)
    separated = torch.tensor([spread, spread, 0.0, 0.0], dtype=torch.float64)
    noisy = separated + spread * torch.randn(4, generator=generator, dtype=torch.float64)
    for raw_N, is_bound in ((separated, True), (noisy, False)):
        scores = pair_scores(raw_N, apart, length_mix=False)
        judged = judge(scores, block, DiscriminatorState())
        metrics = pair_metrics("critic", apart, scores, judged)
        normalised = metrics["critic/score_diff_normalized"]
        assert normalised == pytest.approx(2.0) if is_bound else normalised < 2.0
        assert metrics["critic/ranking_loss"] >= softplus(-2.0 / 5) - 1e-9  # .513 at tau 5


def test_metrics_by_hand() -> None:
    """T = 2, 1, 3 and S = 0, 1.5, 3 (the same answer), one token each but for the last two of 2."""
    pairs = pairs_of([0, 1, 2], [3, 4, 2], [1.0, 1.0, 2.0, 1.0, 2.0])
    block = CriticBlock(kind="discriminator", batch_norm=False, temperature=2.0, score_reg={"weight": 0.0})
    raw_N = torch.tensor([2.0, 1.0, 3.0, 0.0, 1.5], dtype=torch.float64)
    scores = pair_scores(raw_N, pairs, length_mix=False)
    metrics = pair_metrics("critic", pairs, scores, judge(scores, block, DiscriminatorState()))
    pooled = [2.0, 1.0, 3.0, 0.0, 1.5, 3.0]
    mean = sum(pooled) / 6
    std = math.sqrt(sum((x - mean) ** 2 for x in pooled) / 6)
    ranking = (softplus(-1.0) + softplus(0.25) + softplus(0.0)) / 3

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = {
        "pairs": 3,
        "d_loss": ranking,
        "ranking_loss": ranking,
        "score_reg": 0,
        "temperature": 2,
        "d_acc": 1 / 3,
        "d_acc_soft": (sigmoid(1.0) + sigmoid(-0.25) + 0.5) / 3,
        "teacher_wins": 1 / 2,  # of those that differ
        "score_diff": 0.5,
        "score_diff_normalized": 0.5 / std,
        "raw_score_diff": 0.5,
        "batch_mean": mean,
        "batch_std": std,
        "teacher_score_mean": 2,
        "teacher_score_std": math.sqrt(2 / 3),
        "teacher_score_min": 1,
        "teacher_score_max": 3,
        "student_score_mean": 1.5,
        "student_score_std": math.sqrt(1.5),
        "student_score_min": 0,
        "student_score_max": 3,
        "identical_pairs": 1,
        "identical_gap": 0,
        # lengths 1 1 2 1 2 2 around 1.5; scores around 1.75
        "score_length_corr": 2.25 / math.sqrt(1.5 * 6.875),
    }
    assert metrics == pytest.approx({f"critic/{name}": value for name, value in expected.items()}, abs=1e-7)


def test_raw_differences_are_those_before_the_length_mix() -> None:
    pairs = pairs_of([0], [1], [5.0, 4.0])
    scores = pair_scores(torch.tensor([10.0, 2.0], dtype=torch.float64), pairs, length_mix=True)
    metrics = pair_metrics(
        "critic", pairs, scores, judge(scores, CriticBlock(kind="discriminator"), DiscriminatorState())
    )
    assert metrics["critic/raw_score_diff"] == 8.0
    assert metrics["critic/score_diff"] == pytest.approx(7.6 - 1.55)


def test_numbers_over_nothing_are_left_out() -> None:
    pairs = pairs_of([0], [1], [3.0, 3.0])
    scores = pair_scores(torch.tensor([1.0, 2.0], dtype=torch.float64), pairs, length_mix=False)
    judged = judge(scores, CriticBlock(kind="discriminator"), DiscriminatorState())
    metrics = pair_metrics("critic", pairs, scores, judged)
    assert "critic/identical_gap" not in metrics and "critic/score_length_corr" not in metrics
    assert all(math.isfinite(value) for value in metrics.values())
    none = pairs_of([], [], [])
    scores = pair_scores(torch.zeros(0, dtype=torch.float64), none, length_mix=False)
    judged = judge(scores, CriticBlock(kind="discriminator"), DiscriminatorState())
    assert pair_metrics("critic", none, scores, judged) == {"critic/pairs": 0.0}
    assert float(judged.loss) == 0.0


def test_correlation_with_a_constant_is_none() -> None:
    line = torch.arange(4.0)
    assert correlation(line, 2 * line + 1) == pytest.approx(1.0)
    assert correlation(line, -line) == pytest.approx(-1.0)
    assert correlation(line, torch.ones(4)) is None
