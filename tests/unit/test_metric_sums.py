"""Numbers that metrics are made of are summed in float64: they do not change with the width of a processor's
vectors, and a small spread beside a large mean keeps its digits.

# T packed tokens
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from grpo_mega.kernels import native
from tests.matrices import by_hand
from tests.strategies import Batch, Config, random_batch
from tests.weighting import COMBINATIONS, Asked, assert_agrees, composed, fused

WIDTHS = ("avx512", "avx2", "default")
"""What torch calls 512 bits, 256 bits, and no vector units; a processor without the first has the next."""

in_cpp = partial(fused, by_cpu=True)
WAYS: dict[str, Callable[..., Asked]] = {"eager": composed, "C++": in_cpp, "Triton": fused}


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", request.param)
    native._built.cache_clear()
    yield request.param
    native._built.cache_clear()


@pytest.mark.parametrize("name", ["aggressive", by_hand("all")])
def test_vectors_of_any_width_give_the_same_loss_and_metrics(name: str, width: str) -> None:
    """aggressive: ratios of sequences, whose spread is a tenth of their mean."""
    batch = random_batch((0, 1, 3, 40, 130), seed=28).to(torch.float32)
    assert_agrees(batch, COMBINATIONS[name], 1e-5, asked=in_cpp)


def _sure(lowest: float, length: int = 4096) -> Batch:
    """One answer of a policy that is sure: its probabilities lie between `lowest` and 1, the sampler's beside
    them."""
    generator = torch.Generator().manual_seed(0)
    trainer_T = lowest + (1.0 - lowest) * torch.rand(length, generator=generator, dtype=torch.float64)
    noise_T = 0.01 * (1.0 - lowest) * torch.randn(length, generator=generator, dtype=torch.float64)
    nothing_T = torch.zeros(length)
    return Batch(
        trainer_T=trainer_T.log().float(),
        sampler_T=(trainer_T + noise_T).clamp(max=1.0).log().float(),
        reference_T=nothing_T,
        proximal_T=nothing_T,
        entropy_T=nothing_T,
        sq_prob_T=nothing_T,
        mask_T=torch.ones(length, dtype=torch.bool),
        segments_T=torch.zeros(length, dtype=torch.int8),
        advantages=torch.ones(1),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
    )


@pytest.mark.parametrize("lowest", [0.99, 0.999, 0.9999])
@pytest.mark.parametrize("way", WAYS)
def test_a_sure_policy_has_its_correlation_with_the_sampler(way: str, lowest: float) -> None:
    """Probabilities of variance (1 - lowest)^2 / 12, down to 8e-10, about a mean of 1."""
    batch = _sure(lowest)
    probabilities_2T = torch.stack([batch.trainer_T, batch.sampler_T]).double().exp()
    exact = float(torch.corrcoef(probabilities_2T)[0, 1])
    assert WAYS[way](batch, {})[1]["mismatch/pearson"] == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{"normalize": "sum"}, {"legacy": True}], ids=str)
def test_small_weights_have_their_spread(way: str, options: Config) -> None:
    """LSPD to the sum 1 over 512 tokens: weights about 1/512, a spread of 1.1e-3."""
    length, alpha, tau = 512, 2.0, 10.0
    position_T = torch.arange(length, dtype=torch.float64)
    weight_T = (-alpha * (position_T / tau).log1p() / torch.tensor((length - 1) / tau).double().log1p()).exp()
    exact = float((weight_T / weight_T.sum()).std(correction=0))
    config = {"innovations": {"temporal_decay": {"mode": "lspd", "alpha": alpha, "tau": tau, **options}}}
    found = WAYS[way](_sure(0.9, length), config)[1]
    assert found["temporal_decay/weight_std"] == pytest.approx(exact, rel=1e-5)
