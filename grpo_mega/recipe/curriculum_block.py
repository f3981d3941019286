"""The curriculum of a recipe: which problems come when, and what a policy must show to go on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo_mega.block import Block, NotNegative, Positive, Probability
from grpo_mega.recipe.blocks import DataBlock

GENERATED_SOURCES = ("procedural", "reasoning_gym")

Complexity = Annotated[float, Field(ge=0.0, le=10.0)]
LevelName = Annotated[str, Field(min_length=1)]


class CurriculumStage(Block):
    """One difficulty: its problems, and when the policy has learnt them."""

    name: str = Field(min_length=1)
    """Shown in messages; no two stages share one."""
    threshold: float = Field(ge=0.0, le=1.0)
    """Mean held-out pass rate to reach in the first round."""
    min_steps: NotNegative = 20
    """Training steps before the stage may end."""
    levels: tuple[LevelName, ...] | None = Field(default=None, min_length=1)
    """files: problems whose "level" is one of these; null = all."""
    complexity: tuple[Complexity, Complexity] | None = None
    """files: problems whose "complexity" lies in [min, max], both included; null = all."""
    options: dict[str, Any] = Field(default_factory=dict)
    """procedural and reasoning_gym: arguments of the task, over those of data.options."""

    @model_validator(mode="after")
    def complexity_goes_upwards(self) -> CurriculumStage:
        if self.complexity is not None and self.complexity[0] > self.complexity[1]:
            low, high = self.complexity
            raise ValueError(f"complexity is [min, max]: {low:g} is above {high:g}")
        return self


class CurriculumBlock(Block):
    kind: Literal["none", "staged"] = "none"
    """none: all problems all the time; staged: one stage after the other, each when the last is learnt."""
    preset: Literal["default", "verilog"] | None = None
    """Six known stages: default goes by thresholds alone, verilog also picks by level and complexity."""
    stages: tuple[CurriculumStage, ...] = ()
    """Own stages, easiest first, in place of a preset."""
    min_evaluations: Positive = 5
    """Evaluations before a stage may end, counted since it began."""
    recent: Positive = 2
    """The mean of this many latest pass rates is what reaches the threshold."""
    max_rounds: Positive = 5
    """After the last stage the first one comes again with higher thresholds, this many rounds in all."""
    round_increment: float = Field(default=0.1, ge=0.0, le=1.0)
    """Every threshold rises by this much a round."""
    highest_threshold: Probability = 0.95
    """No threshold is above this, in any round."""
    eval_follows: bool = True
    """Evaluate on held-out problems of the current stage; false: always on all of them."""

    @property
    def resolved_stages(self) -> tuple[CurriculumStage, ...]:
        """The stages in their order, wherever they come from."""
        return self.stages if self.preset is None else PRESETS[self.preset]

    @model_validator(mode="after")
    def stages_come_from_one_place(self) -> CurriculumBlock:
        if self.preset is not None and self.stages:
            raise ValueError(f"preset {self.preset} brings its own stages: remove preset, or stages")
        return self

    @model_validator(mode="after")
    def staged_has_stages(self) -> CurriculumBlock:
        if self.kind == "staged" and not self.resolved_stages:
            raise ValueError("kind staged needs stages: give some, or set preset to default or verilog")
        return self

    @model_validator(mode="after")
    def stages_belong_to_staged(self) -> CurriculumBlock:
        if self.kind == "none" and self.resolved_stages:
            given = "stages" if self.stages else "preset"
            raise ValueError(f"kind none uses no {given}: set kind to staged, or remove {given}")
        return self

    @model_validator(mode="after")
    def stage_names_differ(self) -> CurriculumBlock:
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two stages are called {twice[0]!r}: messages could not tell them apart")
        return self

    @model_validator(mode="after")
    def recent_pass_rates_are_of_the_stage(self) -> CurriculumBlock:
        if self.recent > self.min_evaluations:
            raise ValueError(
                f"recent ({self.recent}) must not exceed min_evaluations ({self.min_evaluations}): "
                "the mean is over evaluations of the stage itself"
            )
        return self


def check_curriculum(curriculum: CurriculumBlock, data: DataBlock) -> None:
    """The laws between a curriculum and its data; ValueError, for a validator of the recipe."""
    if curriculum.kind == "none":
        return
    _stages_pick_what_the_source_has(curriculum, data)
    _a_curriculum_is_evaluated(data)


def check_curriculum_hears(curriculum: CurriculumBlock, eval_every: int) -> None:
    """Evaluations only at a stage's end would let no curriculum go on."""
    if curriculum.kind == "staged" and not eval_every:
        raise ValueError("a staged curriculum goes on by evaluations: set eval.every above 0")


def _stages_pick_what_the_source_has(curriculum: CurriculumBlock, data: DataBlock) -> None:
    generated = data.source in GENERATED_SOURCES
    for stage in curriculum.resolved_stages:
        where = f"curriculum stage {stage.name!r}"
        if stage.options and not generated:
            raise ValueError(
                f"{where}: options are arguments of a generated task, and data.source {data.source} reads "
                "a file: choose its problems by levels and complexity"
            )
        if generated and (stage.levels is not None or stage.complexity is not None):
            raise ValueError(
                f"{where}: levels and complexity are fields of a file's lines, and data.source {data.source} "
                "generates its problems: set their difficulty by options"
            )


def _a_curriculum_is_evaluated(data: DataBlock) -> None:
    if data.source not in GENERATED_SOURCES and data.eval is None:
        raise ValueError(
            "a staged curriculum goes on by held-out pass rates: give data.eval, a file of problems"
        )


def _stage(
    name: str,
    threshold: float,
    min_steps: int,
    levels: tuple[str, ...] | None = None,
    complexity: tuple[float, float] | None = None,
) -> CurriculumStage:
    return CurriculumStage(
        name=name, threshold=threshold, min_steps=min_steps, levels=levels, complexity=complexity
    )


PRESETS: dict[Literal["default", "verilog"], tuple[CurriculumStage, ...]] = {
    # Harder problems are learnt less well and take longer: thresholds fall and steps rise.
    "default": (
        _stage("foundation", 0.65, 20),
        _stage("elementary", 0.60, 25),
        _stage("intermediate", 0.55, 30),
        _stage("advanced", 0.50, 35),
        _stage("expert", 0.45, 40),
        _stage("comprehensive", 0.40, 50),
    ),
    # Neighbouring stages overlap, so that none begins with unknown problems alone. The last one has all,
    # also problems of level master.
    "verilog": (
        _stage("foundation", 0.65, 20, ("basic",), (0, 3)),
        _stage("elementary", 0.60, 25, ("basic", "intermediate"), (0, 5)),
        _stage("intermediate", 0.55, 30, ("intermediate",), (3, 7)),
        _stage("advanced", 0.50, 35, ("intermediate", "advanced"), (5, 9)),
        _stage("expert", 0.45, 40, ("advanced", "expert"), (7, 10)),
        _stage("comprehensive", 0.40, 50),
    ),
}
