"""What a policy step begins with: samples of its prompts, what they earn, how much better than each other.

The rank that sampled a group scores it: a group never leaves its rank before its advantage is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from grpo_mega.algo.advantage import StepMoments, group_advantages, normalised
from grpo_mega.data.stream import PromptStream
from grpo_mega.engine.device import device
from grpo_mega.errors import UserError
from grpo_mega.monitor import histogram
from grpo_mega.monitor.metrics import Metric, max_of, mean_of, min_of, reduce
from grpo_mega.parts import Parts
from grpo_mega.recipe.blocks import AdvantageBlock
from grpo_mega.recipe.rollout_block import Truncated
from grpo_mega.reward.report import reward_report
from grpo_mega.rollout.replay import KeptRollouts, Origin
from grpo_mega.types import Group, Score, ScoredGroup, TrainSequence

TEMPORARY = "temp_seq_"
"""How sequences are named whose samples came without a uid."""


@dataclass(frozen=True, slots=True)
class Rollouts:
    """This rank's groups of a step, and their places in the step's batch of prompts."""

    origin: Origin
    places: list[int]
    groups: list[Group]
    scores: list[tuple[Score, ...]] | None = None  # where they are known: of a replay

    @property
    def orders(self) -> list[int]:
        """Of every sample, in the groups' order: its place in the step, the same on any layout."""
        return [
            place * len(group.samples) + sample.rollout_index
            for place, group in zip(self.places, self.groups, strict=True)
            for sample in group.samples
        ]


def sample_groups(
    parts: Parts, prompts: PromptStream, stage_index: int, step: int, group_size: int
) -> Rollouts:
    """The step's prompts, dealt to ranks, each answered `group_size` times by the current policy; or what an
    earlier run kept of that."""
    recipe = parts.recipe
    origin = Origin(recipe.seed, stage_index, step, recipe.rollout.prompts_per_step, group_size)
    batch = prompts.prompts_for_step(step, origin.prompts_per_step)
    if parts.replay is not None:
        kept = parts.replay.read(origin, batch, parts.layout.rank, parts.layout.world_size)
        return Rollouts(origin, kept.places, kept.groups, kept.scores)
    share = parts.sampler.share(batch, parts.layout.rank, parts.layout.world_size)
    groups = parts.sampler.generate(
        [prompt for _, prompt in share],
        group_size,
        parts.inputs.sampling,
        parts.inputs.stage_seed(stage_index),
    )
    return Rollouts(origin, [place for place, _ in share], groups)


def score_groups(parts: Parts, rollouts: Rollouts) -> list[tuple[Score, ...]]:
    """What every sample of this rank earns, without a critic's score."""
    if rollouts.scores is not None:
        return rollouts.scores
    return parts.inputs.rewards.score_groups(rollouts.groups)


def keep(parts: Parts, rollouts: Rollouts, scores: list[tuple[Score, ...]] | None) -> None:
    """Write the step's samples where the run was told to keep them. A collective."""
    if parts.dump is not None:
        parts.dump.write(rollouts.origin, KeptRollouts(rollouts.places, rollouts.groups, scores))


def counted_and_trained(group: Group, truncated: Truncated) -> tuple[np.ndarray, np.ndarray]:
    """Of each sample: whether it counts in the group's mean, and whether it is trained on. A sample left
    alone has nothing to be compared with."""
    everything = np.ones(len(group.samples), bool)
    if truncated == "keep":
        return everything, everything
    whole = np.array([sample.finish_reason != "length" for sample in group.samples])
    if truncated == "mask":
        return everything, whole
    return (whole, whole) if whole.sum() > 1 else (~everything, ~everything)


def weighed(
    parts: Parts,
    rollouts: Rollouts,
    scores: Sequence[tuple[Score, ...]],
    histograms: dict[str, list[float]],
    sampled: Sequence[ScoredGroup] | None = None,
) -> tuple[list[TrainSequence], dict[str, float]]:
    """Sequences with their advantages, and what is reported of samples and scores: of all that were
    `sampled`, where those are others."""
    truncated = parts.recipe.rollout.truncated
    chosen = [counted_and_trained(group, truncated) for group in rollouts.groups]
    if truncated != "keep":
        _require_some(sum(int(trained.sum()) for _, trained in chosen))
    advantages = step_advantages(scores, [counted for counted, _ in chosen], parts.recipe.advantage)
    sequences = to_train_sequences(rollouts, scores, advantages, [trained for _, trained in chosen])
    if unnamed := sum(sequence.uid.startswith(TEMPORARY) for sequence in sequences):
        parts.warn_of_missing_uids(unnamed)
    if sampled is None:
        return sequences, _reported(parts, rollouts.groups, scores, histograms)
    groups, earned = [scored.group for scored in sampled], [scored.scores for scored in sampled]
    return sequences, _reported(parts, groups, earned, histograms)


def _reported(
    parts: Parts,
    groups: Sequence[Group],
    scores: Sequence[tuple[Score, ...]],
    histograms: dict[str, list[float]],
) -> dict[str, float]:
    rewards, metrics = parts.inputs.rewards, rollout_metrics(groups, scores)
    lengths_N = _numbers([len(sample.response_ids) for group in groups for sample in group.samples])
    flat = [score for group in scores for score in group]
    metrics |= reward_report(flat, lengths_N, rewards.weights, rewards.formats)
    reported = reduce(metrics, dist.group.WORLD, histograms)
    _add_reward_std(reported)
    return reported | component_means(scores, rewards.weights)


