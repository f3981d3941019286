"""Log-probability, entropy and sum of squared probabilities of a target token, from hidden states and the
output layer's weight, without ever holding all logits.

A loop over tiles of the vocabulary: a product makes a tile of logits, an epilogue folds it into five numbers
a row. The backward pass makes each tile again. The vocabulary may be split over tensor-parallel ranks, whose
five numbers merge by the same rule as those of tiles.

# T tokens, N of them needed, H hidden, V this rank's columns of the vocabulary, K columns of a tile
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from grpo_mega.kernels.epilogue import Epilogue, RowGradients, Statistics, epilogue_of
from grpo_mega.kernels.implementation import Implementation
from grpo_mega.kernels.products import add_product, factor, product

TILE, GPU_TILE = 2048, 8192
"""Columns of one tile: wide enough for an efficient product, narrow enough for a buffer that is small beside
the weights. A GPU wants it wider: its hidden gradient passes through memory once for each tile."""


def linear_logprob(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_T: torch.Tensor,
    temperature: float,
    tp_group: dist.ProcessGroup | None = None,
    *,
    real_vocab: int | None = None,
    needed_T: torch.Tensor | None = None,
    sequence_parallel: bool = False,
    implementation: Implementation = "eager",
    tile: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p, -sum p log p and sum p^2 in float32, with p = softmax(hidden weight^T / temperature).

    Columns at or beyond `real_vocab` are padding of probability 0; rank r of `tp_group` holds columns
    [r V, (r + 1) V). Rows that `needed_T` leaves out cost nothing and are 0. Under `sequence_parallel` each
    rank brings T / ranks consecutive rows of `hidden_TH`; targets and results are those of all T. The squared
    probabilities have no gradient: they only weigh.

    Example: hidden (1), weight (0), (ln 3), target 1, temperature 1 -> ln .75, .75 ln(4/3) + .25 ln 4, .625
    """
    ranks = dist.get_world_size(tp_group) if tp_group is not None else 1
    columns = _Columns(
        first=(dist.get_rank(tp_group) if tp_group is not None else 0) * weight_VH.shape[0],
        width=weight_VH.shape[0],
        real=weight_VH.shape[0] * ranks if real_vocab is None else real_vocab,
        tile=tile or (GPU_TILE if weight_VH.is_cuda else TILE),
    )
    options = _Options(
        1.0 / temperature, columns, tp_group if ranks > 1 else None, sequence_parallel, implementation
    )
    if needed_T is not None:
        rows_N = needed_T.nonzero()[:, 0]
    else:
        rows_N = torch.arange(target_T.shape[0], device=target_T.device)
    result: Any = _LinearLogprob.apply(hidden_TH, weight_VH, target_T, rows_N, options)
    return result


@dataclass(frozen=True, slots=True)
class _Columns:
    """This rank's part of the vocabulary."""

    first: int
    width: int
    real: int  # of the whole vocabulary; what lies beyond is padding
    tile: int

    def tiles(self) -> Iterator[slice]:
        """Without the padding: a rank may have no tile at all."""
        end = min(self.width, max(0, self.real - self.first))
        for begin in range(0, end, self.tile):
            yield slice(begin, min(begin + self.tile, end))


