"""The policy loss in C++ against what torch composes: loss, per-token loss, gradients and every metric.

Each loss is built on its own, two seconds of a compiler: by default every choice of every axis is asked
once, and some combinations whose programs differ most; pairs of choices and the other combinations by hand.

# T packed tokens, B sequences
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings

from grpo_mega.algo import PolicyLoss
from grpo_mega.algo.aggregate import Denominators
from grpo_mega.kernels import native
from tests.matrices import covering
from tests.strategies import (
    Batch,
    Config,
    config_of,
    every_pair,
    packed_batches,
    random_batch,
    with_every_choice,
)
from tests.weighting import COMBINATIONS, assert_agrees, assert_same_loss, composed, fused

TOLERANCE = 1e-5
PAIRS = every_pair()
CHOICES = with_every_choice(PAIRS[::2])
COMBINED = {
    "all",
    "aggressive",
    "all of old",
    "amic and ptrw of old, weights inside",
    "gspo by token and ptrw of old",
    "gmpo, weights inside",
    "lspd to the sum, sharp",
}
"""Those asked by default."""
EVERYTHING = COMBINATIONS["all"] | {"kl": {"coef": 0.1}, "entropy_coef": 0.01}

by_cpu = partial(fused, by_cpu=True)


@cache
def _batch(advantages: str = "tokens", dtype: torch.dtype = torch.float32) -> Batch:
    """Its log-ratios reach +-50, and every clip, cap and bound."""
    return random_batch((0, 1, 3, 40, 130), seed=28, advantages=advantages).to(dtype)


@pytest.mark.parametrize(
    "names",
    covering(PAIRS[::2], CHOICES),
    ids=lambda names: "-".join(filter(None, names)),
)
def test_choices_agree(names: tuple[str, ...]) -> None:
    assert_agrees(_batch("tokens"), config_of(names), TOLERANCE, asked=by_cpu)


@pytest.mark.parametrize("name", covering(COMBINATIONS, COMBINED))
def test_combinations_agree(name: str) -> None:
    assert_agrees(_batch("sequences"), COMBINATIONS[name], TOLERANCE, asked=by_cpu)


def test_half_precision_is_read_as_it_is() -> None:
    assert_agrees(_batch("sequences", torch.bfloat16), EVERYTHING, TOLERANCE, asked=by_cpu)


@settings(max_examples=40)
@given(packed_batches())
def test_any_batch_agrees(batch: Batch) -> None:
    batch = batch.to(torch.float32)
    assert_same_loss(by_cpu(batch, EVERYTHING)[0], composed(batch, EVERYTHING)[0], TOLERANCE, gradients=1e-4)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (0, 2), (2, 0), (16,), (17, 15, 1)])
def test_empty_and_short_sequences_agree(lengths: tuple[int, ...]) -> None:
    for config in (EVERYTHING, COMBINATIONS["aggressive"]):
        batch = random_batch(lengths, seed=3).to(torch.float32)
        assert_same_loss(by_cpu(batch, config)[0], composed(batch, config)[0], TOLERANCE)


def test_one_sequence_of_many_programs_agrees_beside_short_ones() -> None:
    lengths = (5, 2 * native.TOKENS_OF_A_PROGRAM + 3, 0, 700, 1)
    batch = random_batch(lengths, seed=5, noise=0.1, outliers=0.0).to(torch.float32)
    assert_agrees(batch, EVERYTHING, TOLERANCE, asked=by_cpu)


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch((900,) * 40, seed=6, noise=0.1, outliers=0.0).to(torch.float32)
    answers = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        answer, metrics = by_cpu(batch, EVERYTHING)
        answers.append((answer.loss.tolist(), answer.grad_trainer_T.tolist(), metrics))
    assert answers[0] == answers[1] == answers[2]


def test_a_token_that_is_not_finite_is_named() -> None:
    batch = random_batch((4, 5), seed=1, prompts=False, outside=0).to(torch.float32)
    batch.sampler_T[6] = torch.nan
    with pytest.raises(ValueError, match=r"sampler is nan at response token 2 of sample 1"):
        by_cpu(batch, EVERYTHING)


def test_what_compiled_means_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ where that knows the loss; float64 is composed and compiled by torch."""
    ran: list[str] = []
    run = native.run
    monkeypatch.setattr(native, "run", lambda *given, **options: ran.append("C++") or run(*given, **options))
    _ask(_batch("sequences"), {}, Denominators(100.0, 5.0))
    assert ran == ["C++"]
    _ask(_batch("sequences", torch.float64), {}, Denominators(100.0, 5.0))
    assert ran == ["C++"]


def _ask(batch: Batch, config: Config, denominators: Denominators) -> None:
    loss = PolicyLoss(config, implementation="compiled")
    given = (batch.trainer_T, batch.sampler_T, batch.advantages, batch.cu_seqlens)
    loss(*given, response_mask_T=batch.mask_T, denominators=denominators)
