"""`linear_logprob` on a CUDA device: every implementation, in float32 and bfloat16, and where sizes pass 32
bits.

# T tokens, H hidden, V vocabulary
"""

from __future__ import annotations

import pytest
import torch

from grpo_mega.kernels.epilogue import RowGradients, Statistics, epilogue_of
from grpo_mega.kernels.implementation import Implementation
from grpo_mega.kernels.logprob import GPU_TILE, linear_logprob
from grpo_mega.kernels.logprob_check import ALLOWED, check_linear_logprob

pytestmark = pytest.mark.gpu

IMPLEMENTATIONS: tuple[Implementation, ...] = ("eager", "compiled", "triton")
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_float64(implementation: Implementation, dtype: torch.dtype) -> None:
    worst = check_linear_logprob(implementation, DEVICE, dtype)
    assert worst <= ALLOWED[dtype]


def _inputs(tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden_TH = torch.randn(tokens, hidden, generator=generator, device=DEVICE).to(dtype)
    weight_VH = (torch.randn(vocab, hidden, generator=generator, device=DEVICE) * 0.05).to(dtype)
    target_T = torch.randint(vocab, (tokens,), generator=generator, device=DEVICE)
    return hidden_TH.requires_grad_(), weight_VH.requires_grad_(), target_T


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_tile_equals_all_logits(implementation: Implementation, dtype: torch.dtype) -> None:
    """A vocabulary of several tiles and a tail, whose gradients round in the format of their tensors."""
    hidden_TH, weight_VH, target_T = _inputs(512, 256, 2 * GPU_TILE + 1001, dtype)
    above_2T = torch.randn(2, 512, device=DEVICE)
    values = linear_logprob(hidden_TH, weight_VH, target_T, 0.8, implementation=implementation)
    found = (*values[:2], *torch.autograd.grad(values[:2], [hidden_TH, weight_VH], list(above_2T)))
    logp_TV = (hidden_TH.float() @ weight_VH.float().t() / 0.8).log_softmax(1)
    dense = [logp_TV.gather(1, target_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(1)]
    expected = (*dense, *torch.autograd.grad(dense, [hidden_TH, weight_VH], list(above_2T)))
    allowed = 1e-4 if dtype == torch.float32 else 2e-2
    assert (values[0] <= 0).all()
    for ours, plain in zip(found, expected, strict=True):
        assert float((ours - plain).abs().max()) <= allowed * float(plain.abs().max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_memory_is_a_tile_and_not_the_vocabulary(implementation: Implementation) -> None:
    tokens, hidden, vocab = 4096, 256, 131072  # all logits: 2 GiB in float32
    hidden_TH, weight_VH, target_T = _inputs(tokens, hidden, vocab, torch.bfloat16)

    def step() -> None:
        values = linear_logprob(hidden_TH, weight_VH, target_T, 1.0, implementation=implementation)
        torch.autograd.grad([v.sum() for v in values[:2]], [hidden_TH, weight_VH])

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    tile = tokens * GPU_TILE * 4
    gradients = 2 * weight_VH.numel() + 12 * hidden_TH.numel()
    # a tile in float32, its gradient in bfloat16, and what else is as large as a slice of the weight
    assert peak < 2 * tile + 2 * gradients


def test_rows_beyond_the_reach_of_32_bits() -> None:
    """2^31 + 2^20 elements in one tile: the last row's numbers are its own."""
    columns = 4096
    rows = 2**31 // columns + 256
    x_NK = torch.zeros(rows, columns, device=DEVICE)
    x_NK[-1, -1] = 3.0
    column_N = torch.full((rows,), columns - 1, device=DEVICE)
    statistics = Statistics.start(rows, DEVICE, 1.0)
    epilogue_of("triton").fold(x_NK, column_N, statistics)
    found = statistics.finish()
    expected = x_NK[-2:].log_softmax(1)[:, -1]
    torch.testing.assert_close(found.logprob_N[-2:], expected)
    gradients = RowGradients(
        found.highest_N,
        found.log_sum_N,
        found.entropy_N,
        torch.ones(rows, device=DEVICE),
        torch.zeros(rows, device=DEVICE),
        1.0,
    )
    gradient_NK = epilogue_of("triton").differentiate(x_NK, column_N, gradients, torch.float32)
    torch.testing.assert_close(gradient_NK[-2:, -1], 1.0 - expected.exp())
