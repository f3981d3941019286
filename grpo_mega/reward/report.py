"""What is reported of the samples' rewards beside their sum: the rules on their form, the critic's score, and
whether the reward goes by length.

# N samples of this rank
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from grpo_mega.monitor.metrics import Metric, correlation_of, max_of, mean_of, min_of
from grpo_mega.reward.format import RULES
from grpo_mega.types import Score

CRITIC = "discriminator"


def reward_report(
    scores: Sequence[Score], lengths_N: torch.Tensor, weights: Mapping[str, float], formats: Sequence[str]
) -> dict[str, Metric]:
    """Of this rank's samples, `lengths_N` their tokens; every rank brings the same names, also one without
    any. `weights` are those of all rewards, `formats` the names of those that look at a response's form."""
    totals_N = lengths_N.new_tensor([score.total for score in scores], dtype=torch.float64)
    every_N = torch.ones_like(totals_N, dtype=torch.bool)
    metrics = {"reward/length_corr": correlation_of(totals_N, lengths_N, every_N)}
    for name in formats:
        metrics |= _format_metrics(name, scores, totals_N)
    if formats:
        form_N = torch.stack([weights[name] * _component(scores, name, totals_N) for name in formats]).sum(0)
        metrics["reward/format_contribution_mean"] = mean_of(form_N, every_N)
    if CRITIC in weights:
        given_N = _component(scores, CRITIC, totals_N)
        known_N = ~given_N.isnan()  # a stage before the adversarial one has no critic's score
        metrics |= {
            "reward/discriminator_mean": mean_of(given_N, known_N),
            "reward/discriminator_min": min_of(given_N, known_N),
            "reward/discriminator_max": max_of(given_N, known_N),
        }
    if formats or CRITIC in weights:
        metrics["reward/combined_mean"] = mean_of(totals_N, every_N)
    return metrics


def _format_metrics(name: str, scores: Sequence[Score], like: torch.Tensor) -> dict[str, Metric]:
    """format/*: a ratio is the share of samples a rule, or any penalty, applied to."""
    value_N = _component(scores, name, like)
    every_N = torch.ones_like(value_N, dtype=torch.bool)
    parts = {rule: _component(scores, f"{name}/{rule}", like) for rule in RULES}
    penalised_N = torch.zeros_like(every_N)
    for part_N in parts.values():
        penalised_N |= part_N < 0
    return {
        f"{name}/reward_avg": mean_of(value_N, every_N),
        f"{name}/reward_min": min_of(value_N, every_N),
        f"{name}/reward_max": max_of(value_N, every_N),
        f"{name}/penalty_ratio": mean_of(penalised_N.double(), every_N),
        **{
            f"{name}/{rule}_ratio": mean_of((part_N != 0).double(), every_N) for rule, part_N in parts.items()
        },
    }


def _component(scores: Sequence[Score], name: str, like: torch.Tensor) -> torch.Tensor:
    return like.new_tensor([score.components.get(name, math.nan) for score in scores])
