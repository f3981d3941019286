"""One step of each kind of stage, as the papers write it, and the metrics around it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist

from grpo_mega.algo.advantage import StepMoments, group_advantages, normalised
from grpo_mega.algo.aggregate import Denominators
from grpo_mega.algo.objective import PolicyLoss
from grpo_mega.algo.segments import batch_segments
from grpo_mega.batching import distribute
from grpo_mega.data.stream import PromptStream
from grpo_mega.drift import Suspect, drift_metrics, not_finite, probe
from grpo_mega.engine.device import device
from grpo_mega.engine.policy import LossFunction, LossTerms, TokenOutputs, Weights
from grpo_mega.monitor import histogram
from grpo_mega.monitor.metrics import Metric, max_of, mean_of, min_of, reduce
from grpo_mega.parts import Parts
from grpo_mega.recipe.blocks import AdvantageBlock, SftStage
from grpo_mega.types import Group, PackedBatch, Prompt, Score, TrainSequence

TEMPORARY = "temp_seq_"
"""How sequences are named whose samples came without a uid."""


@dataclass
class Stopwatch:
    """Seconds of each phase of one step, as `perf/<phase>_seconds`."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        key = f"perf/{name}_seconds"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - began

    def metrics(self, tokens: float) -> dict[str, float]:
        step = sum(self.seconds.values())
        return {**self.seconds, "perf/step_seconds": step, "perf/tokens_per_second": tokens / step}


def sft_step(parts: Parts, prompts: PromptStream, stage: SftStage, step: int, lr: float) -> dict[str, float]:
    """Maximise the likelihood of the teacher's responses."""
    watch = Stopwatch()
    with watch.phase("data"):
        batch = prompts.prompts_for_step(step, stage.batch_size)
        mine = range(parts.layout.rank, len(batch), parts.layout.world_size)
        sequences = [_supervised(order, batch[order], prompts.teacher_tokens(batch[order])) for order in mine]
        batches, counts = distribute(sequences, parts.layout, parts.recipe.train.micro_batch_tokens)
    with watch.phase("train"):
        metrics, update = parts.engine.train_step(batches, _likelihood_loss(counts), lr)
    reported = parts.engine.reduce_metrics(metrics)
    return {
        **reported,
        **_update_metrics(update.applied, update.grad_norm, lr),
        **watch.metrics(counts.tokens),
    }


def _supervised(order: int, prompt: Prompt, response_ids: Sequence[int]) -> TrainSequence:
    tokens = np.array([*prompt.token_ids, *response_ids], np.int64)
    return TrainSequence(order, prompt.uid, tokens, len(prompt.token_ids), np.empty(0, np.float32))


def _likelihood_loss(counts: Denominators) -> LossFunction:
    def loss(outputs: TokenOutputs, batch: PackedBatch) -> LossTerms:
        mask_T = batch.response_mask_T
        total = -outputs.logprobs_T.where(mask_T, 0.0).sum() / counts.tokens
        metrics = {
            "sft/loss": mean_of(-outputs.logprobs_T, mask_T),
            "sft/entropy": mean_of(outputs.entropy_T, mask_T),
        }
        return LossTerms(total, metrics)

    return loss


@dataclass(frozen=True, slots=True)
class Steering:
    """How a policy step is taken: what the recipe says, within what the guard allows."""

    lr: float
    policy_loss: PolicyLoss
    reference: Weights | None  # of the KL penalty; None: there is none


@dataclass(frozen=True, slots=True)
class PolicyStep:
    """What became of a policy step. `suspects` are this rank's tokens that moved furthest; `skipped` is the
    last update, where it was not applied."""

    metrics: dict[str, float]
    suspects: list[Suspect]
    skipped: PolicyBatch | None
    histograms: dict[str, list[float]]  # bin counts, see monitor.histogram


