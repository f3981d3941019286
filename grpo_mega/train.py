"""The loop: stages, steps, evaluations, checkpoints. What a step does stands in `steps`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from grpo_mega.adversary import Adversary
from grpo_mega.checkpoints import RunState, read_state
from grpo_mega.critic.engine import CriticEngine
from grpo_mega.curriculum import Curriculum, state_from_json
from grpo_mega.data.selection import Selection
from grpo_mega.data.stream import PromptStream
from grpo_mega.draw import Begun, states_of_ranks
from grpo_mega.engine.checkpoint import load_checkpoint, load_weights, sound_checkpoint
from grpo_mega.engine.optimizer import RateSchedule
from grpo_mega.engine.parallel import shutdown
from grpo_mega.engine.policy import Weights
from grpo_mega.engine.saver import Outcome, Saver
from grpo_mega.errors import UserError
from grpo_mega.inference_callback import PASS_RATE_METRIC, EvaluationHistory
from grpo_mega.journal import Journal
from grpo_mega.monitor.report import draw_curves
from grpo_mega.parts import NO_FILES, Parts, build
from grpo_mega.preemption import REQUEUE_EXIT_CODE, Preemption
from grpo_mega.recipe.schema import Recipe
from grpo_mega.recipe.stage_blocks import Stage
from grpo_mega.rollout.scheduler import GroupScheduler
from grpo_mega.rollout_files import RolloutFiles
from grpo_mega.steps import Steering, grpo_step, sft_step, warmup_step
from grpo_mega.types import StepReport
from grpo_mega.value_critic import ValueCritic
from grpo_mega.watch import Watch
from grpo_mega.watchdog import Watchdog

HISTOGRAM_EVERY = 10
"""Steps between histograms: a tracker draws hundreds of them as bands, and each is kilobytes."""


def run(recipe: Recipe, *, resume: bool = False, quiet: bool = False, files: RolloutFiles = NO_FILES) -> None:
    """Train as the recipe says, on every rank. Leaves metrics, checkpoints, a Hugging Face model and curves
    in run.dir."""
    stacks = recipe.run.dir / "logs" / "stacks"
    rank, world_size = int(os.environ["RANK"]), recipe.parallel.world_size
    watchdog = Watchdog(recipe.guard.hang_minutes, stacks, rank, world_size)
    watchdog.start()
    try:
        parts = _train(recipe, watchdog, files, resume=resume, quiet=quiet)
    finally:
        watchdog.stop()
    with parts.console.phase("exporting to Hugging Face format"):
        parts.export(recipe.run.dir / "hf")
    if parts.is_lead:
        draw_curves(recipe.run.dir)
    parts.console.say(f"done: {recipe.run.dir}")
    shutdown()


def _train(recipe: Recipe, watchdog: Watchdog, files: RolloutFiles, *, resume: bool, quiet: bool) -> Parts:
    parts = build(recipe, quiet=quiet, fresh=not resume, files=files)
    watchdog.tick()
    if files.replay is not None:
        parts.console.say(f"samples come from {files.replay}: nothing is sampled, and so nothing evaluated")
    with parts.console.phase("checking the kernels"):
        checked = parts.check_kernels()
    watchdog.tick()
    for line in checked:
        parts.console.say(line)
    trainer = Trainer(parts, watchdog, resume=resume)
    try:
        trainer.run()
    finally:
        trainer.journal.close()
    return parts


class Trainer:
    """Where a run stands and how it goes on. `state` and what guard, curriculum and evaluations remember make
    a checkpoint; all else follows from recipe and weights."""

    def __init__(self, parts: Parts, watchdog: Watchdog, *, resume: bool):
        self.parts, self.recipe = parts, parts.recipe
        self.checkpoints = parts.run_dir / "checkpoints"
        self.state = RunState(step=0, stage_index=0, stage_step=0)
        self.reference: Weights | None = None  # of the KL penalty: the policy as its first GRPO stage began
        self._opened: tuple[tuple[int, Selection | None], PromptStream] | None = None
        self.saver = Saver(
            parts.engine,
            self.checkpoints,
            keep=self.recipe.checkpoint.keep,
            keep_best=self.recipe.checkpoint.keep_best,
            background=self.recipe.checkpoint.background,
            companions=self._companions,
        )
        self.unsaved: Outcome | None = None  # the newest checkpoint, where it could not be written
        self.damage: list[str] = []  # checkpoints passed over
        if resume:
            self._load()
        remembered = self.state.parts
        self.journal = Journal(parts, resumed_from=self.state.step if resume else None)
        for text in self.damage:
            self.journal.event("damage", self.state.step, text)
        if resume:
            self.journal.event("resume", self.state.step, f"after step {self.state.step}")
        self.watch = Watch(parts, self.journal, remembered.get("guard"))
        self.critic = self._critic(remembered.get("critic"))
        self.watchdog = watchdog
        self.scheduler: GroupScheduler[Begun] = GroupScheduler(
            self.recipe.rollout, parts.layout.rank, parts.layout.world_size
        )
        self.in_band: int = remembered.get("in_band", 0)  # steps in a row that `until` has held
        self.evaluations = EvaluationHistory()
        if "evaluations" in remembered:
            self.evaluations = EvaluationHistory.from_json(remembered["evaluations"])
        self.curriculum: Curriculum | None = None
        if self.recipe.curriculum.kind == "staged":
            where = remembered.get("curriculum")
            self.curriculum = Curriculum(self.recipe.curriculum, state_from_json(where) if where else None)
        if "groups" in remembered and self.scheduler.is_dynamic:
            self.scheduler.restore(remembered["groups"], *self._drawn_from)

    def _critic(self, state: Mapping[str, Any] | None) -> Adversary | ValueCritic | None:
        engine = self.parts.critic
        if engine is None:
            return None
        if self.recipe.critic.kind == "value":
            return ValueCritic(self.parts, engine, state)
        return Adversary(self.parts, engine, self.journal.critic_verdict, state)

    @property
    def _companions(self) -> dict[str, CriticEngine]:
        return {} if self.parts.critic is None else {"critic": self.parts.critic}

    def _load(self) -> None:
        folder = sound_checkpoint(self.checkpoints, self._remember_damage)
        with self.parts.console.phase(f"loading {folder.name}"):
            reference = self.checkpoints / "reference"
            if reference.is_dir() and self._past_first_grpo_step(read_state(folder)):
                load_weights(self.parts.engine, reference)
                self.reference = self._frozen_weights()
            self.state = load_checkpoint(self.parts.engine, folder, self._companions)
        self.parts.console.say(f"resumed after step {self.state.step}")

    def _remember_damage(self, text: str) -> None:
        self.parts.console.say(text)
        self.damage.append(text)

    def _past_first_grpo_step(self, state: RunState) -> bool:
        stages = self.recipe.stages
        first = next((i for i, stage in enumerate(stages) if stage.samples_groups), len(stages))
        return state.stage_index > first or (state.stage_index == first and state.stage_step > 0)

    def _frozen_weights(self) -> Weights:
        return self.parts.engine.copy_weights(on_host=self.recipe.loss.kl.reference_on == "host")

    def run(self) -> None:
        stages = self.recipe.stages
        self.parts.sync_weights()
        if self.recipe.eval.at_start and self.state.step == 0:
            self._evaluate(stages[0].kind)
        with Preemption() as preemption:
            for index in range(self.state.stage_index, len(stages)):
                if index > self.state.stage_index:
                    self.state = replace(self.state, stage_index=index, stage_step=0)
                self._run_stage(stages[index], preemption)
            self._tell(self.saver.finish())
            self._require_saved()

    def _run_stage(self, stage: Stage, preemption: Preemption) -> None:
        total = steps_of(self.recipe, stage)
        rate = rate_of(self.recipe, stage)
        self.journal.event("stage", self.state.step, f"{stage.kind}, {total} steps")
        if stage.samples_groups and self._needs_reference and self.reference is None:
            self.reference = self._frozen_weights()
            self._tell(self.saver.save_weights(self.checkpoints / "reference"))
        if self.critic and self.critic.is_new and self._has_critic(stage):
            self.critic.start()
        with self.parts.console.stage(stage.kind, total, self.state.stage_step):
            for step in range(self.state.stage_step, total):
                metrics, lines = self._step(stage, step, rate.at(step))
                report = StepReport(self.state.step, stage.kind, metrics)
                self.journal.step(report, self.state.stage_step, lines)
                self.watchdog.tick()
                last = step + 1 == total or self._is_over(stage, metrics)
                if last:
                    self.scheduler.stop()
                self._evaluate_if_due(stage, last=last)
                if last:  # also before its time: a resumed run then goes on with the next stage
                    self.state = replace(self.state, stage_step=total)
                if last or self._checkpoint_is_due():
                    self._save()
                    self.watchdog.tick()
                self._tell(self.saver.poll())
                if signal := preemption.asked():
                    self._leave(signal)
                if last:
                    break

    def _has_critic(self, stage: Stage) -> bool:
        """Whether the critic learns in this stage: a value model in grpo, a discriminator in its own."""
        return stage.grpo is not None if isinstance(self.critic, ValueCritic) else stage.has_critic

    def _is_over(self, stage: Stage, metrics: Mapping[str, float]) -> bool:
        """Whether a metric has been where the stage wants it for long enough."""
        until = stage.body.until
        if until is None:
            return False
        self.in_band = self.in_band + 1 if until.holds(metrics.get(until.metric)) else 0
        if self.in_band < until.steps:
            return False
        self.in_band = 0
        self.journal.say(f"{stage.kind}: {until.metric} was in its band for {until.steps} steps: stage over")
        self.journal.event("stage over", self.state.step, until.metric)
        return True

    def _step(self, stage: Stage, step: int, lr: float) -> tuple[dict[str, float], list[str]]:
        """One step of the stage: what it measured, and lines for the log."""
        prompts = self._prompts()
        self.state = replace(self.state, step=self.state.step + 1, stage_step=step + 1)
        if stage.supervised:
            return sft_step(self.parts, prompts, stage.supervised.batch_size, step, lr), []
        if stage.warmup:
            assert isinstance(self.critic, Adversary), "a law of the recipe"
            index = self.state.stage_index
            return warmup_step(self.parts, prompts, stage.warmup, index, step, lr, self.critic), []
        caps = self.watch.caps
        policy_loss = self.parts.steered_loss(caps)
        steering = Steering(
            lr=lr if caps.lr is None else min(lr, caps.lr),
            policy_loss=policy_loss,
            reference=self.reference if policy_loss.config.kl.coef else None,
        )
        self.scheduler.turn_to(*self._drawn_from)
        remaining = steps_of(self.recipe, stage) - step - 1
        critic = self.critic if self._has_critic(stage) else None
        index = self.state.stage_index
        made = grpo_step(self.parts, prompts, index, step, remaining, steering, self.scheduler, critic)
        self._tell_of_missing_groups(made.metrics)
        watched = self.watch.look(self.state.step, made)
        if self.state.step % HISTOGRAM_EVERY == 0:
            self.journal.histograms(self.state.step, made.histograms)
        if self.curriculum:
            self.curriculum.after_step()
        return {**made.metrics, **watched}, policy_loss.step_lines(made.metrics)

    def _tell_of_missing_groups(self, metrics: Mapping[str, float]) -> None:
        missing = int(metrics.get("rollout/groups_missing", 0))
        if missing:
            rounds = int(metrics["rollout/extra_rounds"])
            line = f"after {rounds} extra rounds {missing} groups are still missing: the step goes on without"
            self.journal.say(f"step {self.state.step}: {line}")
            self.journal.event("groups missing", self.state.step, line)

    @property
    def _drawn_from(self) -> tuple[int, Selection | None]:
        """The stage and the curriculum's choice."""
        return self.state.stage_index, self.curriculum.selection if self.curriculum else None

    def _prompts(self) -> PromptStream:
        """Pure in the stage and the curriculum's choice: a position's prompt follows from its number."""
        place = self._drawn_from
        if self._opened is None or self._opened[0] != place:
            self._opened = (place, self.parts.inputs.train_prompts(*place))
        return self._opened[1]

    @property
    def _needs_reference(self) -> bool:
        """The guard may turn a penalty on later, and then it is too late to keep the first policy."""
        guard = self.recipe.guard
        return bool(self.recipe.loss.kl.coef) or (guard.autopilot and any(t.kl_coef for t in guard.tiers))

    def _evaluate_if_due(self, stage: Stage, *, last: bool) -> None:
        every = self.recipe.eval.every
        if last or (every and self.state.stage_step % every == 0):
            if stage.supervised:  # policy steps leave the sampler in step; supervised ones do not need one
                self.parts.sync_weights()
            self._evaluate(stage.kind)

    def _evaluate(self, kind: str) -> None:
        if self.parts.replay is not None or not self.parts.inputs.evaluates:
            return
        if self.evaluations.has(self.state.step):
            return
        with self.parts.console.phase("evaluating"):
            evaluation = self.parts.evaluate(self.curriculum.eval_selection if self.curriculum else None)
        self.evaluations = self.evaluations.with_evaluation(self.state.step, evaluation.metrics)
        pass_rate = evaluation.metrics.get(PASS_RATE_METRIC)
        asks_others = self.curriculum is not None and self.recipe.curriculum.eval_follows
        if not asks_others:  # a pass rate of other problems than before is no better or worse
            self.state = replace(self.state, pass_rate=pass_rate)
        metrics = {**evaluation.metrics, **self.evaluations.metrics()}
        if self.curriculum and kind in ("grpo", "adversarial"):
            line = self.curriculum.hear(pass_rate)
            metrics |= self.curriculum.metrics()
            self.journal.say(line)
            self.journal.event("curriculum", self.state.step, line)
        report = StepReport(self.state.step, kind, metrics, is_evaluation=True)
        self.journal.evaluation(report, self.state.stage_step, evaluation)
        self.watchdog.tick()

    def _checkpoint_is_due(self) -> bool:
        every = self.recipe.checkpoint.every
        return every > 0 and self.state.stage_step % every == 0

    def _save(self, *, wait: bool = False) -> None:
        remembered: dict[str, Any] = {"guard": self.watch.state, "evaluations": self.evaluations.to_json()}
        if self.critic:
            remembered["critic"] = self.critic.state
        if self.in_band:
            remembered["in_band"] = self.in_band
        if self.curriculum:
            remembered["curriculum"] = asdict(self.curriculum.state)
        if self.scheduler.is_dynamic and self.recipe.stages[self.state.stage_index].samples_groups:
            self.scheduler.turn_to(*self._drawn_from)
            remembered["groups"] = states_of_ranks(self.scheduler, self.parts)
        with self.parts.console.phase("saving a checkpoint"):
            self._tell(self.saver.save(replace(self.state, parts=remembered), wait=wait))

    def _tell(self, outcomes: list[Outcome]) -> None:
        """A checkpoint that could not be written is said, and the run goes on: the one before is whole."""
        for outcome in outcomes:
            self.unsaved = None if outcome.fault is None else outcome
            if outcome.fault is None:
                self.journal.event("checkpoint", self.state.step, outcome.name, seconds=outcome.seconds)
            else:
                self.journal.say(f"no checkpoint {outcome.name}: {outcome.fault}; the one before it stays")
                self.journal.event("checkpoint failed", self.state.step, outcome.fault)

    def _require_saved(self) -> None:
        """Before the run ends: now nothing comes after the newest checkpoint."""
        if self.unsaved is not None:
            raise UserError(
                f"the last checkpoint, {self.unsaved.name}, could not be written: {self.unsaved.fault}",
                where=str(self.checkpoints),
                remedy="make room there; --resume goes on from the checkpoint before",
            )

    def _leave(self, signal: str) -> None:
        self.parts.console.say(f"{signal}: saving, then leaving for another start")
        self._save(wait=True)
        self._require_saved()
        self.journal.event("preempted", self.state.step, signal)
        self.journal.close()
        self.parts.console.say(f"saved after step {self.state.step}; --resume goes on")
        shutdown()
        raise SystemExit(REQUEUE_EXIT_CODE)


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
