"""The policy engine: forward, loss, backward, step over any pipeline schedule, and log-probs under any set of
weights.

# T packed tokens of one micro-batch
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig

from grpo_mega.engine.device import device
from grpo_mega.engine.model import build_chunks
from grpo_mega.engine.optimizer import Update, apply_update, build_optimizer, wrap_data_parallel
from grpo_mega.engine.parallel import Layout, broadcast_object
from grpo_mega.engine.schedule import begin_update, run_schedule, use_global_denominators
from grpo_mega.kernels.implementation import Implementation
from grpo_mega.monitor.metrics import Metrics, merge, reduce
from grpo_mega.recipe.blocks import ModelBlock, TrainBlock
from grpo_mega.types import PackedBatch


@dataclass(frozen=True, slots=True)
class TokenOutputs:
    """What the policy says about one micro-batch; aligned with the tokens themselves, not with their
    predictors."""

    logprobs_T: torch.Tensor  # float32; 0 at tokens that are none of a response's
    entropy_T: torch.Tensor
    sq_prob_T: torch.Tensor  # sum of squared probabilities, without a gradient


@dataclass(frozen=True, slots=True)
class LossTerms:
    """A micro-batch's part of the update's loss (parts add up) and what to report of it."""

    loss: torch.Tensor
    metrics: Metrics


LossFunction = Callable[[TokenOutputs, PackedBatch], LossTerms]
Weights = dict[str, torch.Tensor]


class PolicyEngine:
    """A Megatron model with its optimizer, on this rank.

    Example:
        engine = PolicyEngine(hf_config, recipe.model, recipe.train, layout)
        metrics, update = engine.train_step(micro_batches, loss_function, lr=1e-4)
    """

    def __init__(
        self,
        hf: PretrainedConfig,
        model: ModelBlock,
        train: TrainBlock,
        layout: Layout,
        kernels: Implementation = "eager",
    ):
        self.hf, self.layout = hf, layout
        self.config, bare = build_chunks(hf, model, layout, kernels)
        self.chunks = wrap_data_parallel(self.config, bare)
        self._train = train
        self.optimizer = build_optimizer(train, self.config, self.chunks)
        use_global_denominators(self.config, self.optimizer)

    def weights_changed(self) -> None:
        """Call after writing parameters from outside: the optimizer keeps float32 copies of them."""
        self.optimizer.reload_model_params()

    def train_step(
        self,
        micro_batches: Sequence[PackedBatch],
        loss_function: LossFunction,
        lr: float,
        temperature: float = 1.0,
    ) -> tuple[Metrics, Update]:
        """One optimizer step over micro-batches. Metrics are this rank's, and only the last stage has any."""
        begin_update(self.chunks, self.optimizer)
        results = self._run(micro_batches, temperature, partial(_loss_of, loss_function), forward_only=False)
        update = apply_update(self.optimizer, lr)
        return merge(results), update

    def logprobs(self, micro_batches: Sequence[PackedBatch], temperature: float = 1.0) -> list[torch.Tensor]:
        """Log-prob of every response token of every micro-batch; empty on all but the last pipeline stage."""
        with torch.no_grad():
            return self._run(micro_batches, temperature, _logprobs_of, forward_only=True)

    def _run(
        self,
        micro_batches: Sequence[PackedBatch],
        temperature: float,
        consume: Callable[[PackedBatch, torch.Tensor], tuple[torch.Tensor, Any]],
        *,
        forward_only: bool,
    ) -> list[Any]:
        return run_schedule(
            self.chunks,
            micro_batches,
            lambda chunk, batch: chunk(batch, temperature),
            lambda index, output: consume(micro_batches[index], output),
            forward_only=forward_only,
        )

    def reduce_metrics(
        self, metrics: Metrics, histograms: dict[str, list[float]] | None = None
    ) -> dict[str, float]:
        """What `train_step` measured, over all ranks, on all ranks; bin counts go into `histograms`."""
        layout, counts = self.layout, {}
        reduced = reduce(metrics, layout.dp_group, counts) if layout.is_last_stage else None
        if layout.pp_size > 1:
            reduced, counts = broadcast_object((reduced, counts), layout.last_stage_rank, layout.pp_group)
        assert reduced is not None
        if histograms is not None:
            histograms |= counts
        return reduced

    def copy_weights(self, *, on_host: bool = False) -> Weights:
        """A frozen copy of this rank's parameters, to compute with later (a reference model)."""
        return {
            name: p.detach().to("cpu" if on_host else p.device, copy=True)
            for name, p in self._named_parameters()
        }

    @contextmanager
    def using(self, weights: Weights) -> Iterator[None]:
        """Inside, the model has these weights; its own are untouched (no second model, no copy when already
        on device)."""
        own = {name: p.data for name, p in self._named_parameters()}
        try:
            for name, parameter in self._named_parameters():
                parameter.data = weights[name].to(device(), non_blocking=True)
            yield
        finally:
            for name, parameter in self._named_parameters():
                parameter.data = own[name]

    def _named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for index, chunk in enumerate(self.chunks):
            for name, parameter in chunk.named_parameters():
                yield f"{index}.{name}", parameter


def at_own_token(predicted_T: torch.Tensor) -> torch.Tensor:
    """Shift log-probs from the position that predicts to the token that is predicted."""
    return torch.roll(predicted_T, 1)


def _outputs(output: torch.Tensor) -> TokenOutputs:
    return TokenOutputs(*(at_own_token(row) for row in output))


def _loss_of(
    loss_function: LossFunction, batch: PackedBatch, output: torch.Tensor
) -> tuple[torch.Tensor, Metrics]:
    terms = loss_function(_outputs(output), batch)
    return terms.loss, terms.metrics


def _logprobs_of(batch: PackedBatch, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return output.sum(), _outputs(output).logprobs_T
