"""The parts of a run, built from its recipe in one place: what `train`, `eval` and `export` work with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from grpo_mega.algo.objective import PolicyLoss
from grpo_mega.data.sources import open_source
from grpo_mega.data.stream import PromptStream
from grpo_mega.data.tokenizer import load_tokenizer
from grpo_mega.engine.device import device
from grpo_mega.engine.model import DTYPES
from grpo_mega.engine.parallel import Layout, initialize_layout, initialize_process_group
from grpo_mega.engine.policy import PolicyEngine
from grpo_mega.engine.scratch import write_scratch_model
from grpo_mega.errors import UserError
from grpo_mega.evaluation import evaluate
from grpo_mega.model_shape import local_model_directory
from grpo_mega.monitor.console import Console
from grpo_mega.plan import check_world_size
from grpo_mega.recipe.schema import Recipe
from grpo_mega.reward.assembly import RewardAssembly
from grpo_mega.rollout.local import LocalEngine
from grpo_mega.rollout.sampling import SamplingParams
from grpo_mega.sync.export import write_hf_directory
from grpo_mega.sync.layout import Heads
from grpo_mega.sync.stream import HfDirectory, heads_of, load_hf, stream_hf


@dataclass
class Parts:
    """Everything on this rank. Data sources and the sampler are made when first used: an export needs
    neither."""

    recipe: Recipe
    layout: Layout
    console: Console
    tokenizer: PreTrainedTokenizerBase
    hf: PretrainedConfig
    engine: PolicyEngine

    @property
    def is_lead(self) -> bool:
        return self.layout.rank == 0

    @property
    def run_dir(self) -> Path:
        return self.recipe.run.dir

    @cached_property
    def sampler(self) -> LocalEngine:
        dtype = DTYPES[self.recipe.model.dtype]
        return LocalEngine(self.hf, self.tokenizer, dtype, device(), self.recipe.rollout.prompts_per_batch)

    @cached_property
    def rewards(self) -> RewardAssembly:
        return RewardAssembly(self.recipe.reward)

    @cached_property
    def policy_loss(self) -> PolicyLoss:
        return PolicyLoss(self.recipe.loss, default_norm_length=self.recipe.rollout.max_new_tokens)

    @cached_property
    def _train_source(self):
        return open_source(self.recipe.data, "train", self.recipe.seed)

    @property
    def evaluates(self) -> bool:
        """Generated tasks always hold problems out; files do when the recipe names one."""
        data = self.recipe.data
        return data.source in ("procedural", "reasoning_gym") or data.eval is not None

    @cached_property
    def eval_problems(self) -> PromptStream:
        source = open_source(self.recipe.data, "eval", self.recipe.seed)
        return PromptStream(source, self.tokenizer, self.recipe.data, self.recipe.seed, "eval")

    def train_prompts(self, stage_index: int) -> PromptStream:
        """Each stage goes through the training problems in an order of its own."""
        seed = self.stage_seed(stage_index)
        return PromptStream(self._train_source, self.tokenizer, self.recipe.data, seed, "train")

    def stage_seed(self, stage_index: int) -> int:
        """Distinct for every (seed, stage) while there are fewer than 1009 stages."""
        return self.recipe.seed * 1009 + stage_index

    @cached_property
    def sampling(self) -> SamplingParams:
        rollout = self.recipe.rollout
        end: Any = self.tokenizer.eos_token_id
        stop_ids = {int(end), *map(self._stop_id, rollout.stop)}
        return SamplingParams(
            rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k, frozenset(stop_ids)
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

    @property
    def heads(self) -> Heads:
        return heads_of(self.hf, self.recipe.model.vocab_multiple)

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return stream_hf(self.engine.chunks, self.layout, self.heads)

    def sync_weights(self) -> None:
        """The sampler takes the policy's weights."""
        self.sampler.load(self.hf_tensors())

    def evaluate(self) -> dict[str, float]:
        """The sampler's current weights on held-out problems."""
        block = self.recipe.eval
        params = SamplingParams(
            self.sampling.max_new_tokens,
            block.temperature,
            self.sampling.top_p,
            self.sampling.top_k,
            self.sampling.stop_ids,
        )
        return evaluate(
            self.sampler, self.eval_problems, self.rewards, params, block, self.layout, self.recipe.seed
        )

    def export(self, directory: Path) -> None:
        write_hf_directory(self.hf_tensors(), self.hf, self.tokenizer, directory, write=self.is_lead)
        dist.barrier()


def build(recipe: Recipe, *, quiet: bool = False, fresh: bool = True) -> Parts:
    """Join the other ranks and build the engine. `fresh` loads the initial weights; else a checkpoint
    follows."""
    initialize_process_group()
    check_world_size(recipe, dist.get_world_size())
    layout = initialize_layout(recipe.parallel, recipe.seed)
    console = Console(quiet=quiet) if layout.rank == 0 else Console.silent()
    tokenizer = load_tokenizer(recipe.model)
    with console.phase("building the model"):
        directory = _model_directory(recipe, tokenizer, layout, fresh)
        hf = AutoConfig.from_pretrained(directory, local_files_only=True)
        engine = PolicyEngine(hf, recipe.model, recipe.train, layout)
        parts = Parts(recipe, layout, console, tokenizer, hf, engine)
        if fresh:
            load_hf(engine.chunks, layout, parts.heads, HfDirectory(directory))
            engine.weights_changed()
    return parts


def _model_directory(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, layout: Layout, fresh: bool) -> Path:
    model = recipe.model
    if model.hf is not None:
        return Path(local_model_directory(model.hf))
    assert model.scratch is not None
    directory = recipe.run.dir / "init"
    if fresh:
        if layout.rank == 0:
            write_scratch_model(model.scratch, tokenizer, model.dtype, recipe.seed, directory)
        dist.barrier()
    return directory
