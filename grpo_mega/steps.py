"""One step of each kind of stage, as the papers write it, and the metrics around it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist

from grpo_mega.adversary import Adversary
from grpo_mega.algo.aggregate import Denominators
from grpo_mega.algo.objective import PolicyLoss
from grpo_mega.algo.segments import batch_segments
from grpo_mega.batching import distribute
from grpo_mega.collect import keep, sample_groups, weighed
from grpo_mega.data.stream import PromptStream
from grpo_mega.draw import Begun, StepSource, draw_step
from grpo_mega.drift import Suspect, drift_metrics, not_finite, probe
from grpo_mega.engine.device import device
from grpo_mega.engine.policy import LossFunction, LossTerms, TokenOutputs, Weights
from grpo_mega.monitor.metrics import mean_of
from grpo_mega.parts import Parts
from grpo_mega.recipe.stage_blocks import WarmupStage
from grpo_mega.rollout.scheduler import GroupScheduler
from grpo_mega.types import PackedBatch, Prompt, TrainSequence
from grpo_mega.value_critic import ValueCritic


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


def sft_step(parts: Parts, prompts: PromptStream, batch_size: int, step: int, lr: float) -> dict[str, float]:
    """Maximise the likelihood of the teacher's responses."""
    watch = Stopwatch()
    with watch.phase("data"):
        parts.rest_sampler()
        batch = prompts.prompts_for_step(step, batch_size)
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


def warmup_step(
    parts: Parts,
    prompts: PromptStream,
    stage: WarmupStage,
    stage_index: int,
    step: int,
    lr: float,
    adversary: Adversary,
) -> dict[str, float]:
    """The critic learns to tell the policy's answers from the teacher's; the policy stands still, or learns
    the teacher's answers to the same prompts."""
    watch = Stopwatch()
    with watch.phase("rollout"):
        rollouts = sample_groups(parts, prompts, stage_index, step, stage.samples)
        parts.rest_sampler()
        keep(parts, rollouts, None)
    with watch.phase("critic"):
        metrics = adversary.learn(adversary.judge(rollouts, prompts))
    if stage.student == "sft":
        with watch.phase("train"):
            supervised = sft_step(parts, prompts, parts.recipe.rollout.prompts_per_step, step, lr)
        with watch.phase("sync"):
            parts.sync_weights()
        metrics |= {name: value for name, value in supervised.items() if not name.startswith("perf/")}
    tokens = sum(len(sample.response_ids) for group in rollouts.groups for sample in group.samples)
    return {**metrics, **watch.metrics(tokens)}


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
    parts: Parts,
    prompts: PromptStream,
    stage_index: int,
    step: int,
    remaining: int,
    steering: Steering,
    scheduler: GroupScheduler[Begun],
    critic: Adversary | ValueCritic | None = None,
) -> PolicyStep:
    """Sample groups, score them against each other, move the policy, hand the sampler its weights. With an
    adversary its score is part of the reward, and it learns from the same samples afterwards. A value critic
    gives every token its advantage, and learns from the same micro-batches."""
    watch = Stopwatch()
    adversary = critic if isinstance(critic, Adversary) else None
    valuer = critic if isinstance(critic, ValueCritic) else None
    critic_only = critic is not None and step < critic.alone_for
    histograms: dict[str, list[float]] = {}
    drawn = draw_step(StepSource(parts, prompts, stage_index, watch.phase), step, remaining, scheduler)
    rollouts, given = drawn.rollouts, drawn.scores
    parts.rest_sampler()
    with watch.phase("reward"):
        judged = adversary.judge(rollouts, prompts) if adversary else None
        scores = adversary.rewarded(given, rollouts, judged) if adversary and judged else given
        sampled = None if adversary else drawn.sampled
        sequences, reported = weighed(parts, rollouts, scores, histograms, sampled)
        reported |= drawn.metrics
    if parts.dump is not None:
        with watch.phase("dump"):
            keep(parts, rollouts, given)
    updates: list[PolicyBatch] = []
    if valuer or not critic_only:
        with watch.phase("train"):
            updates = prepare_updates(parts, sequences, drawn.count, steering.reference)
    if valuer:
        with watch.phase("critic"):
            updates, valued = value_step(valuer, updates)
            reported |= valued
    moved = PolicyMove({}, [], None, 0.0)
    if not critic_only:
        moved = move_policy(parts, updates, steering, watch, histograms)
        with watch.phase("sync"):
            reported |= parts.sync_weights()
    if adversary and judged:
        with watch.phase("critic"):
            reported |= adversary.learn(judged)
    tokens = moved.tokens or float(sum(sequence.trained_length for sequence in sequences))
    metrics = {**reported, **moved.metrics, **watch.metrics(tokens)}
    return PolicyStep(metrics, moved.suspects, moved.skipped, histograms)


@dataclass(frozen=True, slots=True)
class PolicyMove:
    """What the updates of a step did."""

    metrics: dict[str, float]
    suspects: list[Suspect]
    skipped: PolicyBatch | None
    tokens: float  # trained on, over all ranks


def move_policy(
    parts: Parts,
    updates: Sequence[PolicyBatch],
    steering: Steering,
    watch: Stopwatch,
    histograms: dict[str, list[float]],
) -> PolicyMove:
    """The step's updates, and a look at what they did."""
    recipe = parts.recipe
    with watch.phase("train"):
        trained = [policy_update(parts, update, steering, histograms) for update in updates]
    # Of several updates the last one is reported; sampler and trainer had the same weights before the first.
    reported = trained[-1] | {k: v for k, v in trained[0].items() if k.startswith("mismatch/")}
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
    return PolicyMove(reported, suspects, skipped, sum(update.counts.tokens for update in updates))


@dataclass(frozen=True, slots=True)
class PolicyBatch:
    """The micro-batches of one optimizer step on this rank, with all that its loss reads."""

    batches: list[PackedBatch]
    counts: Denominators


def prepare_updates(
    parts: Parts, sequences: Sequence[TrainSequence], groups: int, reference: Weights | None
) -> list[PolicyBatch]:
    """Whole groups to each of the step's updates, and only updates for which some rank has a sequence. The
    step has so many `groups`, on all ranks."""
    recipe = parts.recipe
    per_update = -(-groups // recipe.train.updates_per_batch) * recipe.rollout.group_size
    firsts = range(0, groups * recipe.rollout.group_size, per_update)
    shares = [[s for s in sequences if first <= s.order < first + per_update] for first in firsts]
    counts = torch.tensor([len(share) for share in shares], device=device())
    dist.all_reduce(counts)
    wanted = zip(shares, counts.tolist(), strict=True)
    return [prepare_update(parts, share, reference) for share, count in wanted if count]


def value_step(
    critic: ValueCritic, updates: Sequence[PolicyBatch]
) -> tuple[list[PolicyBatch], dict[str, float]]:
    """The updates with their tokens' advantages; the critic, which had given them, has then learnt."""
    valued, assessed = critic.assess([update.batches for update in updates])
    learnt = critic.learn(valued, [update.counts for update in updates])
    given = zip(updates, valued, strict=True)
    return [replace(update, batches=found.batches) for update, found in given], assessed | learnt


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
            batch.advantages_B if batch.advantages_T is None else batch.advantages_T,
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
