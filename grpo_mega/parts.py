"""The parts of a run, built from its recipe in one place: what `train`, `eval` and `export` work with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from grpo_mega.algo.innovations.sca import Sca
from grpo_mega.algo.objective import PolicyLoss
from grpo_mega.algo.segments import Markers
from grpo_mega.batching import distribute
from grpo_mega.critic.engine import CriticEngine
from grpo_mega.data.selection import Selection
from grpo_mega.data.tokenizer import load_tokenizer
from grpo_mega.engine.device import device, has_gpu
from grpo_mega.engine.model import DTYPES
from grpo_mega.engine.parallel import (
    Layout,
    collective_limit,
    initialize_layout,
    initialize_process_group,
)
from grpo_mega.engine.policy import PolicyEngine
from grpo_mega.engine.scratch import write_scratch_model
from grpo_mega.evaluation import Evaluation, evaluate
from grpo_mega.inputs import Inputs
from grpo_mega.kernels.implementation import Implementation, choose
from grpo_mega.kernels.logprob_check import check_linear_logprob
from grpo_mega.model_shape import local_model_directory
from grpo_mega.monitor.console import Console
from grpo_mega.monitor.health import Caps
from grpo_mega.plan import check_world_size
from grpo_mega.recipe.blocks import LossBlock
from grpo_mega.recipe.schema import Recipe
from grpo_mega.rollout.local import LocalEngine
from grpo_mega.rollout.managed import ModelFacts
from grpo_mega.rollout.rank import Rank
from grpo_mega.rollout.replay import RolloutDump, RolloutReplay
from grpo_mega.rollout.sampler import Sampler
from grpo_mega.rollout.sglang import SglangEngine
from grpo_mega.rollout_files import RolloutFiles
from grpo_mega.self_check import check_policy_loss
from grpo_mega.sync.export import write_hf_directory
from grpo_mega.sync.layout import Heads
from grpo_mega.sync.proof import Probe
from grpo_mega.sync.stream import HfDirectory, heads_of, load_hf, stream_hf
from grpo_mega.types import TrainSequence

NO_FILES = RolloutFiles()
START_FOLDER = "critic_start"
PROBE_TOKENS = 64
PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Of log-probs, on average, between the trainer and a server with the same weights."""


@dataclass
class Parts:
    """Everything on this rank. The sampler is made when first used: an export needs none."""

    recipe: Recipe
    layout: Layout
    console: Console
    inputs: Inputs
    hf: PretrainedConfig
    engine: PolicyEngine
    kernels: Implementation
    critic: CriticEngine | None = None  # where the recipe has one
    dump: RolloutDump | None = None  # where samples are kept
    replay: RolloutReplay | None = None  # where samples are read, in place of a sampler
    missing_uids: int = 0  # samples so far that came without one
    _steered: dict[Caps, PolicyLoss] = field(default_factory=dict[Caps, PolicyLoss])

    @property
    def is_lead(self) -> bool:
        return self.layout.rank == 0

    @property
    def run_dir(self) -> Path:
        return self.recipe.run.dir

    @cached_property
    def sampler(self) -> Sampler:
        rollout, dtype, tokenizer = self.recipe.rollout, self.recipe.model.dtype, self.inputs.tokenizer
        if rollout.engine == "sglang":
            facts = ModelFacts(self.hf, tokenizer, dtype, has_gpu())
            rank = Rank(self.layout.rank, self.layout.world_size)
            no_checksums = has_gpu() or rollout.sglang.tp > 1  # of parts, while they stream past
            probe = self.probe if no_checksums else None
            function = self.inputs.generate
            return SglangEngine(rollout, facts, self.run_dir, rank, probe, self.recipe.seed, function)
        batch = rollout.prompts_per_batch
        return LocalEngine(self.hf, tokenizer, DTYPES[dtype], device(), batch, self.inputs.generate)

    @cached_property
    def policy_loss(self) -> PolicyLoss:
        return self._policy_loss(self.recipe.loss)

    def steered_loss(self, caps: Caps) -> PolicyLoss:
        """As the recipe says, within what the guard allows."""
        if caps.kl_coef is None and caps.clip is None:
            return self.policy_loss
        if caps not in self._steered:
            self._steered[caps] = self._policy_loss(
                self.recipe.loss.steered(kl_coef=caps.kl_coef, clip=caps.clip)
            )
        return self._steered[caps]

    def _policy_loss(self, block: LossBlock) -> PolicyLoss:
        """A number that is not finite makes the gradient so, and then no rank's weights move."""
        return PolicyLoss(
            block,
            default_norm_length=self.recipe.rollout.max_new_tokens,
            implementation=self.kernels,
            reject_not_finite=False,
        )

    @cached_property
    def markers(self) -> Markers | None:
        """Of structured credit, where the recipe picks it."""
        sca = self.recipe.loss.innovations.picked().get("sca")
        if not isinstance(sca, Sca):
            return None
        ids = [tuple(self.inputs.tokenizer.encode(text, add_special_tokens=False)) for text in sca.markers]
        return Markers(*ids)

    def warn_of_missing_uids(self, count: int) -> None:
        """Said once; the count goes on."""
        if not self.missing_uids:
            self.console.say("[EMA-GRPO] Warning: No uid found, using temporary sequence IDs")
        self.missing_uids += count

    def check_kernels(self) -> list[str]:
        """Against float64, on every rank; what to print. A mismatch refuses to start."""
        dtype = DTYPES[self.recipe.model.dtype]
        error = check_linear_logprob(self.kernels, device(), dtype)
        length = self.recipe.rollout.max_new_tokens
        return [
            f"log-probabilities: {self.kernels}, within {error:.0e} of float64",
            check_policy_loss(self.recipe.loss, self.kernels, device(), length),
            *self.policy_loss.startup_lines(),
        ]

    @property
    def heads(self) -> Heads:
        return heads_of(self.hf, self.recipe.model.vocab_multiple)

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return stream_hf(self.engine.chunks, self.layout, self.heads)

    def sync_weights(self) -> dict[str, float]:
        """The sampler takes the policy's weights; what is known of the way there."""
        if self.replay is not None:
            return {}
        if isinstance(self.sampler, SglangEngine):
            self.sampler.load(_Again(self))
            return self.sampler.metrics
        self.sampler.load(self.hf_tensors())
        return {}

    def rest_sampler(self) -> None:
        """Before training: servers on the same GPUs make room."""
        colocated = self.recipe.rollout.sglang.colocate and self.replay is None
        if colocated and isinstance(self.sampler, SglangEngine):
            self.sampler.rest()

    def probe(self) -> Probe:
        """What the policy thinks of a made-up text, on every rank; a collective."""
        length = min(PROBE_TOKENS, self.hf.max_position_embeddings)
        ids = np.random.default_rng(0).integers(0, self.hf.vocab_size, length)
        made_up = TrainSequence(0, "probe", ids, 1, np.empty(0, np.float32))
        batches, _ = distribute([made_up] if self.is_lead else [], self.layout, length)
        found = [
            values[batch.response_mask_T].tolist()
            for batch, values in zip(batches, self.engine.logprobs(batches), strict=False)
            if batch.num_sequences
        ]
        everywhere: list[list[list[float]]] = [[] for _ in range(self.layout.world_size)]
        dist.all_gather_object(everywhere, found)  # of some ranks: the last stage, where the text went
        logprobs = next(part[0] for part in everywhere if part)
        return Probe(tuple(ids.tolist()), tuple(logprobs), PROBE_TOLERANCE[self.recipe.model.dtype])

    def evaluate(self, selection: Selection | None = None) -> Evaluation:
        """The sampler's current weights on held-out problems: all, or those selected."""
        block, inputs = self.recipe.eval, self.inputs
        params = replace(inputs.sampling, temperature=block.temperature)
        problems = inputs.eval_prompts(selection)
        return evaluate(self.sampler, problems, inputs.rewards, params, block, self.layout, self.recipe.seed)

    def export(self, directory: Path) -> None:
        write_hf_directory(self.hf_tensors(), self.hf, self.inputs.tokenizer, directory, write=self.is_lead)
        dist.barrier()


