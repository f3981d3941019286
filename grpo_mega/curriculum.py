"""The curriculum: where training stands among the stages, and what an evaluation changes about that.

A stage ends when it had enough evaluations and steps, and the mean of its last pass rates reaches
min(threshold + round_increment * (round - 1), highest_threshold). After the last stage comes a new round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from grpo_mega.data.selection import Selection, selection_of
from grpo_mega.errors import UserError
from grpo_mega.recipe.curriculum_block import CurriculumBlock, CurriculumStage

ROUNDING = 1e-9
"""Pass rates are counted in tests, far coarser than this; .65 + .1 * 2 is a hair above .85, which must do."""


@dataclass(frozen=True, slots=True)
class CurriculumState:
    """Where a curriculum stands: with its block, all that its future depends on.

    Example: CurriculumState(stage_index=2, steps_in_stage=50, evaluation_count=2, pass_rates=(.4, .5))
    """

    round: int = 1  # from 1
    stage_index: int = 0
    steps_in_stage: int = 0
    evaluation_count: int = 0  # since the stage began, those that gave a pass rate
    pass_rates: tuple[float, ...] = ()  # the last `recent` ones since the stage began
    latest_performance: float | None = None  # the last pass rate, also of the stage before
    advanced: bool = False  # by the latest evaluation
    finished: bool = False  # the last round is through; training goes on in its last stage


def state_from_json(fields: Mapping[str, Any]) -> CurriculumState:
    """Undo `dataclasses.asdict` after a trip through JSON, which has no tuples."""
    return CurriculumState(**{**fields, "pass_rates": tuple(fields["pass_rates"])})


class Curriculum:
    """A staged curriculum at work. `state` is all that changes: a checkpoint of it goes on exactly."""

    def __init__(self, block: CurriculumBlock, state: CurriculumState | None = None):
        assert block.kind == "staged", block.kind
        self._block, self._stages = block, block.resolved_stages
        self.state = CurriculumState() if state is None else state
        if self.state.stage_index >= len(self._stages):
            raise UserError(
                f"the checkpoint stands at stage {self.state.stage_index + 1} of the curriculum, "
                f"and the recipe has {len(self._stages)}",
                where="curriculum.stages",
                law="a resumed curriculum goes on in the stage where it stopped",
                remedy="resume with the stages the run began with, or start a new run",
            )

    @property
    def stage(self) -> CurriculumStage:
        return self._stages[self.state.stage_index]

    @property
    def selection(self) -> Selection:
        """The problems to train on now."""
        return selection_of(self.stage)

    @property
    def eval_selection(self) -> Selection | None:
        """The held-out problems to evaluate on now; None: all."""
        return self.selection if self._block.eval_follows else None

    @property
    def threshold(self) -> float:
        """What the mean of the last pass rates has to reach in this stage and round."""
        raised = self.stage.threshold + self._block.round_increment * (self.state.round - 1)
        return min(raised, self._block.highest_threshold)

    def after_step(self) -> None:
        """One training step was made in this stage."""
        self.state = replace(self.state, steps_in_stage=self.state.steps_in_stage + 1)

    def hear(self, pass_rate: float | None) -> str:
        """Take in an evaluation and go on where the laws allow it; what happened or what is missing, in one
        line. None and nan: the evaluation gave no pass rate, and does not count."""
        if pass_rate is None or math.isnan(pass_rate):
            self.state = replace(self.state, advanced=False)
            return f"curriculum: stays in {self._place}: the evaluation gave no pass rate"
        assert 0 <= pass_rate <= 1, pass_rate
        self.state = replace(
            self.state,
            evaluation_count=self.state.evaluation_count + 1,
            pass_rates=(*self.state.pass_rates, pass_rate)[-self._block.recent :],
            latest_performance=pass_rate,
            advanced=False,
        )
        if self.state.finished:
            return f"curriculum: stays in {self._place}: all {self._block.max_rounds} rounds are through"
        missing = self._missing()
        if missing:
            return f"curriculum: stays in {self._place}: {', '.join(missing)}"
        return self._advance()

    def metrics(self) -> dict[str, float]:
        """After an evaluation. No pass rate so far gives no latest_performance."""
        latest = self.state.latest_performance
        performance = {} if latest is None else {"curriculum/latest_performance": latest}
        return performance | {
            "curriculum/evaluation_count": float(self.state.evaluation_count),
            "curriculum/current_stage_idx": float(self.state.stage_index),
            "curriculum/performance_threshold": self.threshold,
            "curriculum/can_advance": float(self.state.advanced),
        }

    @property
    def _place(self) -> str:
        again = f" of round {self.state.round}" if self.state.round > 1 else ""
        return f"{self.stage.name!r}{again}"

    @property
    def _mean(self) -> float:
        return sum(self.state.pass_rates) / len(self.state.pass_rates)

    def _compared(self, sign: str) -> str:
        count = len(self.state.pass_rates)
        which = f"mean of the last {count} pass rates" if count > 1 else "the last pass rate"
        return f"{which} {self._mean:.4g} {sign} {self.threshold:.4g}"

    def _missing(self) -> list[str]:
        """The laws that keep the stage from ending."""
        missing = []
        if self.state.evaluation_count < self._block.min_evaluations:
            missing.append(f"{self.state.evaluation_count} of {self._block.min_evaluations} evaluations")
        if self._mean < self.threshold - ROUNDING:
            missing.append(self._compared("<"))
        if self.state.steps_in_stage < self.stage.min_steps:
            missing.append(f"{self.state.steps_in_stage} of {self.stage.min_steps} steps")
        return missing

    def _advance(self) -> str:
        reason, left, state = self._compared(">="), self._place, self.state
        is_last = state.stage_index + 1 == len(self._stages)
        if is_last and state.round == self._block.max_rounds:
            self.state = replace(state, finished=True)
            return f"curriculum: finished: {reason} in {left}, the last stage of the last round; stays there"
        self.state = CurriculumState(
            round=state.round + is_last,
            stage_index=0 if is_last else state.stage_index + 1,
            latest_performance=state.latest_performance,
            advanced=True,
        )
        return f"curriculum: advances from {left} to {self._place} ({self.selection}): {reason}"
