"""Built-in tasks: problems made from (seed, index) alone, small enough to learn on two CPU cores."""

from __future__ import annotations

import random
from abc import abstractmethod

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grpo_mega.data.problem import SIDES_LAW, Problem, Split, did_you_mean, side_of, stable_hash
from grpo_mega.errors import UserError

MAX_DRAWS = 1000
"""A side that gets no problem in this many draws is empty: each draw hits it with probability 1/4 or 3/4."""


class Task(BaseModel):
    """A task and its options (`data.options`): it draws problems and can get an answer plausibly wrong."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher_accuracy: float = Field(default=1.0, ge=0.0, le=1.0)
    """Probability that teacher_response is the right answer."""

    @abstractmethod
    def draw(self, rng: random.Random) -> tuple[str, str]:
        """Text and right answer."""

    @abstractmethod
    def mistake(self, answer: str, rng: random.Random) -> str:
        """A wrong answer of the kind a careless teacher gives; never the right one."""


class SortDigits(Task):
    """Sort decimal digits: "31524=" -> "12345"."""

    digits: int = Field(default=5, ge=1, le=256)
    teacher_accuracy: float = Field(default=0.5, ge=0.0, le=1.0)

    def draw(self, rng: random.Random) -> tuple[str, str]:
        digits = [rng.choice("0123456789") for _ in range(self.digits)]
        return "".join(digits) + "=", "".join(sorted(digits))

    def mistake(self, answer: str, rng: random.Random) -> str:
        """Two unequal neighbours swapped, or one digit replaced."""
        swaps = [place for place in range(len(answer) - 1) if answer[place] != answer[place + 1]]
        if swaps and rng.random() < 0.5:
            place = rng.choice(swaps)
            return answer[:place] + answer[place + 1] + answer[place] + answer[place + 2 :]
        place = rng.randrange(len(answer))
        return answer[:place] + rng.choice("0123456789".replace(answer[place], "")) + answer[place + 1 :]


class Add(Task):
    """Add two numbers of at most `digits` digits: "17+5=" -> "22"."""

    digits: int = Field(default=2, ge=1, le=256)

    def draw(self, rng: random.Random) -> tuple[str, str]:
        left, right = (rng.randrange(10**self.digits) for _ in range(2))
        return f"{left}+{right}=", str(left + right)

    def mistake(self, answer: str, rng: random.Random) -> str:
        """Off by one, or a carry too many or too few."""
        slip = rng.choice((-10, -1, 1, 10))
        return str(int(answer) + (slip if int(answer) + slip >= 0 else -slip))


TASKS: dict[str, type[Task]] = {"sort_digits": SortDigits, "add": Add}


def build_task(name: str, options: dict[str, object]) -> Task:
    """The task with its options checked."""
    if name not in TASKS:
        raise UserError(
            f"there is no built-in task {name!r}", where="data.task", remedy=did_you_mean(name, TASKS)
        )
    try:
        return TASKS[name].model_validate(options)
    except ValidationError as error:
        problem = error.errors()[0]
        option = ".".join(str(part) for part in problem["loc"])
        unknown = problem["type"] == "extra_forbidden"
        raise UserError(
            f"task {name} has no option {option!r}"
            if unknown
            else f"task {name}: {option} = {problem['input']!r}",
            where=f"data.options.{option}",
            law=None if unknown else problem["msg"],
            remedy=did_you_mean(option, TASKS[name].model_fields) if unknown else None,
        ) from error


class ProceduralSource:
    """An endless supply of one task's problems. `size` is the length of an epoch, not a limit."""

    def __init__(self, name: str, options: dict[str, object], split: Split, seed: int, size: int):
        self._task, self._name, self._split, self._seed, self._size = (
            build_task(name, options),
            name,
            split,
            seed,
            size,
        )

    def __len__(self) -> int:
        return self._size

    def where(self, index: int) -> str:
        return f"task {self._name}, {self._split} problem {index}"

    def problem(self, index: int) -> Problem:
        """Draws until the text falls on this split's side; how many depends on (seed, split, index) alone."""
        rng = random.Random(stable_hash("procedural", self._name, self._seed, self._split, index))
        for _ in range(MAX_DRAWS):
            text, answer = self._task.draw(rng)
            if side_of(text) == self._split:
                right = rng.random() < self._task.teacher_accuracy
                teacher_response = answer if right else self._task.mistake(answer, rng)
                return Problem(text, answer, teacher_response, {"task": self._name})
        raise UserError(
            f"task {self._name} with these options has no {self._split} problem",
            where="data.options",
            law=SIDES_LAW,
            remedy="make the problems larger, for instance with data.options.digits",
        )
