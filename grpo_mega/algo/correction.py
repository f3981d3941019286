"""Train / inference mismatch: how far sampler and trainer disagree about the same weights, and what is done
about it.

# R rows, W tokens of a row
"""

from __future__ import annotations

import math

import torch

from grpo_mega.algo.rows import Rows
from grpo_mega.algo.traces import MomentsByName, Traces, correlation
from grpo_mega.monitor.metrics import Metric
from grpo_mega.recipe.blocks import CorrectionBlock

BOUND = 10.0
"""Of log-ratios inside exponentials that are only reported."""


def correction_weight(
    correction: CorrectionBlock, mismatch_RW: torch.Tensor, rows: Rows, traces: Traces
) -> torch.Tensor:
    """tis: min(e^x, cap); mis: e^x where floor <= e^x <= cap, else 0. x = trainer - sampler log-probability
    of the token, or summed over its sequence. A constant to the gradient.

    Example: x = ln 3 at cap 2 -> tis 2, mis 0
    """
    exponent_RW = mismatch_RW.detach()
    if correction.level == "sequence":
        # a sum of -80 rounded to float32 would already be off by 8e-6 in its exponential
        exponent_RW = rows.spread(rows.sum(exponent_RW.double())).expand_as(exponent_RW)
    above_RW = exponent_RW > math.log(correction.cap)
    capped_RW = exponent_RW.clamp(max=math.log(correction.cap)).exp()
    acted_RW = above_RW
    if correction.kind == "mis":
        if correction.floor:
            acted_RW = above_RW | (exponent_RW < math.log(correction.floor))
        capped_RW = capped_RW.where(~acted_RW, 0.0)
    capped_RW = capped_RW.to(mismatch_RW.dtype)
    traces.tokens("correction/weight", capped_RW, shift=1.0, spread=True)
    traces.tokens("correction/acted", acted_RW.float())
    return capped_RW


def correction_metrics(moments: MomentsByName) -> dict[str, Metric]:
    return {
        "correction/weight_mean": moments["correction/weight"].mean(),
        "correction/weight_std": moments["correction/weight"].std(),
        "correction/acted_fraction": moments["correction/acted"].mean(),
    }


def trace_mismatch(trainer_RW: torch.Tensor, sampler_RW: torch.Tensor, traces: Traces) -> None:
    """The trainer's log-probabilities under the weights that sampled against the sampler's own."""
    delta_RW = (trainer_RW - sampler_RW).detach()
    bounded_RW = delta_RW.clamp(-BOUND, BOUND)
    trainer_prob_RW, sampler_prob_RW = trainer_RW.detach().exp(), sampler_RW.exp()
    traces.tokens("mismatch/abs", delta_RW.abs(), extremes=True)
    traces.tokens("mismatch/k3", bounded_RW.expm1() - bounded_RW)
    traces.tokens("mismatch/trainer", trainer_prob_RW, spread=True)
    traces.tokens("mismatch/sampler", sampler_prob_RW, spread=True)
    # in float64: of a sure policy the products differ from 1 by less than float32 can say
    traces.tokens("mismatch/product", trainer_prob_RW.double() * sampler_prob_RW)


def mismatch_metrics(moments: MomentsByName) -> dict[str, Metric]:
    return {
        "mismatch/abs_mean": moments["mismatch/abs"].mean(),
        "mismatch/abs_max": moments["mismatch/abs"].max(),
        "mismatch/k3_kl": moments["mismatch/k3"].mean(),
        "mismatch/pearson": correlation(
            moments["mismatch/trainer"], moments["mismatch/sampler"], moments["mismatch/product"]
        ),
    }