def grpo_step(
    parts: Parts, prompts: PromptStream, stage_index: int, step: int, steering: Steering
) -> PolicyStep:
    """Sample groups, score them against each other, move the policy, hand the sampler its weights."""
    recipe, layout, watch = parts.recipe, parts.layout, Stopwatch()
    with watch.phase("rollout"):
        batch = prompts.prompts_for_step(step, recipe.rollout.prompts_per_step)
        share = parts.sampler.share(batch, layout.rank, layout.world_size)
        groups = parts.sampler.generate(
            [prompt for _, prompt in share],
            recipe.rollout.group_size,
            parts.inputs.sampling,
            parts.inputs.stage_seed(stage_index),
        )
    with watch.phase("reward"):
        scores = parts.inputs.rewards.score_groups(groups)
        places = [place for place, _ in share]
        advantages = step_advantages(scores, recipe.advantage)
        sequences = to_train_sequences(places, groups, advantages)
        if unnamed := sum(sequence.uid.startswith(TEMPORARY) for sequence in sequences):
            parts.warn_of_missing_uids(unnamed)
        histograms: dict[str, list[float]] = {}
        reported = reduce(rollout_metrics(groups, scores), dist.group.WORLD, histograms)
        _add_reward_std(reported)
        reported |= component_means(scores, parts.inputs.rewards.weights)
    samples = recipe.rollout.prompts_per_step * recipe.rollout.group_size
    per_update = samples // recipe.train.updates_per_batch  # whole groups: a law of the recipe
    with watch.phase("train"):
        updates = [
            prepare_update(
                parts, [s for s in sequences if first <= s.order < first + per_update], steering.reference
            )
            for first in range(0, samples, per_update)
        ]
        trained = [policy_update(parts, update, steering, histograms) for update in updates]
    # Of several updates the last one is reported; sampler and trainer had the same weights before the first.
    reported |= trained[-1] | {k: v for k, v in trained[0].items() if k.startswith("mismatch/")}
    reported["actor/update_skipped"] = max(update["actor/update_skipped"] for update in trained)
    with watch.phase("probe"):
        guard, temperature = recipe.guard, recipe.rollout.temperature
        not_applied = [made["actor/update_skipped"] > 0 for made in trained]
        skipped = updates[not_applied.index(True)] if any(not_applied) else None
        if skipped:
            suspects = not_finite(parts.engine, skipped.batches, temperature)
        else:
            last = updates[-1].batches
            drift, suspects = probe(
                parts.engine, last, temperature, guard.probe_tokens, guard.level, histograms
            )
            reported |= drift
    with watch.phase("sync"):
        parts.sync_weights()
    tokens = sum(update.counts.tokens for update in updates)
    return PolicyStep({**reported, **watch.metrics(tokens)}, suspects, skipped, histograms)


@dataclass(frozen=True, slots=True)
class PolicyBatch:
    """The micro-batches of one optimizer step on this rank, with all that its loss reads."""

    batches: list[PackedBatch]
    counts: Denominators


def prepare_update(
    parts: Parts, sequences: Sequence[TrainSequence], reference: Weights | None
) -> PolicyBatch:
    """Bring the sequences to their ranks (each rank brings its own) and compute what does not change while
    the policy does."""
    engine, temperature = parts.engine, parts.recipe.rollout.temperature
    batches, counts = distribute(sequences, parts.layout, parts.recipe.train.micro_batch_tokens)
    if reference is not None:
        with engine.using(reference):
            logprobs = engine.logprobs(batches, temperature)
        batches = _with(batches, "reference_logprobs_T", logprobs)
    if parts.policy_loss.corrects and parts.recipe.train.updates_per_batch > 1:
        batches = _with(batches, "proximal_logprobs_T", engine.logprobs(batches, temperature))
    if parts.markers is not None:
        segments = [batch_segments(batch, parts.markers) for batch in batches]
        batches = _with(batches, "segments_T", segments)
    return PolicyBatch(batches, counts)


def _with(batches: list[PackedBatch], name: str, values: list[torch.Tensor]) -> list[PackedBatch]:
    """No values at all: a pipeline stage before the last, which computes no loss."""
    if not values:
        return batches
    return [replace(batch, **{name: value}) for batch, value in zip(batches, values, strict=True)]


