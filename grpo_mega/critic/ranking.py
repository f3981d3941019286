"""The ranking loss of a step's pairs, with all options of the recipe.

Everything here is computed from raw_N, one number of each sequence of the step, which every rank has: in
float64, on all ranks alike, without a collective.

# N distinct sequences of the step, P pairs of the step
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from grpo_mega.critic.health import Remedies
from grpo_mega.critic.pairs import PairBatch
from grpo_mega.critic.scores import mixed
from grpo_mega.kernels.discriminator import RankingOptions, RankingOutput, discriminator_loss
from grpo_mega.recipe.critic_block import AdaptiveRule, CriticBlock, ScoreReg


@dataclass(frozen=True, slots=True)
class PairScores:
    """The scores of a step's pairs, as loss, metrics and reward all see them.

    Example: raw_N = 10, 2 of 5 and 4 tokens, one pair, length_mix -> score_N = 7.6, 1.55; teacher_P = 7.6
    """

    raw_N: torch.Tensor  # float64, of the value head
    score_N: torch.Tensor  # the same, or the length mix of it
    teacher_P: torch.Tensor
    student_P: torch.Tensor
    raw_difference_P: torch.Tensor  # before the length mix


@dataclass(frozen=True, slots=True)
class DiscriminatorState:
    """What a resumed run must know: d of the adaptive temperature, null before the first update."""

    difference: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> DiscriminatorState:
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Judgement:
    """The loss of a step's pairs, before any weight moves."""

    loss: torch.Tensor  # float64, with a graph to raw_N where that was asked for
    ranking: RankingOutput
    score_reg: torch.Tensor
    soft_accuracy: torch.Tensor  # mean sigmoid((d - margin) / tau): the probability given to the teachers
    temperature: float
    state: DiscriminatorState  # after this batch


def pair_scores(raw_N: torch.Tensor, pairs: PairBatch, *, length_mix: bool) -> PairScores:
    score_N = mixed(raw_N, pairs.lengths_N) if length_mix else raw_N
    return PairScores(
        raw_N=raw_N,
        score_N=score_N,
        teacher_P=score_N[pairs.teacher_P],
        student_P=score_N[pairs.student_P],
        raw_difference_P=raw_N[pairs.teacher_P] - raw_N[pairs.student_P],
    )


def judge(
    scores: PairScores,
    block: CriticBlock,
    state: DiscriminatorState,
    remedies: Remedies | None = None,
) -> Judgement:
    """ranking_weight * mean softplus(-(d - margin) / tau) + score_reg + gap_penalty * mean relu(d - gap_max)

    d = T - S, divided by the std of all scores under batch norm; tau from the recipe, the differences of this
    batch or their moving average, or a remedy, which wins.
    """
    remedies = remedies or Remedies()
    batch_norm = block.batch_norm if remedies.batch_norm is None else remedies.batch_norm
    fixed = RankingOptions(
        temperature=block.temperature,
        margin=block.margin,
        batch_norm=batch_norm,
        regularisation_weight=0.0,  # of ranges of either side: below
        label_smoothing=block.label_smoothing,
        ranking_weight=block.ranking_weight,
        gap_penalty=block.gap_penalty,
        gap_max=block.gap_max,
    )
    temperature, after = block.temperature, state
    if block.adaptive_temperature != "off":
        with torch.no_grad():
            difference_P = discriminator_loss(scores.teacher_P, scores.student_P, fixed).difference_P
        temperature, after = _adapted(difference_P, block, state)
    if remedies.temperature is not None:
        temperature = remedies.temperature
    ranking = discriminator_loss(scores.teacher_P, scores.student_P, replace(fixed, temperature=temperature))
    regularisation = score_regularisation(scores.teacher_P, scores.student_P, block.score_reg)
    logit_P = (ranking.difference_P - block.margin) / temperature
    return Judgement(
        loss=ranking.loss + regularisation,
        ranking=ranking,
        score_reg=regularisation.detach(),
        soft_accuracy=logit_P.sigmoid().mean(),
        temperature=temperature,
        state=after,
    )


def _adapted(
    difference_P: torch.Tensor, block: CriticBlock, state: DiscriminatorState
) -> tuple[float, DiscriminatorState]:
    """tau and the new d; no pairs change nothing."""
    rule, before = block.adaptive, state.difference
    if difference_P.numel():
        size = float(difference_P.abs().mean())
        if block.adaptive_temperature == "ema" and before is not None:
            size = rule.decay * before + (1 - rule.decay) * size
        state = DiscriminatorState(size)
    if state.difference is None:
        return block.temperature, state
    return adaptive_temperature(state.difference, rule), state


def adaptive_temperature(difference: float, rule: AdaptiveRule) -> float:
    """clamp(offset + slope * d, low, high). Example: d = 5, the defaults -> 1 + .6 * 5 = 4"""
    return min(max(rule.offset + rule.slope * difference, rule.low), rule.high)


def score_regularisation(teacher_P: torch.Tensor, student_P: torch.Tensor, block: ScoreReg) -> torch.Tensor:
    """weight * (mean relu(low - T)^2 + relu(T - high)^2, and the same of S); +-threshold without a range, and
    then relu(|T| - threshold)^2."""
    total = teacher_P.new_zeros(())
    for score_P, bounds in ((teacher_P, block.range.teacher), (student_P, block.range.student)):
        low, high = bounds if bounds is not None else (-block.threshold, block.threshold)
        beyond_P = (low - score_P).relu().square() + (score_P - high).relu().square()
        total = total + beyond_P.sum() / max(1, score_P.numel())
    return block.weight * total