@dataclass(frozen=True, slots=True)
class _Options:
    scale: float  # of logits: 1 / temperature
    columns: _Columns
    group: dist.ProcessGroup | None
    sequence_parallel: bool
    implementation: Implementation

    @property
    def epilogue(self) -> Epilogue:
        return epilogue_of(self.implementation)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        target_T: torch.Tensor,
        rows_N: torch.Tensor,
        options: _Options,
    ) -> tuple[torch.Tensor, ...]:
        rows_NH = factor(_gathered(hidden_TH, options).index_select(0, rows_N))
        column_N = target_T.index_select(0, rows_N) - options.columns.first
        statistics = Statistics.start(rows_N.shape[0], hidden_TH.device, options.scale)
        for tile in options.columns.tiles():
            logits_NK = product(rows_NH, factor(weight_VH[tile]).t())
            options.epilogue.fold(logits_NK, column_N - tile.start, statistics)
            del logits_NK  # before the next tile's are made
        if options.group is not None:
            _merge_over_ranks(statistics, options.group)
        found = statistics.finish()
        ctx.save_for_backward(
            hidden_TH, weight_VH, column_N, rows_N, found.highest_N, found.log_sum_N, found.entropy_N
        )
        ctx.options = options
        results = []
        for values_N in (found.logprob_N, found.entropy_N, found.sq_prob_N):
            values_T = torch.zeros(target_T.shape[0], dtype=torch.float32, device=hidden_TH.device)
            results.append(values_T.index_copy_(0, rows_N, values_N))
        ctx.mark_non_differentiable(results[2])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """d log p = onehot - p;  d H = -p (log p + H);  both through z = logits / temperature."""
        hidden_TH, weight_VH, column_N, rows_N, *known = ctx.saved_tensors
        options: _Options = ctx.options
        grads_2N = torch.stack([grad.index_select(0, rows_N) for grad in grads[:2]]).mul_(options.scale)
        live = grads_2N.ne(0).any(0).nonzero()[:, 0]  # clipped tokens and flat groups ask for nothing
        column_N, rows_N = column_N[live], rows_N[live]
        highest_N, log_sum_N, entropy_N = (value[live] for value in known)
        gradients = RowGradients(
            highest_N, log_sum_N, entropy_N, grads_2N[0][live], grads_2N[1][live], options.scale
        )
        all_TH = _gathered(hidden_TH, options)
        rows_NH = factor(all_TH.index_select(0, rows_N))
        wanted = _WeightGradient.start(weight_VH)
        grad_NH = torch.zeros(rows_NH.shape, dtype=torch.float32, device=rows_NH.device)
        for tile in options.columns.tiles():
            weight_KH = factor(weight_VH[tile])
            logits_NK = product(rows_NH, weight_KH.t())
            grad_NK = options.epilogue.differentiate(
                logits_NK, column_N - tile.start, gradients, rows_NH.dtype
            )
            add_product(grad_NH, grad_NK, weight_KH)
            wanted.take(tile, grad_NK.t(), rows_NH)
            del logits_NK, grad_NK
        grad_TH = torch.zeros(all_TH.shape, dtype=torch.float32, device=all_TH.device)
        grad_TH.index_copy_(0, rows_N, grad_NH)
        return _scattered(grad_TH, options).to(hidden_TH.dtype), wanted.finish(), None, None, None


def _gathered(hidden_TH: torch.Tensor, options: _Options) -> torch.Tensor:
    """All rows, where sequence parallelism left each rank its own."""
    if options.group is None or not options.sequence_parallel:
        return hidden_TH
    ranks = dist.get_world_size(options.group)
    whole = hidden_TH.new_empty(hidden_TH.shape[0] * ranks, hidden_TH.shape[1])
    dist.all_gather_into_tensor(whole, hidden_TH.contiguous(), group=options.group)
    return whole


def _scattered(grad_TH: torch.Tensor, options: _Options) -> torch.Tensor:
    """The sum over the ranks' columns: of all rows, or under sequence parallelism of this rank's own."""
    if options.group is None:
        return grad_TH
    if not options.sequence_parallel:
        dist.all_reduce(grad_TH, group=options.group)
        return grad_TH
    ranks = dist.get_world_size(options.group)
    own = grad_TH.new_empty(grad_TH.shape[0] // ranks, grad_TH.shape[1])
    dist.reduce_scatter_tensor(own, grad_TH, group=options.group)
    return own


def _merge_over_ranks(statistics: Statistics, group: dist.ProcessGroup) -> None:
    """The ranks' maxima first; then their sums, brought to the common maximum, in one reduction."""
    highest_N = statistics.values_5N[0].clone()
    dist.all_reduce(highest_N, dist.ReduceOp.MAX, group=group)
    statistics.rebase(highest_N)
    dist.all_reduce(statistics.sums_4N, group=group)


@dataclass(frozen=True, slots=True)
class _WeightGradient:
    """Where the tiles' gradients go: onto Megatron's `main_grad` where the weight has one, else into a
    gradient of its own, which each tile completes in its rows."""

    weight_VH: torch.Tensor
    total_VH: torch.Tensor
    in_main_grad: bool

    @classmethod
    def start(cls, weight_VH: torch.Tensor) -> _WeightGradient:
        if hasattr(weight_VH, "main_grad") and hasattr(weight_VH, "grad_added_to_main_grad"):
            return cls(weight_VH, weight_VH.main_grad, True)  # type: ignore[attr-defined]
        return cls(weight_VH, torch.zeros_like(weight_VH), False)

    def take(self, tile: slice, grad_KN: torch.Tensor, rows_NH: torch.Tensor) -> None:
        add_product(self.total_VH[tile], grad_KN, rows_NH)

    def finish(self) -> torch.Tensor:
        """What autograd gets. After `main_grad` it is a stand-in that only triggers Megatron's hook; a weight
        tied to the embedding asks for zeros, because the embedding's own gradient is added to it."""
        if not self.in_main_grad:
            return self.total_VH
        self.weight_VH.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        if getattr(self.weight_VH, "zero_out_wgrad", False):
            return torch.zeros_like(self.weight_VH)
        return torch.empty_like(self.weight_VH)
