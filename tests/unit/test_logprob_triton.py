"""The Triton epilogues in the interpreter against the eager ones: tiles wider than a block, tails, targets
outside, and what earlier tiles left.

# N rows, K columns of the tile
"""

from __future__ import annotations

import pytest
import torch

from grpo_mega.kernels.epilogue import RowGradients, Statistics, epilogue_of

pytest.importorskip("triton")

ROWS, SCALE = 3, 1 / 0.7
WIDTHS = (1, 2047, 2048, 2049, 5000)  # around the kernels' block of 2,048, and more than two of them


def _tile(columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and targets in the first column, in the last, and in another tile."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, columns, generator=generator) * 3, torch.tensor([0, columns - 1, columns])


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("shift", [0.0, -200.0, 200.0])
def test_statistics(columns: int, shift: float) -> None:
    """Of two tiles, the second far below or above the first."""
    found, expected = (Statistics.start(ROWS, torch.device("cpu"), SCALE) for _ in range(2))
    for seed, offset in ((0, 0.0), (1, shift)):
        x_NK, column_N = _tile(columns, seed)
        epilogue_of("triton").fold(x_NK + offset, column_N, found)
        epilogue_of("eager").fold(x_NK + offset, column_N, expected)
    torch.testing.assert_close(found.values_5N, expected.values_5N, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient(columns: int, dtype: torch.dtype) -> None:
    x_NK, column_N = _tile(columns)
    z_NK = x_NK * SCALE
    highest_N = x_NK.amax(1)
    log_sum_N = z_NK.logsumexp(1) - highest_N * SCALE
    rows = RowGradients(highest_N, log_sum_N, log_sum_N + 0.3, *torch.randn(2, ROWS), SCALE)
    found_NK = epilogue_of("triton").differentiate(x_NK.clone(), column_N, rows, dtype)
    expected_NK = epilogue_of("eager").differentiate(x_NK, column_N, rows, dtype)
    assert found_NK.dtype == dtype
    allowed = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found_NK, expected_NK, rtol=allowed, atol=1e-6)


def test_no_rows() -> None:
    statistics = Statistics.start(0, torch.device("cpu"), 1.0)
    x_NK, column_N = torch.empty(0, 5), torch.empty(0, dtype=torch.int64)
    epilogue_of("triton").fold(x_NK, column_N, statistics)
    rows = RowGradients(*torch.empty(5, 0), 1.0)
    assert epilogue_of("triton").differentiate(x_NK, column_N, rows, torch.float32).shape == (0, 5)
