"""The Triton kernels of the policy loss on a CUDA device, against what torch composes there in float64.

# T packed tokens, B sequences
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from grpo_mega.kernels import weighting
from tests.strategies import Answer, Batch, Config, config_of, every_pair, random_batch
from tests.weighting import Asked, assert_agrees, assert_same_loss, composed, fused, on

pytestmark = pytest.mark.gpu

PAIRS = every_pair()
LENGTHS = (0, 1, 3, 40, 1023, 1024, 1025, 6000)  # around the kernels' blocks
LONG = 131_072
TOLERANCE = 2e-5
"""A GPU's exponential is off by 2 in the last place, times the exponent."""


@cache
def _batch(dtype: torch.dtype, advantages: str = "tokens") -> Batch:
    return on(random_batch(LENGTHS, seed=7, advantages=advantages).to(dtype), "cuda")


def _in_float64(batch: Batch, config: Config) -> Asked:
    return composed(batch.to(torch.float64), config)


@pytest.mark.parametrize("names", PAIRS, ids=lambda names: "-".join(filter(None, names)))
def test_every_two_choices_agree(names: tuple[str, ...]) -> None:
    assert_agrees(_batch(torch.float32), config_of(names), TOLERANCE, _in_float64)
    assert_agrees(_batch(torch.bfloat16, "sequences"), config_of(names), TOLERANCE, _in_float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "innovations",
    [
        {
            "ema": {"beta": 0.01},
            "gradient_adaptive": {},
            "temporal_decay": {"mode": "lspd"},
            "asymmetric": {},
        },
        {"amic": {}, "gradient_adaptive": {}, "ptrw": {}},
        {"ema": {}, "gspo": {}},
    ],
    ids=lambda innovations: "-".join(innovations),
)
def test_a_sequence_of_128k_tokens_beside_short_ones(innovations: dict, dtype: torch.dtype) -> None:
    """Without prompts, whose holes the strategy draws one by one."""
    batch = random_batch((0, 1, LONG, 500), seed=11, noise=0.3, outliers=0.01, prompts=False)
    config = {"innovations": innovations, "kl": {"coef": 0.1}, "aggregate": "seq-mean-token-mean"}
    assert_agrees(on(batch.to(dtype), "cuda"), config, TOLERANCE, _in_float64)


def _bytes_equal(first: Answer, second: Answer) -> bool:
    names = ("loss", "per_token_T", "grad_trainer_T", "grad_entropy_T")
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


@pytest.mark.parametrize("names", PAIRS[::6], ids=lambda names: "-".join(filter(None, names)))
def test_the_same_numbers_every_time(names: tuple[str, ...]) -> None:
    batch, config = _batch(torch.float32), config_of(names)
    answer, metrics = fused(batch, config)
    for _ in range(5):
        again, repeated = fused(batch, config)
        assert _bytes_equal(again, answer) and repeated == metrics


def test_the_size_of_the_blocks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"innovations": {"ema": {}, "gspo": {}}, "kl": {"coef": 0.1}}
    batch = _batch(torch.float32)
    expected, _ = fused(batch, config)
    for sequence, token in ((256, 64), (2048, 1024)):
        monkeypatch.setattr(weighting, "SEQUENCE_BLOCK", sequence)
        monkeypatch.setattr(weighting, "TOKEN_BLOCK", token)
        assert_same_loss(fused(batch, config)[0], expected, TOLERANCE)


def test_memory_is_a_few_numbers_for_each_token() -> None:
    """Loss, gradient, sequence, position, smoothed ratio, pull and factor: 28 bytes, and the sums."""
    batch = on(random_batch((LONG,), prompts=False).to(torch.float32), "cuda")
    config = {"innovations": {"ema": {}, "amic": {}, "temporal_decay": {}}}
    fused(batch, config)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused(batch, config)
    assert torch.cuda.max_memory_allocated() - before < 100 * LONG  # the quantiles' histogram is torch's