def _require_some(trained: int) -> None:
    everywhere = torch.tensor(trained, device=device())
    dist.all_reduce(everywhere)
    if not everywhere.item():
        raise UserError(
            "no sample of this step is left to train on: they were cut at max_new_tokens",
            where="rollout.truncated",
            law="drop and mask train on samples that ended by themselves",
            remedy="raise rollout.max_new_tokens, or set rollout.truncated to keep",
        )


def step_advantages(
    scores: Sequence[tuple[Score, ...]], counted: Sequence[np.ndarray], block: AdvantageBlock
) -> list[np.ndarray]:
    """Of every sample of this rank's groups, 0 where it does not count; one estimator looks at all samples of
    the step, on all ranks."""
    totals = [np.array([score.total for score in group], np.float64) for group in scores]
    advantages = [np.zeros_like(values) for values in totals]
    for values, all_G, counts_G in zip(advantages, totals, counted, strict=True):
        if counts_G.any():
            values[counts_G] = group_advantages(all_G[counts_G], block)
    if block.estimator != "reinforce_plus_plus":
        return advantages
    mine = StepMoments.of(np.concatenate([np.empty(0), *map(np.extract, counted, advantages)]))
    sums = torch.tensor([mine.count, mine.total, mine.squares], dtype=torch.float64, device=device())
    dist.all_reduce(sums)
    moments = StepMoments(*sums.tolist())
    for values, counts_G in zip(advantages, counted, strict=True):
        values[counts_G] = normalised(values[counts_G], moments, block)
    return advantages


def to_train_sequences(
    rollouts: Rollouts,
    scores: Sequence[tuple[Score, ...]],
    advantages: Sequence[np.ndarray],
    trained: Sequence[np.ndarray],
) -> list[TrainSequence]:
    """The samples that are trained on, with what they earned, and their advantages."""
    rewards = [score.total for group in scores for score in group]
    pairs = [(group.prompt, sample) for group in rollouts.groups for sample in group.samples]
    values = np.concatenate([np.empty(0), *advantages]).astype(np.float32)
    wanted = np.concatenate([np.empty(0, bool), *trained])
    return [
        TrainSequence(
            order=order,
            reward=reward,
            uid=sample.uid or f"{TEMPORARY}{order}",
            token_ids=np.array([*prompt.token_ids, *sample.response_ids], np.int64),
            prompt_length=len(prompt.token_ids),
            sampler_logprobs=np.array(sample.sampler_logprobs, np.float32),
            advantage=float(value),
            trained=None if sample.chosen is None else np.array(sample.chosen, bool),
        )
        for order, (prompt, sample), value, reward, is_wanted in zip(
            rollouts.orders, pairs, values, rewards, wanted, strict=True
        )
        if is_wanted
    ]


def rollout_metrics(groups: Sequence[Group], scores: Sequence[tuple[Score, ...]]) -> dict[str, Metric]:
    """Of this rank's samples; every rank brings the same names, also one without any."""
    samples = [sample for group in groups for sample in group.samples]
    totals = _numbers([score.total for group in scores for score in group])
    lengths = _numbers([len(sample.response_ids) for sample in samples])
    truncated = _numbers([sample.finish_reason == "length" for sample in samples])
    # of a group of one nothing can be said
    flat = _numbers([len({score.total for score in group}) == 1 for group in scores if len(group) > 1])
    rates = _numbers([score.pass_rate for group in scores for score in group])
    every, each_group = torch.ones_like(totals, dtype=torch.bool), torch.ones_like(flat, dtype=torch.bool)
    return {
        "reward/mean": mean_of(totals, every),
        "reward/mean_square": mean_of(totals.square(), every),
        "reward/min": min_of(totals, every),
        "reward/max": max_of(totals, every),
        "reward/distribution": Metric(histogram.counts(totals, every), every.sum(), "histogram"),
        "reward/pass_rate": mean_of(rates, ~rates.isnan()),
        "group/zero_std_fraction": mean_of(flat, each_group),
        "rollout/response_length": mean_of(lengths, every),
        "rollout/response_length_max": max_of(lengths, every),
        "rollout/truncated_fraction": mean_of(truncated, every),
    }


def component_means(scores: Sequence[tuple[Score, ...]], weights: Mapping[str, float]) -> dict[str, float]:
    """Each reward's own mean over the samples of all ranks, as it is and as it counts; its parts as they
    are."""
    sums: dict[str, tuple[float, int]] = {}
    for group in scores:
        for score in group:
            for name, value in score.components.items():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = (total + value, count + 1)
    gathered: list[dict[str, tuple[float, int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, sums)
    means: dict[str, float] = {}
    for name in sorted({name for part in gathered for name in part}):
        found = [part[name] for part in gathered if name in part]
        means[f"reward/raw/{name}"] = sum(total for total, _ in found) / sum(count for _, count in found)
        if name in weights:
            means[f"reward/weighted/{name}"] = weights[name] * means[f"reward/raw/{name}"]
    return means


def _numbers(values: Sequence[float | bool]) -> torch.Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64, device=device())


def _add_reward_std(metrics: dict[str, float]) -> None:
    if "reward/mean_square" not in metrics:  # spare groups were enough: nothing was sampled
        return
    square = metrics.pop("reward/mean_square")
    metrics["reward/std"] = math.sqrt(max(0.0, square - metrics["reward/mean"] ** 2))
