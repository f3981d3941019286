"""The valid tokens of packed sequences as a rectangle, so that sums, scans and broadcasts over sequences are
cheap on any device.

Each sequence's valid tokens (prompt, padding and masked ones left out) fill as many rows of W as they need; a
row never holds two sequences. Sums over a sequence are sums over rows, then over the few rows of each
sequence; a linear recurrence is one small matrix product in each row and the same recurrence over the rows'
last values.

# T packed tokens, R rows, W tokens of a row, B sequences
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grpo_mega.algo.traces import Traces

WIDTHS = (8, 64)
"""Few, because each is compiled on its own. The narrow one keeps short answers from being mostly padding; the
wide one is what a scan's matrix product multiplies for each token."""
NEGLIGIBLE = 1e-30
"""Weights below this are 0: nothing they touch would show in 16 digits."""


@dataclass(frozen=True)
class Rows:
    """Where each valid token lies.

    Example: lengths 3 and 1 at W = 2 -> rows (0, 1), (2, -), (3, -); sequence_R = 0 0 1
    """

    index_RW: torch.Tensor  # int64: packed position, T where there is no token
    valid_RW: torch.Tensor  # bool
    position_RW: (
        torch.Tensor
    )  # float32 (exact to 2^24, and quick to compare): place among its sequence's tokens
    sequence_R: torch.Tensor  # int64
    length_B: torch.Tensor  # int64: valid tokens of each sequence; may be 0
    inverse_T: (
        torch.Tensor
    )  # int64: packed token -> place in the flattened rectangle, R W where it is not valid
    above: Rows | None  # the rows themselves as tokens, when a sequence has more than one

    @property
    def width(self) -> int:
        return self.index_RW.shape[1]

    @property
    def sequences(self) -> int:
        return self.length_B.shape[0]

    def tensors(self) -> list[torch.Tensor]:
        own = [self.index_RW, self.valid_RW, self.position_RW, self.sequence_R, self.length_B, self.inverse_T]
        return own if self.above is None else own + self.above.tensors()

    def of_tokens(self, values_T: torch.Tensor) -> torch.Tensor:
        """Packed values to rows, 0 where there is no token."""
        gathered: Any = _Gather.apply(values_T, self.index_RW, self.inverse_T)
        return gathered

    def to_tokens(self, values_RW: torch.Tensor) -> torch.Tensor:
        """Rows to packed values, 0 at tokens that are not valid."""
        return _picked(values_RW, self.inverse_T)

    def sum(self, values_RW: torch.Tensor) -> torch.Tensor:
        """Over the valid tokens of each sequence: B."""
        row_R = values_RW.where(self.valid_RW, 0.0).sum(1)
        return row_R.new_zeros(self.sequences).index_add(0, self.sequence_R, row_R)

    def mean(self, values_RW: torch.Tensor) -> torch.Tensor:
        """Over the valid tokens of each sequence: B; 0 for a sequence without any."""
        return self.sum(values_RW) / self.length_B.clamp(min=1)

    def max(self, values_RW: torch.Tensor) -> torch.Tensor:
        """Over the valid tokens of each sequence: B; -inf for a sequence without any. No gradient."""
        row_R = values_RW.detach().where(self.valid_RW, -torch.inf).amax(1)
        lowest_B = torch.full((self.sequences,), -torch.inf, dtype=row_R.dtype, device=row_R.device)
        return lowest_B.scatter_reduce(0, self.sequence_R, row_R, "amax")

    def spread(self, values_B: torch.Tensor) -> torch.Tensor:
        """One value of each sequence to its rows: R x 1, which broadcasts over their tokens."""
        return values_B.index_select(0, self.sequence_R)[:, None]

    def scan(self, inputs_RW: torch.Tensor, decay: float) -> torch.Tensor:
        """y_t = decay y_{t-1} + x_t along each sequence's valid tokens, y_{-1} = 0. Differentiable.

        Example: x = 1, 1, 1 at decay .5 -> 1, 1.5, 1.75
        """
        inside_WW, carry_W = _decay_tables(decay, self.width, inputs_RW.dtype, inputs_RW.device)
        inside_RW = inputs_RW @ inside_WW
        if self.above is None:
            return inside_RW
        ends = self.above
        last_R = ends.to_tokens(ends.scan(ends.of_tokens(inside_RW[:, -1]), decay**self.width))
        before_R = torch.roll(last_R, 1) * (self.position_RW[:, 0] > 0)
        # As a product, so that a compiler makes `before_R` once for each row and not again for each element.
        return torch.addmm(inside_RW, before_R[:, None], carry_W[None])


_TABLES: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}


def to_be_compiled() -> None:
    """Before anything here is compiled. Not when this is imported: it loads the compiler, a second's work."""
    torch.compiler.assume_constant_result(_decay_tables)


