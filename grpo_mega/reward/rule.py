"""Rewards that compare a response with the answer by a rule."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

from grpo_mega.errors import UserError
from grpo_mega.recipe.reward_blocks import RuleReward
from grpo_mega.reward.base import RewardResult, require_answer
from grpo_mega.types import Prompt, Sample

log = logging.getLogger(__name__)

NUMBER = re.compile(
    r"""
    (?:(?<![\w)\]])[-+])?                             # a sign, unless it subtracts from what precedes: "5-3"
    (?:
        (?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)   # a comma belongs to it only before three digits
        (?:\.[0-9]+)?
        |\.[0-9]+
    )
    (?:[eE][-+]?[0-9]{1,3}(?![0-9]))?
    """,
    re.VERBOSE,
)

ANSWER_PLACE = "{answer}"


class RuleScorer:
    """One rule. `extract` takes the last match: a response that corrects itself is judged by its end."""

    def __init__(self, block: RuleReward, name: str):
        self.name, self._block = name, block
        self._flags = re.IGNORECASE if block.ignore_case else re.RegexFlag(0)
        self._extract = None if block.extract is None else _compile(block.extract, self._flags, "extract")
        if self._extract is not None and not self._extract.groups:
            raise UserError(
                f"extract = {block.extract!r} has no group",
                where="reward.rule.extract",
                law="the first group of the expression is the answer inside the response",
                remedy="put parentheses around the part that is the answer",
            )
        if block.pattern is not None:
            _compile(block.pattern.replace(ANSWER_PLACE, "a"), self._flags, "pattern")
        self._warned: set[str] = set()
        rules: dict[str, Callable[[Prompt, str], float]] = {
            "exact": self._exact,
            "contains": self._contains,
            "number": self._number,
            "regex": self._regex,
            "reasoning_gym": self._reasoning_gym,
        }
        self._rule = rules[block.kind]

    def score(self, prompt: Prompt, sample: Sample) -> RewardResult:
        response = self._response(sample.text)
        value = 0.0 if response is None else self._rule(prompt, response)
        return RewardResult(value, pass_rate=min(max(value, 0.0), 1.0))

    def _response(self, text: str) -> str | None:
        if self._extract is not None:
            matches = [match.group(1) for match in self._extract.finditer(text)]
            if not matches or matches[-1] is None:
                return None
            text = matches[-1]
        return text.strip() if self._block.strip else text

    def _comparable(self, text: str) -> str:
        text = text.strip() if self._block.strip else text
        return text.casefold() if self._block.ignore_case else text

    def _exact(self, prompt: Prompt, response: str) -> float:
        return float(self._comparable(response) == self._comparable(require_answer(prompt, self.name)))

    def _contains(self, prompt: Prompt, response: str) -> float:
        return float(self._comparable(require_answer(prompt, self.name)) in self._comparable(response))

    def _number(self, prompt: Prompt, response: str) -> float:
        expected = last_number(require_answer(prompt, self.name))
        if expected is None:
            what = f"the answer of prompt {prompt.uid}, {prompt.answer!r}, holds no number: scored 0"
            self._warn_once(prompt.uid, what)
        return float(expected is not None and last_number(response) == expected)

    def _regex(self, prompt: Prompt, response: str) -> float:
        pattern = self._block.pattern
        assert pattern is not None
        if ANSWER_PLACE in pattern:
            answer = require_answer(prompt, self.name)
            answer = answer.strip() if self._block.strip else answer
            pattern = pattern.replace(ANSWER_PLACE, re.escape(answer))
        return float(re.search(pattern, response, self._flags) is not None)

    def _reasoning_gym(self, prompt: Prompt, response: str) -> float:
        problem = prompt.meta.get("reasoning_gym")
        if not isinstance(problem, Mapping):
            raise UserError(
                f"prompt {prompt.uid} does not come from reasoning_gym",
                where="reward.rule.kind",
                law="kind reasoning_gym asks the scorer of the task that made the problem",
                remedy="set data.source to reasoning_gym, or choose another kind",
            )
        scorer = _gym_scorer(str(problem["task"]), json.dumps(problem["options"], sort_keys=True))
        try:
            return float(scorer(response, problem["entry"]))
        except Exception as error:
            # Scorers parse whatever the policy wrote, and some raise: then the response is wrong.
            task = str(problem["task"])
            self._warn_once(task, f"the scorer of {task} failed on {response!r} ({error!r}): scored 0")
            return 0.0

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            log.warning("reward %s: %s", self.name, message)


def last_number(text: str) -> Decimal | None:
    """The last decimal number in a text, exactly: "1,234.50" is 1234.5, "5-3" ends with 3, "= -3" with -3."""
    numbers = NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def _compile(expression: str, flags: re.RegexFlag, key: str) -> re.Pattern[str]:
    try:
        return re.compile(expression, flags)
    except re.error as error:
        raise UserError(
            f"{key} = {expression!r} is not a regular expression: {error}",
            where=f"reward.rule.{key}",
            remedy="correct it; inside YAML, single quotes keep backslashes as they are",
        ) from error


@lru_cache
def _gym_scorer(task: str, options: str) -> Callable[[str, Any], float]:
    # Imported here because it takes seconds and only this kind needs it. Scoring depends on no size or seed.
    import reasoning_gym

    return reasoning_gym.create_dataset(task, size=10, seed=0, **json.loads(options)).score_answer
