"""The epilogues of `linear_logprob` as Triton kernels: one launch for each tile of logits, forward and
backward.

They compile for Triton 3.6 to 3.9, and run on CPU tensors under TRITON_INTERPRET=1.

# N rows, K columns of the tile
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grpo_mega.kernels.aot import AotCase
from grpo_mega.kernels.epilogue import RowGradients, Statistics

BLOCK = 2048
WARPS = 8


@triton.jit
def fold_kernel(
    x_ptr,
    column_ptr,
    values_ptr,
    scale,
    rows,
    columns,
    BLOCK: tl.constexpr,
):
    """A program for each row: its five numbers (rows apart in memory) after the tile, from those before."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * columns
    values_ptr += row
    highest = tl.load(values_ptr)
    exp = tl.load(values_ptr + rows)
    weighted = tl.load(values_ptr + 2 * rows)
    squared = tl.load(values_ptr + 3 * rows)
    for begin in range(0, columns, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        inside = place < columns
        x = tl.load(x_ptr + place, mask=inside, other=-float("inf"))
        new = tl.maximum(highest, tl.max(x, 0))
        # before anything was seen the sums are 0, which no shift changes
        shift = tl.where(highest > -float("inf"), scale * (highest - new), 0.0)
        factor = tl.exp(shift)
        shifted = tl.where(inside, scale * (x - new), 0.0)
        power = tl.where(inside, tl.exp(shifted), 0.0)
        weighted = (weighted + shift * exp) * factor + tl.sum(power * shifted, 0)
        exp = exp * factor + tl.sum(power, 0)
        squared = squared * factor * factor + tl.sum(power * power, 0)
        highest = new
    tl.store(values_ptr, highest)
    tl.store(values_ptr + rows, exp)
    tl.store(values_ptr + 2 * rows, weighted)
    tl.store(values_ptr + 3 * rows, squared)
    target = tl.load(column_ptr + row)
    here = (target >= 0) & (target < columns)
    picked = tl.load(x_ptr + target, mask=here, other=0.0)
    tl.store(values_ptr + 4 * rows, tl.load(values_ptr + 4 * rows) + picked)


@triton.jit
def differentiate_kernel(
    x_ptr,
    gradient_ptr,
    column_ptr,
    highest_ptr,
    log_sum_ptr,
    entropy_ptr,
    of_logprob_ptr,
    of_entropy_ptr,
    scale,
    columns,
    BLOCK: tl.constexpr,
):
    """A program for each block of each row: -p (g + e (ln p + H)) + onehot g, in the format of the gradient,
    whose memory may be that of x."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < columns
    target = tl.load(column_ptr + row).to(tl.int32)
    of_logprob = tl.load(of_logprob_ptr + row)
    of_entropy = tl.load(of_entropy_ptr + row)
    x = tl.load(x_ptr + row * columns + place, mask=inside, other=0.0)
    logp = scale * (x - tl.load(highest_ptr + row)) - tl.load(log_sum_ptr + row)
    logp = tl.where(inside, logp, 0.0)
    gradient = -tl.exp(logp) * (of_logprob + of_entropy * (logp + tl.load(entropy_ptr + row)))
    # the interpreter compares blocks with blocks only
    gradient += tl.where(place == target + tl.zeros((BLOCK,), tl.int32), of_logprob, 0.0)
    gradient_ptr += row * columns
    tl.store(gradient_ptr + place, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


def fold(x_NK: torch.Tensor, column_N: torch.Tensor, statistics: Statistics) -> None:
    rows, columns = x_NK.shape
    if not rows:
        return
    fold_kernel[(rows,)](
        x_NK,
        column_N,
        statistics.values_5N,
        statistics.scale,
        rows,
        columns,
        BLOCK=BLOCK,
        num_warps=WARPS,  # pyright: ignore[reportCallIssue]
    )


def differentiate(
    x_NK: torch.Tensor, column_N: torch.Tensor, rows: RowGradients, dtype: torch.dtype
) -> torch.Tensor:
    gradient_NK = x_NK if dtype == x_NK.dtype else torch.empty_like(x_NK, dtype=dtype)
    if not x_NK.shape[0]:
        return gradient_NK
    differentiate_kernel[(x_NK.shape[0], triton.cdiv(x_NK.shape[1], BLOCK))](
        x_NK,
        gradient_NK,
        column_N,
        rows.highest_N,
        rows.log_sum_N,
        rows.entropy_N,
        rows.of_logprob_N,
        rows.of_entropy_N,
        rows.scale,
        x_NK.shape[1],
        BLOCK=BLOCK,
        num_warps=WARPS,  # pyright: ignore[reportCallIssue]
    )
    return gradient_NK


def _differentiate_case(gradient: str) -> AotCase:
    signature = {name: "*fp32" for name in differentiate_kernel.arg_names if name.endswith("_ptr")}
    signature |= {"gradient_ptr": f"*{gradient}", "column_ptr": "*i64", "scale": "fp32", "columns": "i32"}
    return AotCase(f"gradient in {gradient}", differentiate_kernel, signature, {"BLOCK": BLOCK}, WARPS)


AOT_CASES = (
    AotCase(
        "any tile",
        fold_kernel,
        {
            "x_ptr": "*fp32",
            "column_ptr": "*i64",
            "values_ptr": "*fp32",
            "scale": "fp32",
            "rows": "i32",
            "columns": "i32",
        },
        {"BLOCK": BLOCK},
        WARPS,
    ),
    _differentiate_case("fp32"),
    _differentiate_case("bf16"),
)
