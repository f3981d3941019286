"""Packed attention is each sequence's own causal attention, outputs and gradients, in float64.

# T packed tokens, N query heads, K key/value heads, D head size, L tokens of one sequence,
# B sequences of one bucket, S their padded length
"""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer import TransformerConfig

from grpo_mega.engine.attention import PackedCausalAttention, PackedSequences

MIXED = (1, 70, 3, 17, 2, 33, 64, 1, 9, 65)
LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=6)


def _packed(lengths: list[int] | tuple[int, ...]) -> PackedSequences:
    return PackedSequences.from_cu_seqlens(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))


def _attention(heads: int, **options) -> PackedCausalAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=8 * heads, num_attention_heads=heads, attention_dropout=0.0
    )
    return PackedCausalAttention(config, 1, None, "self", **options)


def _inputs(tokens: int, heads: int, kv_heads: int, size: int, seed: int = 0) -> list[torch.Tensor]:
    """Queries, keys, values, and the gradient from above."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, 1, n, size) for n in (heads, kv_heads, kv_heads)] + [(tokens, 1, heads * size)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _separate(lengths, query, key, value, scale: float) -> torch.Tensor:
    """Sequence by sequence and head by head, with the softmax written out."""
    heads, kv_heads = query.shape[2], key.shape[2]
    outputs = []
    start = 0
    for length in lengths:
        here = slice(start, start + length)
        future_LL = torch.ones(length, length).triu(1).bool()
        by_head = []
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            scores_LL = scale * query[here, 0, head] @ key[here, 0, kv_head].T
            weights_LL = scores_LL.masked_fill(future_LL, -math.inf).softmax(1)
            by_head.append(weights_LL @ value[here, 0, kv_head])
        outputs.append(torch.cat(by_head, dim=1))
        start += length
    return torch.cat(outputs)[:, None]


def _check(lengths, heads: int = 4, kv_heads: int = 2, size: int = 8, seed: int = 0, **options) -> None:
    *qkv, above = _inputs(sum(lengths), heads, kv_heads, size, seed)
    results = []
    for attend in (
        lambda q, k, v: _attention(heads, **options)(q, k, v, packed_seq_params=_packed(lengths)),
        lambda q, k, v: _separate(lengths, q, k, v, options.get("softmax_scale") or size**-0.5),
    ):
        leaves = [x.clone().requires_grad_() for x in qkv]
        output = attend(*leaves)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, above)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1), (1, 1)])
def test_equals_separate_causal_attention(heads, kv_heads):
    _check(MIXED, heads, kv_heads)


@settings(deadline=None, max_examples=25)
@given(LENGTHS, st.integers(0, 2**31))
def test_equals_separate_causal_attention_at_any_lengths(lengths, seed):
    _check(lengths, heads=2, kv_heads=1, size=4, seed=seed)


def test_a_given_scale_is_used():
    _check((5, 3), softmax_scale=0.3)


def test_a_sequence_of_no_tokens_is_passed_over():
    _check((3, 0, 1, 2, 0))  # also beside a one-token sequence, and past the last token


def test_packing_reorders_nothing():
    """Whatever the neighbours, a sequence's outputs stand where its tokens stand."""
    alone = _inputs(5, 2, 1, 8)[:3]
    others = _inputs(4, 2, 1, 8, seed=1)[:3]
    attention = _attention(2)
    expected = attention(*alone, packed_seq_params=_packed([5]))
    together = [torch.cat([o[:3], a, o[3:]]) for a, o in zip(alone, others, strict=True)]
    output = attention(*together, packed_seq_params=_packed([3, 5, 1]))
    torch.testing.assert_close(output[3:8], expected)


def test_buckets_by_hand():
    # 1 | 2 | 3 4 | 5 8 | 9: at most twice the shortest
    rows = _packed([5, 1, 3, 9, 8, 2, 4]).bucket_rows_BS
    assert sorted(tuple(rows_BS.shape) for rows_BS in rows) == [(1, 1), (1, 2), (1, 9), (2, 4), (2, 8)]
    # 5 starts at 0 and 8 at 5 + 1 + 3 + 9 = 18; the short row is filled with its first token
    (eights_BS,) = (rows_BS for rows_BS in rows if rows_BS.shape[1] == 8)
    assert eights_BS.tolist() == [[0, 1, 2, 3, 4, 0, 0, 0], list(range(18, 26))]


@settings(deadline=None)
@given(st.lists(st.integers(0, 600), min_size=1, max_size=40).filter(any))
def test_buckets_waste_less_than_half_and_lose_no_token(lengths):
    packed = _packed(lengths)
    flat = torch.cat([rows_BS.flatten() for rows_BS in packed.bucket_rows_BS])
    assert flat[packed.restore_T].tolist() == list(range(sum(lengths)))
    for rows_BS in packed.bucket_rows_BS:
        real = len(rows_BS.unique())
        assert real > rows_BS.numel() / 2
    # few dense calls: one for each doubling of the length
    assert len(packed.bucket_rows_BS) <= 1 + math.ceil(math.log2(max(lengths)))
    assert packed.max_seqlen_q == packed.max_seqlen_kv == max(lengths)


def test_dropout_is_refused():
    with pytest.raises(AssertionError, match="dropout"):
        _attention(1, attention_dropout=0.1)
