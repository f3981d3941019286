"""Some problems of a source: those of a file by level and complexity, those of a generated task by its
options."""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from grpo_mega.data.problem import Problem, Source, did_you_mean
from grpo_mega.errors import UserError
from grpo_mega.recipe.blocks import DataBlock
from grpo_mega.recipe.curriculum_block import CurriculumStage

LEVEL_KEY = "level"
COMPLEXITY_KEY = "complexity"
MAX_COMPLEXITY = 10


@dataclass(frozen=True, slots=True)
class Selection:
    """Which problems; with no field set, all of them.

    Example: Selection(levels=("basic", "intermediate"), complexity=(0, 5)), Selection(options={"digits": 3})
    """

    levels: tuple[str, ...] | None = None
    complexity: tuple[float, float] | None = None  # both ends included
    options: Mapping[str, object] = field(default_factory=dict[str, object])  # over data.options

    @property
    def filters(self) -> bool:
        """Whether it leaves out lines of a file."""
        return self.levels is not None or self.complexity is not None

    def accepts(self, level: str | None, complexity: float) -> bool:
        """A problem without a level or complexity (nan) is in no selection that asks for one."""
        if self.levels is not None and level not in self.levels:
            return False
        return self.complexity is None or self.complexity[0] <= complexity <= self.complexity[1]

    def __str__(self) -> str:
        parts = [] if self.levels is None else [f"level {' or '.join(self.levels)}"]
        parts += [] if self.complexity is None else [f"complexity {_interval(self.complexity)}"]
        parts += [f"{name} {value}" for name, value in self.options.items()]
        return ", ".join(parts) or "all problems"


def selection_of(stage: CurriculumStage) -> Selection:
    return Selection(stage.levels, stage.complexity, stage.options)


def with_options(data: DataBlock, selection: Selection) -> DataBlock:
    """What generates the selected problems: the recipe's own data, with the selection's options."""
    if not selection.options:
        return data
    return data.model_copy(update={"options": {**data.options, **selection.options}})


def options_key(data: DataBlock) -> str:
    """Equal for data whose generated problems are the same ones."""
    return json.dumps(data.options, sort_keys=True, default=repr)


class Catalogue:
    """Level and complexity of every problem of a source, read once for any number of selections."""

    def __init__(self, source: Source):
        self.file = source.where(0).rpartition(":")[0]
        self.levels: list[str | None] = []
        self.complexities = array("d")  # nan: none given
        for index in range(len(source)):
            problem = source.problem(index)
            self.levels.append(_level_of(problem, source, index))
            self.complexities.append(_complexity_of(problem, source, index))

    def indices(self, selection: Selection) -> array[int]:
        pairs = enumerate(zip(self.levels, self.complexities, strict=True))
        return array("Q", (index for index, tags in pairs if selection.accepts(*tags)))

    def summary(self) -> str:
        """What there is to select from. Example: basic (12), expert (3), none (1); complexity 1-8"""
        counts = Counter("none" if level is None else level for level in self.levels)
        levels = ", ".join(f"{level} ({count})" for level, count in sorted(counts.items()))
        known = [value for value in self.complexities if not math.isnan(value)]
        return f"{levels}; complexity {_interval((min(known), max(known))) if known else 'none'}"


class SelectedSource:
    """Some problems of another source, in its order. `indices` are places in the whole source."""

    def __init__(self, whole: Source, indices: Sequence[int]):
        assert len(indices), "an empty selection has no epoch"
        self.whole, self._indices = whole, indices

    def __len__(self) -> int:
        return len(self._indices)

    def problem(self, index: int) -> Problem:
        return self.whole.problem(self._indices[index])

    def where(self, index: int) -> str:
        return self.whole.where(self._indices[index])

    def whole_index(self, index: int) -> int:
        """The place in the whole source: what names the problem, whatever else is selected."""
        return self._indices[index]


def select(source: Source, selection: Selection, catalogue: Catalogue | None = None) -> Source:
    """The problems of a file source that the selection accepts. `catalogue`: of this source, if at hand."""
    if not selection.filters:
        return source
    catalogue = Catalogue(source) if catalogue is None else catalogue
    indices = catalogue.indices(selection)
    if not indices:
        raise _nothing_selected(selection, catalogue)
    return SelectedSource(source, indices)


def _nothing_selected(selection: Selection, catalogue: Catalogue) -> UserError:
    known = {level for level in catalogue.levels if level is not None}
    strange = [level for level in selection.levels or () if level not in known]
    if not known and selection.levels:
        hint = f"give the lines a {LEVEL_KEY!r}"
    elif strange:
        hint = f"for {strange[0]!r}, {did_you_mean(strange[0], known)}"
    else:
        hint = "widen the filter, or give more lines"
    return UserError(
        f"no problem of this file has {selection}",
        where=catalogue.file,
        law=f"a curriculum stage has at least one problem; levels here: {catalogue.summary()}",
        remedy=f"change the stage's levels and complexity, or the file: {hint}",
    )


def _level_of(problem: Problem, source: Source, index: int) -> str | None:
    level = problem.meta.get(LEVEL_KEY)
    if level is None or isinstance(level, str):
        return level
    raise UserError(
        f"{LEVEL_KEY!r} holds {level!r}, a {type(level).__name__}",
        where=source.where(index),
        law="a level is a text, such as basic: curriculum stages name the ones they take",
        remedy="write it as a string, or choose by complexity",
    )


def _complexity_of(problem: Problem, source: Source, index: int) -> float:
    complexity = problem.meta.get(COMPLEXITY_KEY)
    if complexity is None:
        return math.nan
    is_truth_value = isinstance(complexity, bool)
    if isinstance(complexity, int | float) and not is_truth_value and 0 <= complexity <= MAX_COMPLEXITY:
        return float(complexity)
    raise UserError(
        f"{COMPLEXITY_KEY!r} holds {complexity!r}",
        where=source.where(index),
        law=f"complexity is a number from 0 to {MAX_COMPLEXITY}",
        remedy="correct the line, or remove the field",
    )


def _interval(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:g}-{bounds[1]:g}"
