"""The critic's engine: values of every token, and an update from a loss of them, over any pipeline schedule.

It stands beside the policy's engine in the same process and shares no state with it but the process groups.

# T packed tokens of one micro-batch, N sequences of the step, on all ranks
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from grpo_mega.critic.model import ValueModel, build_value_chunks, fill_head
from grpo_mega.critic.scores import ScoredBatch
from grpo_mega.engine.device import device
from grpo_mega.engine.model import unwrap
from grpo_mega.engine.optimizer import Update, apply_update, build_optimizer, wrap_data_parallel
from grpo_mega.engine.parallel import Layout, broadcast_object
from grpo_mega.engine.policy import LossTerms
from grpo_mega.engine.schedule import begin_update, run_schedule, use_global_denominators
from grpo_mega.monitor.metrics import Metrics, merge, reduce
from grpo_mega.recipe.blocks import ModelBlock, TrainBlock
from grpo_mega.recipe.critic_block import CriticBlock
from grpo_mega.types import PackedBatch

ValueLoss = Callable[[torch.Tensor, int], LossTerms]
"""From values_T and the micro-batch's number to its part of the loss."""


class CriticEngine:
    """A Megatron value model with its optimizer, on this rank.

    Example:
        critic = CriticEngine(hf, recipe.model, recipe.train, recipe.critic, layout)
        load_hf(critic.chunks, layout, heads, HfDirectory(directory))
        critic.reset_head(seed)
        scores_N = critic.score(scored_batches, count)
        metrics, update = critic.train_step(micro_batches, loss, lr=1e-6, grad_clip=.2)
    """

    def __init__(
        self,
        hf: PretrainedConfig,
        model: ModelBlock,
        train: TrainBlock,
        critic: CriticBlock,
        layout: Layout,
    ):
        self.hf, self.layout, self._block = hf, layout, critic
        self.config, bare = build_value_chunks(hf, model, layout)
        self.chunks = wrap_data_parallel(self.config, bare)
        own = {"lr": critic.lr, "weight_decay": critic.weight_decay, "grad_clip": critic.grad_clip}
        self.optimizer = build_optimizer(train.model_copy(update=own), self.config, self.chunks)
        use_global_denominators(self.config, self.optimizer)

    def weights_changed(self) -> None:
        """Call after writing parameters from outside: the optimizer keeps float32 copies of them."""
        self.optimizer.reload_model_params()

    def reset_head(self, seed: int) -> None:
        """A new value head, the same on every layout; the last thing to do to a fresh critic."""
        for chunk in map(unwrap, self.chunks):
            assert isinstance(chunk, ValueModel)
            if chunk.post_process:
                fill_head(chunk.output_layer, seed, self._block.head_std)
        self.weights_changed()

    def values(self, micro_batches: Sequence[PackedBatch]) -> list[torch.Tensor]:
        """values_T of every micro-batch, with one of them in memory at a time; empty on all but the last
        pipeline stage."""
        with torch.no_grad():
            return self._run(micro_batches, lambda index, values_T: LossTerms(values_T.sum(), {}), keep=True)

    def score(self, batches: Sequence[ScoredBatch], count: int) -> torch.Tensor:
        """raw_scores_N, float64: one number of each of the step's `count` sequences, on every rank. A
        collective.

        Each rank brings the scores of its own sequences; a sum over ranks in which all but one are 0 is
        exact.
        """
        raw_N = torch.zeros(count, dtype=torch.float64, device=device())
        layout = self.layout
        values = self.values([scored.batch for scored in batches])
        if layout.is_last_stage and layout.tp_rank == 0 and layout.cp_rank == 0:
            for scored, values_T in zip(batches, values, strict=True):
                raw_N[scored.orders_B] = scored.raw_scores(values_T)
        dist.all_reduce(raw_N)
        return raw_N

    def train_step(
        self,
        micro_batches: Sequence[PackedBatch],
        loss: ValueLoss,
        lr: float,
        *,
        grad_clip: float | None = None,
    ) -> tuple[Metrics, Update]:
        """One optimizer step over micro-batches; their losses add up. Metrics are this rank's, and only the
        last stage has any. `grad_clip` None: the recipe's."""
        begin_update(self.chunks, self.optimizer)
        results = self._run(micro_batches, lambda index, values_T: loss(values_T, index), keep=False)
        self._clip_at(self._block.grad_clip if grad_clip is None else grad_clip)
        return merge(results), apply_update(self.optimizer, lr)

    def reduce_metrics(self, metrics: Metrics) -> dict[str, float]:
        """What `train_step` measured, over all ranks, on all ranks."""
        layout = self.layout
        reduced = reduce(metrics, layout.dp_group) if layout.is_last_stage else None
        if layout.pp_size == 1:
            assert reduced is not None
            return reduced
        return broadcast_object(reduced, layout.last_stage_rank, layout.pp_group)

    def _clip_at(self, norm: float) -> None:
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            part.config.clip_grad = norm

    def _run(
        self,
        micro_batches: Sequence[PackedBatch],
        loss: Callable[[int, torch.Tensor], LossTerms],
        *,
        keep: bool,
    ) -> list[Any]:
        """On the last stage, of each micro-batch: its metrics, or its values_T where they are kept, which
        needs no backward pass."""

        def consume(index: int, values_T: torch.Tensor) -> tuple[torch.Tensor, Any]:
            terms = loss(index, values_T)
            return terms.loss, values_T if keep else terms.metrics

        return run_schedule(
            self.chunks, micro_batches, lambda chunk, batch: chunk(batch), consume, forward_only=keep
        )
