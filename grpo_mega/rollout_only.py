"""`grpo-mega train --rollout-only`: what the initial policy samples and earns, kept for other runs."""

from __future__ import annotations

from grpo_mega.collect import keep, sample_groups, score_groups, weighed
from grpo_mega.engine.parallel import shutdown
from grpo_mega.journal import Journal
from grpo_mega.parts import Parts, build
from grpo_mega.recipe.schema import Recipe
from grpo_mega.recipe.stage_blocks import Stage
from grpo_mega.rollout_files import RolloutFiles
from grpo_mega.steps import Stopwatch
from grpo_mega.train import steps_of
from grpo_mega.types import StepReport


def run_rollouts(recipe: Recipe, files: RolloutFiles, *, quiet: bool = False) -> None:
    """Every step of every stage that samples, with the weights that the recipe starts from. On every rank.

    Steps have the numbers that they have in training.
    """
    parts = build(recipe, quiet=quiet, fresh=True, files=files)
    sample_stages(parts)
    parts.console.say(f"done: {files.dump}")
    shutdown()


def sample_stages(parts: Parts) -> None:
    journal = Journal(parts, resumed_from=None)
    try:
        parts.sync_weights()
        step = 0
        for index, stage in enumerate(parts.recipe.stages):
            if stage.samples_groups:
                _sample_stage(parts, journal, stage, index, step)
            else:
                journal.say(f"{stage.kind}: left out, nothing is trained")
            step += steps_of(parts.recipe, stage)
    finally:
        journal.close()


def _sample_stage(parts: Parts, journal: Journal, stage: Stage, index: int, before: int) -> None:
    total = steps_of(parts.recipe, stage)
    prompts = parts.inputs.train_prompts(index)
    with parts.console.stage(stage.kind, total, 0):
        for step in range(total):
            watch = Stopwatch()
            with watch.phase("rollout"):
                rollouts = sample_groups(parts, prompts, index, step, parts.recipe.rollout.group_size)
            with watch.phase("reward"):
                scores = score_groups(parts, rollouts)
                sequences, metrics = weighed(parts, rollouts, scores, {})
            with watch.phase("dump"):
                keep(parts, rollouts, scores)
            tokens = float(sum(sequence.trained_length for sequence in sequences))
            report = StepReport(before + step + 1, stage.kind, {**metrics, **watch.metrics(tokens)})
            journal.step(report, step + 1, [])
