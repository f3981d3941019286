"""Problems of reasoning_gym data sets; each keeps what its task's own scorer needs in meta["reasoning_gym"].

A few of its tasks choose through Python's salted string hashes (isomorphic_strings, polynomial_multiplication
and ransom_note in 0.1.25): set PYTHONHASHSEED for these, or a resumed run meets other problems.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import reasoning_gym
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

from grpo_mega.data.problem import SIDES_LAW, Problem, Split, did_you_mean, side_of, stable_hash
from grpo_mega.errors import UserError

MAX_DRAWS = 128
"""Held-out problems are one draw in four: (3/4)^128 is below 1e-15, a side without any by then is empty."""

SEEDS = 2**31
"""Tasks add the index to the seed and some pass the sum to numpy, which takes 32 bits."""


class GymSource:
    """One task. Draw a of problem i is entry i of the data set whose seed comes from (seed, split, a).

    A data set per draw, rather than larger indices of one: several tasks refuse an index beyond their size.
    """

    def __init__(self, task: str, options: Mapping[str, object], split: Split, seed: int, size: int):
        self._task, self._options, self._split, self._seed, self._size = (
            task,
            dict(options),
            split,
            seed,
            size,
        )
        _check_names(task, self._options)
        self._draws = [self._open(0)]

    def __len__(self) -> int:
        return self._size

    def where(self, index: int) -> str:
        return f"reasoning_gym {self._task}, {self._split} problem {index}"

    def problem(self, index: int) -> Problem:
        for draw in range(MAX_DRAWS):
            if draw == len(self._draws):
                self._draws.append(self._open(draw))
            entry = self._draws[draw][index]
            if side_of(entry["question"]) == self._split:
                return self._problem(entry)
        raise UserError(
            f"reasoning_gym {self._task} gave no {self._split} problem in {MAX_DRAWS} draws",
            where="data.options",
            law=SIDES_LAW,
            remedy="choose options that give more distinct problems, or another task",
        )

    def _problem(self, entry: dict[str, object]) -> Problem:
        # Some tasks have many right answers and name none: their scorer alone can judge.
        answer = entry["answer"]
        return Problem(
            text=str(entry["question"]),
            answer="" if answer is None else str(answer),
            teacher_response=None if answer is None else str(answer),
            meta={"reasoning_gym": {"task": self._task, "options": self._options, "entry": entry}},
        )

    def _open(self, draw: int) -> ProceduralDataset:
        seed = stable_hash("reasoning_gym", self._task, self._seed, self._split, draw) % SEEDS
        try:
            return reasoning_gym.create_dataset(self._task, size=self._size, seed=seed, **self._options)
        except (AssertionError, TypeError, ValueError, KeyError) as error:
            raise UserError(
                f"reasoning_gym refuses {self._task} with size {self._size} and options {self._options}",
                where=f"data.options, data.{self._split}",
                law=str(error) or type(error).__name__,
                remedy=f"change data.options; if it is the size, set data.{self._split} to a smaller number",
            ) from error


def _check_names(task: str, options: Mapping[str, object]) -> None:
    if task not in DATASETS:
        raise UserError(
            f"reasoning_gym has no data set {task!r}", where="data.task", remedy=did_you_mean(task, DATASETS)
        )
    ours = {"size": "data.train and data.eval", "seed": "seed"}
    known = {field.name for field in fields(DATASETS[task][1])} - set(ours)
    for option in options:
        if option in ours:
            raise UserError(
                f"{option!r} is not an option of the task here",
                where=f"data.options.{option}",
                remedy=f"use the recipe's {ours[option]} instead",
            )
        if option not in known:
            raise UserError(
                f"reasoning_gym {task} has no option {option!r}",
                where=f"data.options.{option}",
                remedy=did_you_mean(option, known),
            )
