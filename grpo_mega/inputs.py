"""What a run reads: prompts, rewards and how to sample. Opened before the model: a mistake costs no load."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_mega.data.problem import Source, Split
from grpo_mega.data.selection import Catalogue, Selection, options_key, select, selection_of, with_options
from grpo_mega.data.sources import open_source
from grpo_mega.data.stream import PromptStream
from grpo_mega.errors import UserError
from grpo_mega.recipe.blocks import DataBlock
from grpo_mega.recipe.curriculum_block import CurriculumBlock
from grpo_mega.recipe.schema import Recipe
from grpo_mega.reward.assembly import RewardAssembly
from grpo_mega.rollout.sampling import SamplingParams
from grpo_mega.rollout.turns import Generate, load_generate


@dataclass
class Inputs:
    """Each part is made when first asked for: an export needs no data. `check` asks for all of them."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    _streams: dict[tuple[object, ...], PromptStream] = field(default_factory=dict, init=False, repr=False)
    _sources: dict[tuple[Split, str], Source] = field(default_factory=dict, init=False, repr=False)
    _catalogues: dict[Split, Catalogue] = field(default_factory=dict, init=False, repr=False)

    def check(self) -> None:
        """Whatever is wrong with data, rewards or stop tokens is said now."""
        self.train_prompts(0).prompts_for_step(0, 1)
        if self.evaluates:
            self.eval_problems.prompt(0)
        self.check_curriculum(self.recipe.curriculum)
        assert self.rewards and self.sampling
        assert self.generate or not self.recipe.rollout.generate

    def check_curriculum(self, curriculum: CurriculumBlock) -> None:
        """Every stage has problems: said now, not when the run gets there."""
        if curriculum.kind == "none":
            return
        for stage in curriculum.resolved_stages:
            try:
                self.train_prompts(0, selection_of(stage)).prompts_for_step(0, 1)
                if curriculum.eval_follows and self.evaluates:
                    self.eval_prompts(selection_of(stage)).prompt(0)
            except UserError as error:
                where = f"curriculum stage {stage.name!r}" + (f", {error.where}" if error.where else "")
                raise UserError(error.what, where=where, law=error.law, remedy=error.remedy) from error

    @cached_property
    def rewards(self) -> RewardAssembly:
        recipe = self.recipe
        return RewardAssembly(recipe.reward, [recipe.run.dir], recipe.rollout.max_new_tokens)

    def train_prompts(self, stage_index: int, selection: Selection | None = None) -> PromptStream:
        """Each stage goes through the training problems, or those selected, in an order of its own."""
        return self._prompts("train", self.stage_seed(stage_index), selection)

    def eval_prompts(self, selection: Selection | None = None) -> PromptStream:
        """Held-out problems: all, or those selected."""
        return self._prompts("eval", self.recipe.seed, selection)

    def _prompts(self, split: Split, seed: int, selection: Selection | None) -> PromptStream:
        """Made once: who asks at every step pays for the selection at the first."""
        selection = Selection() if selection is None else selection
        data = with_options(self.recipe.data, selection)
        key = (split, seed, options_key(data), selection.levels, selection.complexity)
        if key not in self._streams:
            source = self._source(split, data)
            if selection.filters:
                source = select(source, selection, self._catalogue(split, source))
            self._streams[key] = PromptStream(source, self.tokenizer, data, seed, split)
        return self._streams[key]

    def _source(self, split: Split, data: DataBlock) -> Source:
        """Opened once for each split and each set of a generated task's options."""
        key = (split, options_key(data))
        if key not in self._sources:
            self._sources[key] = open_source(data, split, self.recipe.seed)
        return self._sources[key]

    def _catalogue(self, split: Split, source: Source) -> Catalogue:
        """A file has one source a split, whatever is selected of it."""
        if split not in self._catalogues:
            self._catalogues[split] = Catalogue(source)
        return self._catalogues[split]

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
        return self.eval_prompts()

    @cached_property
    def generate(self) -> Generate | None:
        """The user's function that makes a sample of several turns."""
        path = self.recipe.rollout.generate
        return None if path is None else load_generate(path)

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
