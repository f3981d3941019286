"""Matrix products with float32 results and sums, whatever the format of the factors."""

from __future__ import annotations

import torch

ONEDNN_PAYS_FROM = 1 << 26
"""Multiplications from which, on a CPU, oneDNN's product is worth building for a new shape (milliseconds)."""


def factor(x: torch.Tensor) -> torch.Tensor:
    """A factor as it is multiplied: a GPU has units for half precision, a CPU multiplies in float32."""
    return x if x.is_cuda else x.float()


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    if _is_onednn_better(left, right):
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    return torch.mm(left, right)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left right; only the result is rounded to the format of the total."""
    if left.dtype == total.dtype == torch.float32 and not _is_onednn_better(left, right):
        total.addmm_(left, right)
    else:
        total.add_(product(left, right))


def _is_onednn_better(left: torch.Tensor, right: torch.Tensor) -> bool:
    """torch.mm of float32 is MKL's, which uses AVX-512 on Intel's processors only: on AMD's, oneDNN's (which
    torch.compile calls, too) is 1.3 to 2 times as fast."""
    multiplications = left.shape[0] * left.shape[1] * right.shape[1]
    return not left.is_cuda and torch.backends.mkldnn.is_available() and multiplications >= ONEDNN_PAYS_FROM