def _decay_tables(
    decay: float, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What token j adds to token k of its row, decay^(k - j) for j <= k, as [j, k]; and what the row before
    adds to token k, decay^(k + 1)."""
    key = (decay, width, dtype, device)
    if key not in _TABLES:
        place_W = torch.arange(width, dtype=torch.float64)
        lag_WW = place_W[None] - place_W[:, None]
        inside_WW = torch.where(lag_WW >= 0, decay ** lag_WW.clamp(min=0.0), 0.0)
        carry_W = decay ** (place_W + 1)
        # processors take a hundred times longer over the numbers too small for their format
        tables = (table.where(table > NEGLIGIBLE, 0.0) for table in (inside_WW, carry_W))
        inside_WW, carry_W = (table.to(device, dtype) for table in tables)
        _TABLES[key] = inside_WW, carry_W
    return _TABLES[key]


class _Gather(torch.autograd.Function):
    """Indexing whose backward is indexing too: no scatter, hence the same sum in the same order every
    time."""

    @staticmethod
    def forward(
        ctx: Any, values_T: torch.Tensor, index_RW: torch.Tensor, inverse_T: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse_T)
        return _picked(values_T, index_RW)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inverse_T,) = ctx.saved_tensors
        return _picked(grads[0], inverse_T), None, None


def _picked(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values.flatten()[index], and 0 where the index is one past the end."""
    padded = torch.cat([values.flatten(), values.new_zeros(1)])
    return padded.index_select(0, index.flatten()).view(index.shape)


def rows_of(cu_seqlens: torch.Tensor, valid_T: torch.Tensor) -> Rows:
    """Lay out the valid tokens of packed sequences. Tokens beyond the last boundary are not valid."""
    boundaries = cu_seqlens.to(torch.int64)
    begin_B, end = boundaries[:-1], int(boundaries[-1])
    before_T = torch.cat([boundaries.new_zeros(1), valid_T[:end].cumsum(0)])
    count_B = before_T[boundaries]
    length_B = count_B.diff()
    # Most responses are one run of valid tokens, whose places follow from where the run begins.
    run_T = valid_T[:end].clone()
    run_T[1:] &= ~valid_T[: max(end - 1, 0)]
    inner_B = begin_B[begin_B < end]
    run_T[inner_B] = valid_T[inner_B]
    run = run_T.nonzero()[:, 0]
    if run.shape[0] == int((length_B > 0).sum()):
        start_B = torch.zeros_like(length_B).masked_scatter_(length_B > 0, run)
        return _lay_out(length_B, start_B, None, valid_T.shape[0])
    packed_V = valid_T[:end].nonzero()[:, 0]
    return _lay_out(length_B, count_B[:-1], packed_V, valid_T.shape[0])


def _lay_out(
    length_B: torch.Tensor, start_B: torch.Tensor, packed_V: torch.Tensor | None, tokens: int
) -> Rows:
    """Sequence b has length_b valid tokens: the packed positions from start_b on, or, with `packed_V`, the
    positions that stand there from start_b on."""
    device = length_B.device
    if not length_B.numel():
        length_B = start_B = length_B.new_zeros(1)
    longest = int(length_B.max())
    width = next((width for width in WIDTHS if longest <= width), WIDTHS[-1])
    rows_B = (length_B + (width - 1)) // width
    sequence_R = torch.arange(length_B.shape[0], device=device).repeat_interleave(rows_B)
    # at least one row, so that nothing else has to think of emptiness
    sequence_R = sequence_R if sequence_R.numel() else sequence_R.new_zeros(1)
    first_row_B = rows_B.cumsum(0) - rows_B
    row_in_sequence_R = torch.arange(sequence_R.shape[0], device=device) - first_row_B[sequence_R]
    begin_R, offset_W = row_in_sequence_R * width, torch.arange(width, device=device)
    position_RW = begin_R.float()[:, None] + offset_W.float()
    valid_RW = offset_W < (length_B[sequence_R] - begin_R)[:, None]
    place_RW = offset_W + (start_B[sequence_R] + begin_R)[:, None]
    if packed_V is None:
        index_RW = place_RW.where(valid_RW, tokens)
    else:
        beyond_V = torch.cat([packed_V, packed_V.new_full((1,), tokens)])
        index_RW = beyond_V[place_RW.where(valid_RW, packed_V.shape[0])]
    nowhere = index_RW.numel()
    inverse = torch.full((tokens + 1,), nowhere, device=device)
    inverse.scatter_(0, index_RW.flatten(), torch.arange(nowhere, device=device))
    inverse[tokens] = nowhere
    above = None
    if longest > width:
        above = _lay_out(rows_B, first_row_B, None, sequence_R.shape[0])
    return Rows(index_RW, valid_RW, position_RW, sequence_R, length_B, inverse[:tokens], above)


@dataclass(frozen=True)
class TokenView:
    """What an innovation sees of a micro-batch: rows of valid tokens, and where to record what it did.

    `trainer_RW` carries the gradient; the rest are constants.
    """

    rows: Rows
    traces: Traces
    trainer_RW: torch.Tensor
    advantage_RW: torch.Tensor
    sq_prob_RW: torch.Tensor | None = None  # sum over the vocabulary of squared probabilities
    segment_RW: torch.Tensor | None = None  # int8: see innovations/sca.py
