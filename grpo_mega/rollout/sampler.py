"""What the trainer asks of whoever samples: the embedded engine and the servers answer alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from grpo_mega.rollout.sampling import SamplingParams
from grpo_mega.types import Group, Prompt


class Sampler(Protocol):
    @property
    def updates(self) -> int:
        """How often it has taken new weights: what the versions of samples count in."""
        ...

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take new weights, by Hugging Face name. All ranks call it."""
        ...

    def share(self, prompts: Sequence[Prompt], rank: int, ranks: int) -> list[tuple[int, Prompt]]:
        """The prompts this rank generates for, with their positions."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        params: SamplingParams,
        seed: int,
        advance: Callable[[int], None] | None = None,
    ) -> list[Group]:
        """A group for each prompt, in order. All ranks call it, also one whose share is empty."""
        ...
