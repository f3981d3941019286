"""Which rank does what: the only reader of Megatron's process groups. Everything else sees `Layout`."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from grpo_mega.engine.device import bind_local_rank, device, process_group_backend
from grpo_mega.recipe.blocks import ParallelBlock

DEFAULT_LIMIT = datetime.timedelta(minutes=30)
"""Of a collective."""


@dataclass(frozen=True)
class Layout:
    """This rank's place in the grid and the groups it talks to.

    Megatron's order: tensor fastest, then context, data, pipeline. With tp = 2, dp = 2, pp = 1 rank 3 is
    tp_rank 1, dp_rank 1.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vpp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    sequence_parallel: bool  # activations between tensor-parallel regions split over tp
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    dp_rank_of_rank: tuple[int, ...]  # for every rank of the world

    @property
    def length_multiple(self) -> int:
        """Micro-batches of a multiple of this split evenly over context and sequence parallel ranks."""
        return self.cp_size * (self.tp_size if self.sequence_parallel else 1)

    @property
    def micro_batch_multiple(self) -> int:
        """Interleaved pipelines want whole rounds of micro-batches."""
        return self.pp_size if self.vpp_size > 1 else 1

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def last_stage_rank(self) -> int:
        """The global rank of this pipeline's last stage, where losses and log-probs live."""
        return dist.get_global_rank(self.pp_group, self.pp_size - 1)


def collective_limit(hang_minutes: float) -> datetime.timedelta:
    """A little more than the watchdog's, whose words say more: which rank is missing, and where all are."""
    return datetime.timedelta(minutes=hang_minutes + 2) if hang_minutes else datetime.timedelta(days=7)


def initialize_process_group(limit: datetime.timedelta = DEFAULT_LIMIT) -> None:
    """Join the other ranks; torchrun (or our launcher) has set the environment."""
    if not dist.is_initialized():
        bind_local_rank(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(process_group_backend(), timeout=limit)


def initialize_layout(
    parallel: ParallelBlock, seed: int, limit: datetime.timedelta = DEFAULT_LIMIT
) -> Layout:
    """Build Megatron's groups. Calling it again with another layout replaces them."""
    initialize_process_group(limit)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        distributed_timeout_minutes=limit.total_seconds() / 60,  # each group has one of its own
        create_gloo_process_groups=True,  # the distributed optimizer gathers its checkpoints over them
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Layout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel.tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel.pp,
        vpp_size=parallel.vpp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel.cp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel.ep,
        sequence_parallel=parallel.sequence_parallel,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        dp_rank_of_rank=_gather(parallel_state.get_data_parallel_rank()),
    )


def _gather(number: int) -> tuple[int, ...]:
    numbers = torch.empty(dist.get_world_size(), dtype=torch.int64, device=device())
    dist.all_gather_into_tensor(numbers, torch.tensor([number], device=device()))
    return tuple(numbers.tolist())


def shutdown() -> None:
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def holds_stage(vp_stage: int | None, *, first: bool) -> bool:
    """Whether this rank's chunk is the pipeline's first (or last) one."""
    test = parallel_state.is_pipeline_first_stage if first else parallel_state.is_pipeline_last_stage
    return test(ignore_virtual=vp_stage is None, vp_stage=vp_stage)


def checkpoint_metadata() -> dict[str, object]:
    """How Megatron shards what it writes: any layout can read it back."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def broadcast_object(value: Any, source: int, group: dist.ProcessGroup | None = None) -> Any:
    """The source rank's (small, picklable) object, on every rank of the group."""
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group, device=device())
    return box[0]
