"""Matrix products with float32 results: large ones, which another library computes, and small ones."""

from __future__ import annotations

import pytest
import torch

from grpo_mega.kernels.products import ONEDNN_PAYS_FROM, add_product, factor, product


@pytest.mark.parametrize("size", [(3, 5, 7), (256, 520, 513)], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", ["", "left", "right"])
def test_equals_float64(size: tuple[int, int, int], dtype: torch.dtype, transposed: str) -> None:
    rows, inner, columns = size
    assert (rows * inner * columns >= ONEDNN_PAYS_FROM) == (rows > 3)
    torch.manual_seed(0)
    left = torch.randn(inner, rows, dtype=dtype).t() if transposed == "left" else torch.randn(rows, inner)
    right = torch.randn(columns, inner).t() if transposed == "right" else torch.randn(inner, columns)
    left, right = factor(left.to(dtype)), factor(right.to(dtype))
    expected = left.double() @ right.double()
    found = product(left, right)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    total = torch.ones(rows, columns)
    add_product(total, left, right)
    torch.testing.assert_close(total.double(), expected + 1.0, rtol=1e-5, atol=1e-4)
    rounded = torch.zeros(rows, columns, dtype=torch.bfloat16)
    add_product(rounded, left, right)
    assert torch.equal(rounded, found.bfloat16())
