"""The optimizer and its learning rate. The rate is a pure function of the stage's step, so that a resumed run
needs no state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig

from grpo_mega.recipe.blocks import TrainBlock
from grpo_mega.recipe.stage_blocks import Schedule


@dataclass(frozen=True, slots=True)
class RateSchedule:
    """Linear warm-up from 0, then constant, or to `minimum` at the last step.

    Example: RateSchedule(peak=1e-3, warmup_steps=2, total_steps=4, kind="linear", minimum=0.0)
             gives 5e-4, 1e-3, 5e-4, 0 for steps 0 to 3
    """

    peak: float
    warmup_steps: int
    total_steps: int
    kind: Schedule
    minimum: float

    def at(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        remaining_steps = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step + 1 - self.warmup_steps) / remaining_steps)
        remaining = 1.0 - progress if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.minimum + (self.peak - self.minimum) * remaining


@dataclass(frozen=True, slots=True)
class Update:
    """What became of one optimizer step."""

    applied: bool  # false: the gradient was not finite and the weights are unchanged
    grad_norm: float  # before clipping


def wrap_data_parallel(
    config: TransformerConfig, chunks: Sequence[torch.nn.Module]
) -> list[DistributedDataParallel]:
    """Megatron's data parallelism: gradients are reduced in float32, into the shards that the optimizer
    owns."""
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    wrapped = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def build_optimizer(
    train: TrainBlock, config: TransformerConfig, chunks: Sequence[DistributedDataParallel]
) -> MegatronOptimizer:
    """Adam whose float32 state is sharded over the data-parallel ranks."""
    options = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_betas[0],
        adam_beta2=train.adam_betas[1],
        adam_eps=train.adam_eps,
        clip_grad=train.grad_clip,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(options, list(chunks))


def apply_update(optimizer: MegatronOptimizer, lr: float) -> Update:
    """One step, unless the gradient is not finite: then no rank's weights move (the norm is the same number
    on all)."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return Update(applied=False, grad_norm=norm)
    optimizer.step()
    return Update(applied=True, grad_norm=norm)


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Give a fresh optimizer its (zero) moments, which checkpoints are written from and read into; weights
    stay put."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer.state:
            continue
        for group in part.optimizer.param_groups:
            group["lr"] = 0.0  # the step that allocates must neither move nor decay a weight
        part._init_optimizer_states_with_dummy_values()
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"].zero_()
