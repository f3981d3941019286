"""The blocks of a recipe: every key a run can be given, typed, frozen, documented. `schema` joins them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from grpo_mega.algo.innovations import Innovations
from grpo_mega.algo.innovations._base import Level, Surrogate
from grpo_mega.algo.objectives import CispoObjective, ClipObjective, GmpoObjective
from grpo_mega.block import Block, NotNegative, Positive
from grpo_mega.recipe.stage_blocks import Schedule


class RunBlock(Block):
    name: str = "run"
    """Shown in logs and trackers."""
    dir: Path = Path("runs/run")
    """Everything the run writes goes here."""


class ScratchModel(Block):
    """A model made from nothing; its tokenizer has one token for each printable ASCII character."""

    family: Literal["qwen2", "qwen3", "llama", "qwen3_moe"] = "qwen2"
    layers: Positive = 4
    hidden: Positive = 128
    heads: Positive = 4
    kv_heads: Positive = 2
    ffn: Positive = 384
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    max_positions: Positive = 512
    experts: Positive = 4
    """qwen3_moe only: experts in each layer."""
    experts_per_token: Positive = 2
    """qwen3_moe only."""

    @model_validator(mode="after")
    def heads_share_hidden_and_kv_heads_evenly(self) -> ScratchModel:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"hidden ({self.hidden}) must be a multiple of heads ({self.heads}), "
                f"and heads of kv_heads ({self.kv_heads})"
            )
        return self


class ModelBlock(Block):
    hf: str | None = None
    """A Hugging Face model directory (or a name in the local cache): weights, tokenizer, shape."""
    scratch: ScratchModel | None = None
    """Or: a randomly initialised model of this shape."""
    tokenizer: str | None = None
    """A tokenizer directory; null means the model's own."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of parameters and activations; the optimizer and every log-probability are float32 all the same."""
    attention: Literal["auto", "local", "transformer_engine"] = "auto"
    """auto: Transformer Engine where it is importable on a GPU and cp is 1, else torch's own."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: memory for time."""
    vocab_multiple: Positive = 128
    """The vocabulary is padded to a multiple of this, whatever the layout: checkpoints fit every layout."""

    @model_validator(mode="after")
    def exactly_one_origin(self) -> ModelBlock:
        if (self.hf is None) == (self.scratch is None):
            raise ValueError("give exactly one of model.hf (a directory) and model.scratch (a shape)")
        return self


class ParallelBlock(Block):
    tp: Positive = 1
    """Tensor parallel: each layer's matrices over this many ranks."""
    pp: Positive = 1
    """Pipeline parallel: the layers over this many stages."""
    vpp: Positive = 1
    """Virtual stages on each pipeline rank (interleaved schedule); 1 = off."""
    cp: Positive = 1
    """Context parallel: each sequence over this many ranks."""
    ep: Positive = 1
    """Expert parallel: a layer's experts over this many of the data-parallel ranks."""
    dp: Positive = 1
    """Data parallel: this many copies, each with its share of the batch."""
    sequence_parallel: bool = False
    """Activations between tensor-parallel regions are split along the sequence; needs tp > 1."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @model_validator(mode="after")
    def vpp_needs_a_pipeline(self) -> ParallelBlock:
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"vpp = {self.vpp} interleaves pipeline stages: it needs pp > 1 (pp is 1)")
        return self

    @model_validator(mode="after")
    def sequence_parallel_needs_tp(self) -> ParallelBlock:
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("sequence_parallel splits over tensor-parallel ranks: it needs tp > 1 (tp is 1)")
        return self

    @model_validator(mode="after")
    def ep_divides_dp(self) -> ParallelBlock:
        if (self.dp * self.cp) % self.ep:
            raise ValueError(f"ep ({self.ep}) must divide dp x cp ({self.dp * self.cp})")
        return self


class DataBlock(Block):
    source: Literal["procedural", "jsonl", "parquet", "reasoning_gym"] = "procedural"
    """procedural: a built-in task; jsonl / parquet: files; reasoning_gym: one of its data sets."""
    task: str | None = None
    """procedural and reasoning_gym: which task."""
    options: dict[str, Any] = Field(default_factory=dict)
    """procedural and reasoning_gym: arguments of the task."""
    train: Path | Positive | None = None
    """A file, or for generated tasks the number of distinct problems."""
    eval: Path | Positive | None = None
    """Held-out problems: a file (null: no evaluation), for generated tasks their number; none is in train."""
    template: Literal["raw", "chat"] = "raw"
    """raw: the prompt text as it is; chat: through the tokenizer's chat template."""
    system: str | None = None
    """chat: a system message put before every prompt."""
    prompt_key: str = "prompt"
    """files: the field with the prompt: a string, or a list of {role, content} messages."""
    answer_key: str = "answer"
    """files: the field with the reference answer."""
    teacher_key: str = "teacher_response"
    """files: the field with the text that supervised stages learn (optional in the file)."""
    max_prompt_tokens: Positive = 1024
    """A longer prompt is a bad line."""
    on_bad_line: Literal["fail", "skip"] = "fail"
    """files: stop at a line that cannot be used, or report and skip it."""
    shuffle: bool = True
    """A new order each epoch, from the seed."""


