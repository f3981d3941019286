"""What is reported of a step's pairs, as critic/* and, of a frozen set, as critic_audit/*.

# P pairs, N sequences
"""

from __future__ import annotations

import math

import torch

from grpo_mega.critic.pairs import PairBatch
from grpo_mega.critic.ranking import Judgement, PairScores
from grpo_mega.kernels.discriminator import EPSILON


def pair_metrics(prefix: str, pairs: PairBatch, scores: PairScores, judged: Judgement) -> dict[str, float]:
    """Over all pairs of the step; a number over nothing, or undefined there, is left out."""
    teacher_P, student_P = scores.teacher_P.detach().double(), scores.student_P.detach().double()
    count = teacher_P.numel()
    if not count:
        return {f"{prefix}/pairs": 0.0}
    ranking = judged.ranking
    difference_P, won_P = teacher_P - student_P, teacher_P > student_P
    metrics = {
        "pairs": float(count),
        "d_loss": float(judged.loss.detach()),
        "ranking_loss": float(ranking.ranking),
        "score_reg": float(judged.score_reg),
        "temperature": judged.temperature,
        "d_acc": float(won_P.double().mean()),
        "d_acc_soft": float(judged.soft_accuracy),
        "score_diff": float(difference_P.mean()),
        "score_diff_normalized": float((difference_P / (ranking.batch_std + EPSILON)).mean()),
        "raw_score_diff": float(scores.raw_difference_P.detach().mean()),
        "batch_mean": float(ranking.batch_mean),
        "batch_std": float(ranking.batch_std),
        **_spread("teacher_score", teacher_P),
        **_spread("student_score", student_P),
        "identical_pairs": float(pairs.identical_P.sum()),
    }
    if pairs.identical_P.any():
        metrics["identical_gap"] = float(difference_P[pairs.identical_P].abs().mean())
    if not pairs.identical_P.all():
        metrics["teacher_wins"] = float(won_P[~pairs.identical_P].double().mean())
    lengths_2P = torch.cat([pairs.lengths_N[pairs.teacher_P], pairs.lengths_N[pairs.student_P]])
    together = correlation(torch.cat([teacher_P, student_P]), lengths_2P)
    if together is not None:
        metrics["score_length_corr"] = together
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def _spread(name: str, score_P: torch.Tensor) -> dict[str, float]:
    """The population's std."""
    return {
        f"{name}_mean": float(score_P.mean()),
        f"{name}_std": float(score_P.std(correction=0)),
        f"{name}_min": float(score_P.min()),
        f"{name}_max": float(score_P.max()),
    }


def correlation(x: torch.Tensor, y: torch.Tensor) -> float | None:
    """Pearson's; None with a constant."""
    x, y = x - x.mean(), y - y.mean()
    spread = float(x.square().sum() * y.square().sum())
    return float((x * y).sum()) / math.sqrt(spread) if spread > 0 else None
