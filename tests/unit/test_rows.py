"""Rows of valid tokens against loops over sequences.

# T packed tokens, R rows, W tokens of a row, B sequences
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mega.algo.rows import Rows, rows_of

LENGTHS = st.lists(st.sampled_from([0, 1, 2, 7, 8, 9, 63, 64, 65, 200]), max_size=6)


def _packed(lengths: list[int], seed: int, share: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """cu_seqlens, which tokens are valid, and a value for each."""
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens = sum(lengths) + 3  # tokens beyond the last boundary belong to nobody
    valid_T = torch.rand(tokens, generator=generator) < share
    return cu_seqlens, valid_T, torch.randn(tokens, generator=generator, dtype=torch.float64)


def _sequences(cu_seqlens: torch.Tensor, valid_T: torch.Tensor) -> list[list[int]]:
    bounds = cu_seqlens.tolist()
    return [[t for t in range(a, b) if valid_T[t]] for a, b in pairwise(bounds)]


@settings(max_examples=40)
@given(LENGTHS, st.integers(0, 99), st.sampled_from([0.0, 0.3, 1.0]))
def test_sums_scans_and_spreads_equal_loops(lengths: list[int], seed: int, share: float) -> None:
    cu_seqlens, valid_T, values_T = _packed(lengths, seed, share)
    rows, sequences = rows_of(cu_seqlens, valid_T), _sequences(cu_seqlens, valid_T)
    values_RW = rows.of_tokens(values_T)
    assert rows.length_B.tolist() == ([len(s) for s in sequences] or [0])
    expected_sum = torch.stack([values_T[s].sum() for s in sequences]) if sequences else torch.zeros(1)
    torch.testing.assert_close(rows.sum(values_RW), expected_sum.double())
    for index, sequence in enumerate(sequences):
        if sequence:
            assert rows.max(values_RW)[index] == values_T[sequence].max()
    scanned_T = torch.zeros_like(values_T)
    for sequence in sequences:
        state = 0.0
        for t in sequence:
            state = 0.6 * state + values_T[t]
            scanned_T[t] = state
    torch.testing.assert_close(rows.to_tokens(rows.scan(values_RW, 0.6)), scanned_T)
    position_T = torch.zeros_like(values_T)
    for sequence in sequences:
        position_T[sequence] = torch.arange(len(sequence), dtype=torch.float64)
    torch.testing.assert_close(
        rows.to_tokens(rows.position_RW.double().where(rows.valid_RW, 0.0)), position_T
    )


def test_the_example() -> None:
    """Sequences of 3 and 1 at W = 8: a row each."""
    rows = rows_of(torch.tensor([0, 3, 4]), torch.ones(4, dtype=torch.bool))
    assert rows.index_RW.tolist() == [[0, 1, 2, 4, 4, 4, 4, 4], [3, 4, 4, 4, 4, 4, 4, 4]]
    assert rows.sequence_R.tolist() == [0, 1]


def test_gradients_flow_through_gather_and_scan() -> None:
    cu_seqlens, valid_T, values_T = _packed([5, 0, 70, 3], 0, 0.8)
    rows = rows_of(cu_seqlens, valid_T)

    def smoothed(values_T: torch.Tensor) -> torch.Tensor:
        return rows.to_tokens(rows.scan(rows.of_tokens(values_T), 0.9)).square()

    assert torch.autograd.gradcheck(smoothed, (values_T.requires_grad_(),))


@pytest.mark.parametrize("decay", [0.01, 0.5, 0.999])
def test_a_sequence_of_128k_tokens_among_short_ones(decay: float) -> None:
    """Three levels of rows: 131,072 tokens, 2,048 rows, 32 rows of rows."""
    lengths = [3, 131072, 0, 1]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    values_T = torch.ones(sum(lengths), dtype=torch.float64)
    rows = rows_of(cu_seqlens, torch.ones(sum(lengths), dtype=torch.bool))
    assert rows.above is not None and rows.above.above is not None and rows.above.above.above is None
    scanned_T = rows.to_tokens(rows.scan(rows.of_tokens(values_T), decay))
    # of ones the sum is (1 - decay^(t + 1)) / (1 - decay)
    t = torch.cat([torch.arange(length) for length in lengths]).double()
    torch.testing.assert_close(scanned_T, (1 - decay ** (t + 1)) / (1 - decay), rtol=1e-9, atol=1e-12)


def test_nothing_at_all() -> None:
    rows: Rows = rows_of(torch.tensor([0]), torch.zeros(0, dtype=torch.bool))
    empty_RW = rows.of_tokens(torch.zeros(0))
    assert rows.sum(empty_RW).tolist() == [0.0]
    assert rows.to_tokens(rows.scan(empty_RW, 0.5)).shape == (0,)