GSPO_CLIP = ClipObjective(low=3e-4, high=4e-4)
"""A geometric mean of ratios moves far less than a ratio."""


class AdvantageBlock(Block):
    estimator: Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "gae"] = "grpo"
    """grpo: (reward - group mean) / (group std + epsilon); dr_grpo: reward - group mean; rloo: reward - mean
    of the other samples; reinforce_plus_plus: (reward - mean) / std over the whole step's samples; gae: of
    every token, from the values of critic.kind value."""
    normalize_std: bool = True
    """grpo: false leaves out the division. reinforce_plus_plus: likewise, over the step. gae: false leaves
    the step's advantages as they are, true gives them mean 0 and std 1 over its response tokens."""
    group_baseline: bool = False
    """reinforce_plus_plus: subtract the group's mean first (then the mean over the step is 0 already)."""
    epsilon: float = Field(default=1e-6, gt=0)


class Objective(Block):
    """What takes ratio and advantage to a number: exactly one."""

    clip: ClipObjective | None = None
    """PPO's clip; high: .28 is clip-higher."""
    cispo: CispoObjective | None = None
    """The clipped ratio only weighs the log-likelihood."""
    gmpo: GmpoObjective | None = None
    """Geometric mean of clipped token ratios."""

    @property
    def surrogate(self) -> ClipObjective | CispoObjective | GmpoObjective:
        surrogate = self.clip or self.cispo or self.gmpo
        assert surrogate is not None
        return surrogate

    @model_validator(mode="after")
    def exactly_one_objective(self) -> Objective:
        if sum(value is not None for value in (self.clip, self.cispo, self.gmpo)) != 1:
            raise ValueError("an objective is exactly one of clip, cispo, gmpo")
        return self


_OBJECTIVE_KEYS: dict[type[Surrogate], str] = {
    ClipObjective: "clip",
    CispoObjective: "cispo",
    GmpoObjective: "gmpo",
}


class CorrectionBlock(Block):
    """What is done about sampler and trainer giving the same token different probabilities."""

    kind: Literal["none", "tis", "mis"] = "none"
    """tis: each token's objective is weighted by min(trainer / sampler probability, cap), the trainer's under
    the weights that sampled; mis: by that ratio where it lies within [floor, cap], by 0 elsewhere. With a
    correction the policy ratio is taken against the trainer's own probabilities."""
    level: Literal["token", "sequence"] = "token"
    """sequence: the product over the response's tokens in place of the token's own ratio."""
    cap: float = Field(default=2.0, ge=1)
    floor: float = Field(default=0.0, ge=0, le=1)
    """mis: a smaller ratio is masked too; 0 = off."""


class KlBlock(Block):
    coef: float = Field(default=0.0, ge=0)
    """0: no reference model is held at all."""
    estimator: Literal["k1", "k2", "k3", "abs"] = "k3"
    reference_on: Literal["device", "host"] = "device"
    """Where the frozen reference weights wait between uses; host saves GPU memory."""


