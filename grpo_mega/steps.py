"""One step of each kind of stage, as the papers write it, and the metrics around it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist

from grpo_mega.algo.advantage import group_advantages
from grpo_mega.algo.objective import Denominators
from grpo_mega.batching import distribute
from grpo_mega.data.stream import PromptStream
from grpo_mega.engine.device import device
from grpo_mega.engine.policy import LossFunction, LossTerms, TokenOutputs, Weights
from grpo_mega.monitor.metrics import Metric, max_of, mean_of, min_of, reduce
from grpo_mega.parts import Parts
from grpo_mega.recipe.blocks import AdvantageBlock, SftStage
from grpo_mega.types import Group, PackedBatch, Score, TrainSequence


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
        sequences = [
            _supervised(order, batch[order].token_ids, prompts.teacher_tokens(batch[order])) for order in mine
        ]
        batches, counts = distribute(sequences, parts.layout, parts.recipe.train.micro_batch_tokens)
    with watch.phase("train"):
        metrics, update = parts.engine.train_step(batches, _likelihood_loss(counts), lr)
    reported = parts.engine.reduce_metrics(metrics)
    return {
        **reported,
        **_update_metrics(update.applied, update.grad_norm, lr),
        **watch.metrics(counts.tokens),
    }


def _supervised(order: int, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> TrainSequence:
    tokens = np.array([*prompt_ids, *response_ids], np.int64)
    return TrainSequence(order, tokens, len(prompt_ids), np.empty(0, np.float32))


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


def grpo_step(
    parts: Parts, prompts: PromptStream, stage_index: int, step: int, lr: float, reference: Weights | None
) -> dict[str, float]:
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
        sequences = to_train_sequences(places, groups, scores, recipe.advantage)
        reported = reduce(rollout_metrics(groups, scores), dist.group.WORLD)
        _add_reward_std(reported)
    tokens = 0.0
    samples = recipe.rollout.prompts_per_step * recipe.rollout.group_size
    per_update = samples // recipe.train.updates_per_batch  # whole groups: a law of the recipe
    for first in range(0, samples, per_update):
        with watch.phase("train"):
            chosen = [s for s in sequences if first <= s.order < first + per_update]
            trained, counts = policy_update(parts, chosen, lr, reference)
        reported |= trained  # of several updates the last one is reported
        tokens += counts.tokens
    with watch.phase("sync"):
        parts.sync_weights()
    return {**reported, **watch.metrics(tokens)}


def policy_update(
    parts: Parts, sequences: Sequence[TrainSequence], lr: float, reference: Weights | None
) -> tuple[dict[str, float], Denominators]:
    """One optimizer step on these sequences (each rank brings its own)."""
    batches, counts = distribute(sequences, parts.layout, parts.recipe.train.micro_batch_tokens)
    temperature = parts.recipe.rollout.temperature
    if reference is not None:
        with parts.engine.using(reference):
            reference_logprobs = parts.engine.logprobs(batches, temperature)
        if reference_logprobs:  # the last pipeline stage, the only one that computes losses
            batches = [
                replace(batch, reference_logprobs_T=logprobs_T)
                for batch, logprobs_T in zip(batches, reference_logprobs, strict=True)
            ]

    def loss(outputs: TokenOutputs, batch: PackedBatch) -> LossTerms:
        output = parts.policy_loss(
            outputs.logprobs_T,
            batch.sampler_logprobs_T,
            batch.advantages_B,
            batch.cu_seqlens,
            reference_logprobs_T=batch.reference_logprobs_T,
            entropy_T=outputs.entropy_T,
            response_mask_T=batch.response_mask_T,
            denominators=counts,
        )
        return LossTerms(output.loss, output.metrics)

    metrics, update = parts.engine.train_step(batches, loss, lr, temperature)
    reported = parts.engine.reduce_metrics(metrics)
    return reported | _update_metrics(update.applied, update.grad_norm, lr), counts


def _update_metrics(applied: bool, grad_norm: float, lr: float) -> dict[str, float]:
    return {"actor/grad_norm": grad_norm, "actor/lr": lr, "actor/update_skipped": float(not applied)}


def to_train_sequences(
    places: Sequence[int],
    groups: Sequence[Group],
    scores: Sequence[tuple[Score, ...]],
    advantage: AdvantageBlock,
) -> list[TrainSequence]:
    """Samples with their advantages; `places` are the groups' positions in the step's batch."""
    sequences = []
    for place, group, group_scores in zip(places, groups, scores, strict=True):
        advantages_G = group_advantages([score.total for score in group_scores], advantage)
        for sample, value in zip(group.samples, advantages_G, strict=True):
            sequences.append(
                TrainSequence(
                    order=place * len(group.samples) + sample.rollout_index,
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
        "reward/pass_rate": mean_of(rates, ~rates.isnan()),
        "group/zero_std_fraction": mean_of(flat, each_group),
        "rollout/response_length": mean_of(lengths, every),
        "rollout/response_length_max": max_of(lengths, every),
        "rollout/truncated_fraction": mean_of(truncated, every),
    }


def _numbers(values: Sequence[float | bool]) -> torch.Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64, device=device())


def _add_reward_std(metrics: dict[str, float]) -> None:
    square = metrics.pop("reward/mean_square")
    metrics["reward/std"] = math.sqrt(max(0.0, square - metrics["reward/mean"] ** 2))