@dataclass(frozen=True)
class _Again:
    """The policy's weights, streamed each time it is iterated."""

    parts: Parts

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.parts.hf_tensors()


def build(
    recipe: Recipe,
    *,
    quiet: bool = False,
    fresh: bool,
    check_inputs: bool = True,
    files: RolloutFiles = NO_FILES,
) -> Parts:
    """Join the other ranks and build the engine. `fresh` loads the initial weights; else a checkpoint
    follows."""
    limit = collective_limit(recipe.guard.hang_minutes)
    initialize_process_group(limit)
    check_world_size(recipe, dist.get_world_size())
    layout = initialize_layout(recipe.parallel, recipe.seed, limit)
    console = Console(quiet=quiet) if layout.rank == 0 else Console.silent()
    inputs = Inputs(recipe, load_tokenizer(recipe.model))
    if check_inputs:
        with console.phase("opening the data"):
            inputs.check()
    with console.phase("building the model"):
        directory = _model_directory(recipe, inputs.tokenizer, layout, fresh)
        hf = AutoConfig.from_pretrained(directory, local_files_only=True)
        kernels = choose(recipe.train.kernels, on_gpu=has_gpu(), vocab=hf.vocab_size)
        engine = PolicyEngine(hf, recipe.model, recipe.train, layout, kernels)
        parts = Parts(recipe, layout, console, inputs, hf, engine, kernels)
        if files.dump is not None:
            parts.dump = RolloutDump(files.dump, layout.rank, layout.world_size)
        if files.replay is not None:
            parts.replay = RolloutReplay(files.replay)
        if fresh:
            load_hf(engine.chunks, layout, parts.heads, HfDirectory(directory))
            engine.weights_changed()
        if recipe.critic.kind != "none":
            parts.critic = _build_critic(parts, directory, fresh)
    return parts


def _build_critic(parts: Parts, policy: Path, fresh: bool) -> CriticEngine:
    """With the weights of the policy's own model, or those of the one the recipe names for it."""
    recipe, named = parts.recipe, parts.recipe.critic.hf
    directory = policy if named is None else Path(local_model_directory(named))
    hf = AutoConfig.from_pretrained(directory, local_files_only=True)
    critic = CriticEngine(hf, recipe.model, recipe.train, recipe.critic, parts.layout)
    if fresh:
        start_critic(critic, parts, directory)
    return critic


def start_critic(critic: CriticEngine, parts: Parts, directory: Path) -> None:
    """Weights of a Hugging Face directory and a new value head."""
    heads = heads_of(critic.hf, parts.recipe.model.vocab_multiple)
    load_hf(critic.chunks, parts.layout, heads, HfDirectory(directory))
    critic.reset_head(parts.recipe.seed)


def start_from_policy(critic: CriticEngine, parts: Parts) -> None:
    """The policy's present weights and a new value head, unless the recipe wants the critic to keep those it
    was built with. A collective."""
    block = parts.recipe.critic
    if block.hf is not None or block.init == "initial":
        return
    folder = parts.run_dir / "checkpoints" / START_FOLDER
    parts.export(folder)
    start_critic(critic, parts, folder)
    dist.barrier()  # all have read it
    if parts.is_lead:
        shutil.rmtree(folder)


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