class LossBlock(Block):
    innovations: Innovations = Field(default_factory=Innovations)
    """Token-level weightings by name, {} inside for their defaults; none = plain clipped GRPO."""
    objective: Objective | None = None
    """null: the objective an innovation brings, else the PPO clip .2/.2 with dual bound 3 (3e-4/4e-4 under
    gspo)."""
    kl: KlBlock = KlBlock()
    entropy_coef: float = Field(default=0.0, ge=0)
    aggregate: Literal[
        "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = "token-mean"
    """How per-token losses become one number; denominators are those of the whole update, all ranks."""
    norm_length: Positive | None = None
    """seq-mean-token-sum-norm: each sequence's sum is divided by this; null = rollout.max_new_tokens."""
    correction: CorrectionBlock = CorrectionBlock()

    @property
    def surrogate(self) -> Surrogate:
        """What decides the objective: an innovation, the recipe, or the default."""
        picked = self.innovations.picked()
        brought = [value for value in picked.values() if isinstance(value, Surrogate)]
        if brought:
            return brought[0]
        if self.objective is not None:
            return self.objective.surrogate
        return GSPO_CLIP if "gspo" in picked else ClipObjective()

    def steered(self, *, kl_coef: float | None, clip: float | None) -> LossBlock:
        """With at least this KL coefficient, and every clip range at most `clip`."""
        changes: dict[str, object] = {}
        if kl_coef is not None:
            changes["kl"] = self.kl.model_copy(update={"coef": max(self.kl.coef, kl_coef)})
        if clip is not None:
            narrow = self.surrogate.narrowed(clip)
            bringer = [n for n, i in self.innovations.picked().items() if isinstance(i, Surrogate)]
            if bringer:
                changes["innovations"] = self.innovations.model_copy(update={bringer[0]: narrow})
            else:
                changes["objective"] = Objective.model_validate({_OBJECTIVE_KEYS[type(narrow)]: narrow})
        return self.model_copy(update=changes)

    @model_validator(mode="after")
    def an_innovation_brings_its_own_objective(self) -> LossBlock:
        if self.objective is None:
            return self
        for name, innovation in self.innovations.picked().items():
            if isinstance(innovation, Surrogate):
                raise ValueError(
                    f"loss.innovations.{name} takes the place of loss.objective: set loss.objective to null, "
                    f"or remove loss.innovations.{name}"
                )
        return self

    @model_validator(mode="after")
    def gmpo_means_over_tokens_itself(self) -> LossBlock:
        for name, innovation in self.innovations.picked().items():
            if (
                self.objective is not None
                and self.objective.gmpo is not None
                and isinstance(innovation, Level)
            ):
                raise ValueError(
                    f"loss.objective.gmpo and loss.innovations.{name} both make one ratio of a sequence: "
                    "remove one of them"
                )
        return self


class TrainBlock(Block):
    kernels: Literal["auto", "eager", "compiled", "triton"] = "auto"
    """How the log-probabilities and the policy loss are computed. auto: triton on a GPU; on a CPU compiled
    where it pays, else eager."""
    steps: NotNegative | None = None
    """Caps the steps of every stage; null = the stages' own."""
    lr: float = Field(default=1.0e-4, gt=0)
    schedule: Schedule = "constant"
    """After the warm-up: constant, or to lr * min_lr_ratio at the stage's end."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    warmup_steps: NotNegative = 5
    """The rate rises linearly from 0 over these steps, at the start of each stage."""
    weight_decay: float = Field(default=0.0, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = Field(default=1e-8, gt=0)
    micro_batch_tokens: Positive = 4096
    """Sequences are packed into micro-batches of at most this many tokens (a longer sequence is its own)."""
    updates_per_batch: Positive = 1
    """Optimizer steps on each step's samples; whole groups stay together."""
    grad_clip: float = Field(default=1.0, gt=0)
    """Global gradient norm."""
