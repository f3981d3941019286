"""One pass over an update's micro-batches, by Megatron's schedule for the layout: any number of pipeline
stages and chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

from grpo_mega.types import PackedBatch

Forward = Callable[[torch.nn.Module, PackedBatch], torch.Tensor]
Consume = Callable[[int, torch.Tensor], tuple[torch.Tensor, Any]]
"""From a micro-batch's number and the last stage's output to its part of the loss, and what is kept."""


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[PackedBatch],
    forward: Forward,
    consume: Consume,
    *,
    forward_only: bool,
) -> list[Any]:
    """On the last stage what was kept of every micro-batch; nothing on the others."""

    def finish(index: int, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
        loss, kept = consume(index, output)
        no_token_count = torch.zeros((), dtype=torch.int, device=output.device)
        return loss, no_token_count, kept

    def forward_step(
        batches: Iterator[tuple[int, PackedBatch]], chunk: torch.nn.Module
    ) -> tuple[torch.Tensor, Any]:
        index, batch = next(batches)
        return forward(chunk, batch), partial(finish, index)

    several = len(chunks) > 1
    iterators: list[Any] = [iter(enumerate(micro_batches)) for _ in chunks]
    models: list[Any] = list(chunks)
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if several else iterators[0],
        model=models if several else models[0],
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].tokens_T.shape[0],
        micro_batch_size=1,
        forward_only=forward_only,
    )


def use_global_denominators(config: TransformerConfig, optimizer: MegatronOptimizer) -> None:
    """Losses arrive divided by their global denominators: gradients are summed, and not divided by a token
    count again."""
    config.finalize_model_grads_func = _finalize
    config.grad_scale_func = optimizer.scale_loss


def _finalize(chunks: list[torch.nn.Module], num_tokens: Any = None, **kwargs: Any) -> None:
    finalize_model_grads(chunks, None, **kwargs)


def begin_update(chunks: Sequence[Any], optimizer: MegatronOptimizer) -> None:
    """No gradients left of the update before."""
    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
