"""What a run reads: prompts, rewards and how to sample. Opened before the model: a mistake costs no load."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_mega.data.problem import Source
from grpo_mega.data.sources import open_source
from grpo_mega.data.stream import PromptStream
from grpo_mega.errors import UserError
from grpo_mega.recipe.schema import Recipe
from grpo_mega.reward.assembly import RewardAssembly
from grpo_mega.rollout.sampling import SamplingParams


@dataclass
class Inputs:
    """Each part is made when first asked for: an export needs no data. `check` asks for all of them."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase

    def check(self) -> None:
        """Whatever is wrong with data, rewards or stop tokens is said now."""
        self.train_prompts(0).prompts_for_step(0, 1)
        if self.evaluates:
            self.eval_problems.prompt(0)
        assert self.rewards and self.sampling

    @cached_property
    def rewards(self) -> RewardAssembly:
        return RewardAssembly(self.recipe.reward)

    @cached_property
    def _train_source(self) -> Source:
        return open_source(self.recipe.data, "train", self.recipe.seed)

    def train_prompts(self, stage_index: int) -> PromptStream:
        """Each stage goes through the training problems in an order of its own."""
        seed = self.stage_seed(stage_index)
        return PromptStream(self._train_source, self.tokenizer, self.recipe.data, seed, "train")

    def stage_seed(self, stage_index: int) -> int:
        """Distinct for every (seed, stage) while there are fewer than 1009 stages."""
        return self.recipe.seed * 1009 + stage_index

    @property
    def evaluates(self) -> bool:
        """Generated tasks always hold problems out; files do when the recipe names one."""
        data = self.recipe.data
        return data.source in ("procedural", "reasoning_gym") or data.eval is not None

    @cached_property
    def eval_problems(self) -> PromptStream:
        source = open_source(self.recipe.data, "eval", self.recipe.seed)
        return PromptStream(source, self.tokenizer, self.recipe.data, self.recipe.seed, "eval")

    @cached_property
    def sampling(self) -> SamplingParams:
        """How training samples; evaluation has its own temperature."""
        rollout = self.recipe.rollout
        end: Any = self.tokenizer.eos_token_id
        stop_ids = frozenset({int(end), *map(self._stop_id, rollout.stop)})
        return SamplingParams(
            rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k, stop_ids
        )

    def _stop_id(self, text: str) -> int:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise UserError(
                f"the stop string {text!r} is {len(ids)} tokens of this tokenizer",
                where="rollout.stop",
                law="a stop string is exactly one token: generation stops at tokens",
                remedy="use a single token, such as a special token of the tokenizer",
            )
        return ids[0]
