"""What every reward is: a name and a score for one sample of one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from grpo_mega.errors import UserError
from grpo_mega.types import Prompt, Sample


@dataclass(frozen=True, slots=True)
class RewardResult:
    """Example: RewardResult(value=1.0, pass_rate=1.0)

    A reward that runs several tests says how many: RewardResult(value=7.5, pass_rate=.5, passed_tests=2,
    total_tests=4).
    """

    value: float  # before the component's weight
    pass_rate: float | None = (
        None  # 0..1: the share of tests passed; None: this reward says nothing about success
    )
    passed_tests: int | None = None  # together with total_tests, or not at all
    total_tests: int | None = None
    parts: Mapping[str, float] = field(default_factory=dict[str, float])  # what the value is made of, by name


class Reward(Protocol):
    """Responses are judged as text without special tokens, also those cut off by their length."""

    @property
    def name(self) -> str: ...

    def score(self, prompt: Prompt, sample: Sample) -> RewardResult: ...


@runtime_checkable
class BatchReward(Reward, Protocol):
    """A slow reward that scores a batch at once: the results of `score`, in the order of the pairs."""

    def score_many(self, pairs: Sequence[tuple[Prompt, Sample]]) -> list[RewardResult]: ...


def require_answer(prompt: Prompt, reward_name: str) -> str:
    """The reference answer, for rewards that compare: an empty one would match, or fail, everything."""
    if prompt.answer.strip():
        return prompt.answer
    raise UserError(
        f"prompt {prompt.uid} has no answer to compare with",
        where=f"reward {reward_name}, scoring prompt {prompt.uid}",
        law="this reward compares a response with the problem's answer",
        remedy="set data.answer_key to the field that holds it, or choose a reward that needs none",
    )
