"""The loop: stages, steps, evaluations, checkpoints. What a step does stands in `steps`."""

from __future__ import annotations

from dataclasses import replace

from grpo_mega.engine.checkpoint import (
    RunState,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    read_state,
    save_checkpoint,
    save_weights,
)
from grpo_mega.engine.optimizer import RateSchedule
from grpo_mega.engine.parallel import shutdown
from grpo_mega.engine.policy import Weights
from grpo_mega.monitor.jsonl import EventsWriter, MetricsWriter
from grpo_mega.monitor.report import draw_curves
from grpo_mega.parts import Parts, build
from grpo_mega.recipe.blocks import Stage
from grpo_mega.recipe.schema import Recipe
from grpo_mega.steps import grpo_step, sft_step
from grpo_mega.types import StepReport


def run(recipe: Recipe, *, resume: bool = False, quiet: bool = False) -> None:
    """Train as the recipe says, on every rank. Leaves metrics, checkpoints, a Hugging Face model and curves
    in run.dir."""
    parts = build(recipe, quiet=quiet, fresh=not resume)
    with parts.console.phase("checking the kernels"):
        checked = parts.check_kernels()
    for line in checked:
        parts.console.say(line)
    Trainer(parts, resume=resume).run()
    with parts.console.phase("exporting to Hugging Face format"):
        parts.export(recipe.run.dir / "hf")
    if parts.is_lead:
        draw_curves(recipe.run.dir)
    parts.console.say(f"done: {recipe.run.dir}")
    shutdown()


class Trainer:
    """Where a run stands and how it goes on. Its only state is `RunState`: all else follows from recipe and
    weights."""

    def __init__(self, parts: Parts, *, resume: bool):
        self.parts, self.recipe = parts, parts.recipe
        self.checkpoints = parts.run_dir / "checkpoints"
        self.state = RunState(step=0, stage_index=0, stage_step=0)
        self.reference: Weights | None = None  # of the KL penalty: the policy as its first GRPO stage began
        self.events = EventsWriter(parts.run_dir) if parts.is_lead else None
        if resume:
            self._resume()
        # a checkpoint is written after its step's evaluation: a resumed run does not repeat that
        self.evaluated_at = self.state.step if resume else -1
        self.writer = MetricsWriter(parts.run_dir, self.state.step + resume) if parts.is_lead else None

    def _resume(self) -> None:
        directory = find_checkpoint(self.checkpoints)
        with self.parts.console.phase(f"loading {directory.name}"):
            reference = self.checkpoints / "reference"
            if reference.is_dir() and self._past_first_grpo_step(read_state(directory)):
                load_weights(self.parts.engine, reference)
                self.reference = self._frozen_weights()
            self.state = load_checkpoint(self.parts.engine, directory)
        self.parts.console.say(f"resumed after step {self.state.step}")
        self._event("resume", f"from {directory.name}")

    def _past_first_grpo_step(self, state: RunState) -> bool:
        first = next((i for i, stage in enumerate(self.recipe.stages) if stage.grpo), len(self.recipe.stages))
        return state.stage_index > first or (state.stage_index == first and state.stage_step > 0)

    def _frozen_weights(self) -> Weights:
        return self.parts.engine.copy_weights(on_host=self.recipe.loss.kl.reference_on == "host")

    def run(self) -> None:
        stages = self.recipe.stages
        self.parts.sync_weights()
        if self.recipe.eval.at_start and self.state.step == 0:
            self._evaluate(stages[0].kind)
        for index in range(self.state.stage_index, len(stages)):
            if index > self.state.stage_index:
                self.state = replace(self.state, stage_index=index, stage_step=0)
            self._run_stage(stages[index])

    def _run_stage(self, stage: Stage) -> None:
        total = steps_of(self.recipe, stage)
        rate = rate_of(self.recipe, stage)
        prompts = self.parts.inputs.train_prompts(self.state.stage_index)
        self._event("stage", f"{stage.kind}, {total} steps")
        if stage.grpo and self.recipe.loss.kl.coef and self.reference is None:
            self.reference = self._frozen_weights()
            save_weights(self.parts.engine, self.checkpoints / "reference")
        with self.parts.console.stage(stage.kind, total, self.state.stage_step):
            for step in range(self.state.stage_step, total):
                lr = rate.at(step)
                if stage.sft:
                    metrics = sft_step(self.parts, prompts, stage.sft, step, lr)
                else:
                    metrics = grpo_step(self.parts, prompts, self.state.stage_index, step, lr, self.reference)
                self.state = replace(self.state, step=self.state.step + 1, stage_step=step + 1)
                self._report(stage.kind, metrics)
                self._evaluate_if_due(stage, last=step + 1 == total)
                if step + 1 == total or self._checkpoint_is_due():
                    self._save()

    def _report(self, kind: str, metrics: dict[str, float]) -> None:
        report = StepReport(self.state.step, kind, metrics)
        self.parts.console.step(report)
        if kind == "grpo":
            for line in self.parts.policy_loss.step_lines(metrics):
                self.parts.console.detail(line)
        if self.writer:
            self.writer.write(report, self.state.stage_step)

    def _evaluate_if_due(self, stage: Stage, *, last: bool) -> None:
        every = self.recipe.eval.every
        if last or (every and self.state.stage_step % every == 0):
            if stage.sft:  # policy steps leave the sampler in step; supervised ones do not need one
                self.parts.sync_weights()
            self._evaluate(stage.kind)

    def _evaluate(self, kind: str) -> None:
        if self.evaluated_at == self.state.step or not self.parts.inputs.evaluates:
            return
        self.evaluated_at = self.state.step
        with self.parts.console.phase("evaluating"):
            report = StepReport(self.state.step, kind, self.parts.evaluate())
        self.parts.console.evaluation(report)
        if self.writer:
            self.writer.write(report, self.state.stage_step)

    def _checkpoint_is_due(self) -> bool:
        every = self.recipe.checkpoint.every
        return every > 0 and self.state.stage_step % every == 0

    def _save(self) -> None:
        with self.parts.console.phase("saving a checkpoint"):
            keep = self.recipe.checkpoint.keep
            path = save_checkpoint(self.parts.engine, self.checkpoints, self.state, keep)
        self._event("checkpoint", path.name)

    def _event(self, kind: str, message: str) -> None:
        if self.events:
            self.events.write(kind, self.state.step, message)


def steps_of(recipe: Recipe, stage: Stage) -> int:
    cap = recipe.train.steps
    return stage.body.steps if cap is None else min(stage.body.steps, cap)


def rate_of(recipe: Recipe, stage: Stage) -> RateSchedule:
    """The stage's own numbers where it has some, else those of `train`."""
    train, body = recipe.train, stage.body
    peak = body.lr if body.lr is not None else train.lr
    return RateSchedule(
        peak=peak,
        warmup_steps=body.warmup_steps if body.warmup_steps is not None else train.warmup_steps,
        total_steps=steps_of(recipe, stage),
        kind=body.schedule or train.schedule,
        minimum=peak * train.min_lr_ratio,
    )
