"""What is done with a tile of logits: fold it into each row's statistics, or turn it into its gradient.

Logits x come as the matrix product left them; z = scale x, where scale = 1 / temperature. The maximum is
taken of x and subtracted before the scaling, so that the largest difference is exactly 0 and no rounding
makes a log-probability positive.

# N rows, K columns of the tile
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch

from grpo_mega.kernels.implementation import Implementation, prepare_torch_compile

BLOCK_ELEMENTS = 1 << 18
"""Eager: elements worked on together (1 MiB), so that all passes over them but the first stay in cache."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Five numbers for each row, of the columns seen so far, updated in place: the highest x, and with
    d = scale (x - highest) the sums of e^d, d e^d and e^(2 d); and the target's x (0 until it is seen).

    Example: x = (0, ln 3), target 1, scale 1 -> ln 3, 4/3, -ln(3) / 3, 10/9, ln 3
    """

    values_5N: torch.Tensor  # float32
    scale: float

    @classmethod
    def start(cls, rows: int, device: torch.device, scale: float) -> Statistics:
        values_5N = torch.zeros(5, rows, dtype=torch.float32, device=device)
        values_5N[0] = -torch.inf
        return cls(values_5N, scale)

    @property
    def sums_4N(self) -> torch.Tensor:
        """What adds up over ranks once they share their highest."""
        return self.values_5N[1:]

    def of(self, rows: slice) -> Statistics:
        return Statistics(self.values_5N[:, rows], self.scale)

    def rebase(self, highest_N: torch.Tensor) -> None:
        """Express the sums by another highest, not below the present one."""
        own_N, exp_N, weighted_N, squared_N, _ = self.values_5N
        # before anything was seen the highest is -inf and every sum 0, which no shift changes
        shift_N = (self.scale * (own_N - highest_N)).where(own_N > -torch.inf, 0.0)
        factor_N = shift_N.exp()
        weighted_N.add_(shift_N * exp_N).mul_(factor_N)
        exp_N.mul_(factor_N)
        squared_N.mul_(factor_N.square())
        own_N.copy_(highest_N)

    def finish(self) -> Finished:
        highest_N, exp_N, weighted_N, squared_N, target_N = self.values_5N
        log_sum_N = exp_N.log()
        return Finished(
            logprob_N=self.scale * (target_N - highest_N) - log_sum_N,
            entropy_N=log_sum_N - weighted_N / exp_N,
            sq_prob_N=squared_N / exp_N.square(),
            highest_N=highest_N,
            log_sum_N=log_sum_N,
        )


@dataclass(frozen=True, slots=True)
class Finished:
    logprob_N: torch.Tensor
    entropy_N: torch.Tensor  # -sum p ln p
    sq_prob_N: torch.Tensor  # sum p^2
    highest_N: torch.Tensor
    log_sum_N: torch.Tensor  # ln sum e^d


@dataclass(frozen=True, slots=True)
class RowGradients:
    """What the backward pass knows of each row: ln p = scale (x - highest) - log_sum, the entropy H, and what
    arrives for its log-probability (g) and its entropy (e), both already times the scale."""

    highest_N: torch.Tensor
    log_sum_N: torch.Tensor
    entropy_N: torch.Tensor
    of_logprob_N: torch.Tensor
    of_entropy_N: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Epilogue:
    """fold(x, target's column in this tile, statistics) adds the tile to the statistics.
    differentiate(x, column, row gradients, format) is the gradient of x, in that format,

        -p (g + e (ln p + H)) + onehot g

    Both may overwrite x.
    """

    fold: Callable[[torch.Tensor, torch.Tensor, Statistics], None]
    differentiate: Callable[[torch.Tensor, torch.Tensor, RowGradients, torch.dtype], torch.Tensor]


@cache
def epilogue_of(implementation: Implementation) -> Epilogue:
    if implementation == "triton":
        from grpo_mega.kernels.logprob_triton import differentiate, fold

        return Epilogue(fold, differentiate)
    if implementation == "compiled":
        return _compiled()
    return Epilogue(_fold_eager, _differentiate_eager)


def _blocks(x_NK: torch.Tensor) -> Iterator[slice]:
    rows, columns = x_NK.shape
    step = max(1, BLOCK_ELEMENTS // columns)
    return (slice(begin, begin + step) for begin in range(0, rows, step))


def _target(x_NK: torch.Tensor, column_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each row's target lies in this tile, and its column (any, where not)."""
    here_N = (column_N >= 0) & (column_N < x_NK.shape[1])
    return here_N, column_N.where(here_N, 0)


def _pick_target(x_NK: torch.Tensor, column_N: torch.Tensor, statistics: Statistics) -> None:
    here_N, column_N = _target(x_NK, column_N)
    statistics.values_5N[4] += x_NK.gather(1, column_N[:, None])[:, 0].where(here_N, 0.0)


def _add_onehot(x_NK: torch.Tensor, column_N: torch.Tensor, gradient_N: torch.Tensor) -> None:
    here_N, column_N = _target(x_NK, column_N)
    x_NK.scatter_add_(1, column_N[:, None], gradient_N.where(here_N, 0.0)[:, None])


def _fold_eager(x_NK: torch.Tensor, column_N: torch.Tensor, statistics: Statistics) -> None:
    _pick_target(x_NK, column_N, statistics)
    for here in _blocks(x_NK):
        block, rows = x_NK[here], statistics.of(here)
        highest_N, exp_N, weighted_N, squared_N, _ = rows.values_5N
        rows.rebase(torch.maximum(highest_N, block.amax(1)))
        shifted = block.sub_(highest_N[:, None]).mul_(rows.scale)
        exp = shifted.exp()
        exp_N.add_(exp.sum(1))
        weighted_N.add_(torch.linalg.vecdot(exp, shifted))
        squared_N.add_(torch.linalg.vecdot(exp, exp))


def _differentiate_eager(
    x_NK: torch.Tensor, column_N: torch.Tensor, rows: RowGradients, dtype: torch.dtype
) -> torch.Tensor:
    for here in _blocks(x_NK):
        shifted = x_NK[here].sub_(rows.highest_N[here, None])
        logp = shifted.mul_(rows.scale).sub_(rows.log_sum_N[here, None])
        negative = logp.exp().neg_()
        logp.add_(rows.entropy_N[here, None]).mul_(rows.of_entropy_N[here, None])
        logp.add_(rows.of_logprob_N[here, None]).mul_(negative)
    _add_onehot(x_NK, column_N, rows.of_logprob_N)
    return x_NK.to(dtype)


def _compiled() -> Epilogue:
    """Compiled at the first use, once for all sizes; but sizes of 0 and 1 would each be compiled anew."""
    prepare_torch_compile()
    folded = torch.compile(_folded, dynamic=True)
    differentiated = torch.compile(_differentiated, dynamic=True)

    def fold(x_NK: torch.Tensor, column_N: torch.Tensor, statistics: Statistics) -> None:
        if min(x_NK.shape) < 2:
            return _fold_eager(x_NK, column_N, statistics)
        _pick_target(x_NK, column_N, statistics)
        scale = torch.full((), statistics.scale, device=x_NK.device)  # a number would be compiled in
        old_4N = statistics.values_5N[:4]
        for old_N, new_N in zip(old_4N, folded(x_NK, scale, *old_4N), strict=True):
            old_N.copy_(new_N)

    def differentiate(
        x_NK: torch.Tensor, column_N: torch.Tensor, rows: RowGradients, dtype: torch.dtype
    ) -> torch.Tensor:
        if min(x_NK.shape) < 2:
            return _differentiate_eager(x_NK, column_N, rows, dtype)
        scale = torch.full((), rows.scale, device=x_NK.device)
        values = (rows.highest_N, rows.log_sum_N, rows.entropy_N, rows.of_logprob_N, rows.of_entropy_N)
        differentiated(x_NK, scale, *values)
        _add_onehot(x_NK, column_N, rows.of_logprob_N)
        return x_NK.to(dtype)

    return Epilogue(fold, differentiate)


def _folded(
    x_NK: torch.Tensor,
    scale: torch.Tensor,
    highest_N: torch.Tensor,
    exp_N: torch.Tensor,
    weighted_N: torch.Tensor,
    squared_N: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Two passes over each row: its maximum, then the three sums."""
    new_N = torch.maximum(highest_N, x_NK.amax(1))
    shift_N = (scale * (highest_N - new_N)).where(highest_N > -torch.inf, 0.0)
    factor_N = shift_N.exp()
    shifted_NK = scale * (x_NK - new_N[:, None])
    exp_NK = shifted_NK.exp()
    return (
        new_N,
        exp_N * factor_N + exp_NK.sum(1),
        (weighted_N + shift_N * exp_N) * factor_N + (exp_NK * shifted_NK).sum(1),
        squared_N * factor_N.square() + exp_NK.square().sum(1),
    )


def _differentiated(
    x_NK: torch.Tensor,
    scale: torch.Tensor,
    highest_N: torch.Tensor,
    log_sum_N: torch.Tensor,
    entropy_N: torch.Tensor,
    of_logprob_N: torch.Tensor,
    of_entropy_N: torch.Tensor,
) -> None:
    logp_NK = scale * (x_NK - highest_N[:, None]) - log_sum_N[:, None]
    inside_NK = of_logprob_N[:, None] + of_entropy_N[:, None] * (logp_NK + entropy_N[:, None])
    x_NK.copy_(-logp_NK.exp() * inside_NK)
