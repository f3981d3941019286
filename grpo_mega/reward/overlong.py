"""A soft limit on the length of responses.

    0                                               while tokens <= longest - buffer
    (longest - buffer - tokens) / buffer            then, down to -1 at the longest that is sampled

Example: longest 16, buffer 4 -> 12 tokens 0, 13 tokens -.25, 16 tokens -1
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo_mega.recipe.reward_blocks import OverlongReward
from grpo_mega.reward.base import RewardResult
from grpo_mega.types import Prompt, Sample


@dataclass(frozen=True, slots=True)
class OverlongScorer:
    block: OverlongReward
    name: str
    longest: int  # tokens of a response, the stop token included

    def score(self, prompt: Prompt, sample: Sample) -> RewardResult:
        beyond = len(sample.response_ids) - (self.longest - self.block.buffer)
        return RewardResult(-beyond / self.block.buffer if beyond > 0 else 0.0)