def policy_update(
    parts: Parts, update: PolicyBatch, steering: Steering, histograms: dict[str, list[float]]
) -> dict[str, float]:
    """One optimizer step; the bin counts of what it measured go into `histograms`."""
    policy_loss, level = steering.policy_loss, parts.recipe.guard.level

    def loss(outputs: TokenOutputs, batch: PackedBatch) -> LossTerms:
        output = policy_loss(
            outputs.logprobs_T,
            batch.sampler_logprobs_T,
            batch.advantages_B,
            batch.cu_seqlens,
            reference_logprobs_T=batch.reference_logprobs_T,
            entropy_T=outputs.entropy_T,
            sq_prob_T=outputs.sq_prob_T,
            response_mask_T=batch.response_mask_T,
            denominators=update.counts,
            proximal_logprobs_T=batch.proximal_logprobs_T,
            segments_T=batch.segments_T,
            uids=batch.uids,
        )
        drift = drift_metrics(outputs.logprobs_T, batch, level)
        return LossTerms(output.loss, {**output.metrics, **drift})

    temperature = parts.recipe.rollout.temperature
    metrics, applied = parts.engine.train_step(update.batches, loss, steering.lr, temperature)
    reported = policy_loss.derived(parts.engine.reduce_metrics(metrics, histograms))
    return reported | _update_metrics(applied.applied, applied.grad_norm, steering.lr)


def _update_metrics(applied: bool, grad_norm: float, lr: float) -> dict[str, float]:
    return {"actor/grad_norm": grad_norm, "actor/lr": lr, "actor/update_skipped": float(not applied)}


def step_advantages(scores: Sequence[tuple[Score, ...]], block: AdvantageBlock) -> list[np.ndarray]:
    """Of every sample of this rank's groups; one estimator looks at all samples of the step, on all ranks."""
    advantages = [group_advantages([score.total for score in group], block) for group in scores]
    if block.estimator != "reinforce_plus_plus":
        return advantages
    mine = StepMoments.of(np.concatenate([np.empty(0), *advantages]))
    sums = torch.tensor([mine.count, mine.total, mine.squares], dtype=torch.float64, device=device())
    dist.all_reduce(sums)
    moments = StepMoments(*sums.tolist())
    return [normalised(values, moments, block) for values in advantages]


def to_train_sequences(
    places: Sequence[int], groups: Sequence[Group], advantages: Sequence[np.ndarray]
) -> list[TrainSequence]:
    """Samples with their advantages; `places` are the groups' positions in the step's batch."""
    sequences = []
    for place, group, advantages_G in zip(places, groups, advantages, strict=True):
        for sample, value in zip(group.samples, advantages_G, strict=True):
            order = place * len(group.samples) + sample.rollout_index
            sequences.append(
                TrainSequence(
                    order=order,
                    uid=sample.uid or f"{TEMPORARY}{order}",
                    token_ids=np.array([*group.prompt.token_ids, *sample.response_ids], np.int64),
                    prompt_length=len(group.prompt.token_ids),
                    sampler_logprobs=np.array(sample.sampler_logprobs, np.float32),
                    advantage=float(np.float32(value)),
                )
            )
    return sequences


def rollout_metrics(groups: Sequence[Group], scores: Sequence[tuple[Score, ...]]) -> dict[str, Metric]:
    """Of this rank's samples; every rank brings the same names, also one without any."""
    samples = [sample for group in groups for sample in group.samples]
    totals = _numbers([score.total for group in scores for score in group])
    lengths = _numbers([len(sample.response_ids) for sample in samples])
    truncated = _numbers([sample.finish_reason == "length" for sample in samples])
    flat = _numbers([len({score.total for score in group}) == 1 for group in scores])
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
    square = metrics.pop("reward/mean_square")
    metrics["reward/std"] = math.sqrt(max(0.0, square - metrics["reward/mean"] ** 2))
