"""From sequences to micro-batches: plans by hand and what holds for every plan; the packed fields by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mega.data.packing import BatchPlan, pack, plan_batch
from grpo_mega.types import TrainSequence

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 40), max_size=30)


def _load(orders: tuple[int, ...], lengths: dict[int, int]) -> int:
    return sum(lengths[order] for order in orders)


def _sequence(token_ids: list[int], prompt_length: int, logprobs: list[float], advantage: float = 0.0):
    sampled = np.array(logprobs, np.float32)
    return TrainSequence(0, "made/0", np.array(token_ids), prompt_length, sampled, advantage)


def test_plan_by_hand():
    # longest first: 5 -> rank 0, 4 -> rank 1, 3 -> rank 1 (4 < 5): loads 5 and 7, each within 8 tokens
    assert plan_batch({0: 5, 1: 3, 2: 4}, 2, 8) == BatchPlan(bins=(((0,),), ((1, 2),)), padded_length=7)


def test_plan_uses_as_few_micro_batches_as_fit():
    # 8 sequences of 4 tokens: 16 a rank, two micro-batches of 8
    plan = plan_batch(dict.fromkeys(range(8), 4), 2, 8)
    assert [len(bins) for bins in plan.bins] == [2, 2] and plan.padded_length == 8
    # 15 tokens would go into two bins of 8 by their sum, but no two of 5 fit in one
    assert [len(bins) for bins in plan_batch({0: 5, 1: 5, 2: 5}, 1, 8).bins] == [3]


def test_multiples_by_hand():
    # 8 tokens need two micro-batches; whole rounds of 4 make it four. 2 tokens pad to a multiple of 8.
    plan = plan_batch(dict.fromkeys(range(4), 2), 1, 4, micro_batch_multiple=4, length_multiple=8)
    assert plan == BatchPlan(bins=(((0,), (1,), (2,), (3,)),), padded_length=8)
    # 15 tokens ask for two of 8, which do not hold three times 5: the next whole round is four
    plan = plan_batch({0: 5, 1: 5, 2: 5}, 1, 8, micro_batch_multiple=2)
    assert plan == BatchPlan(bins=(((0,), (1,), (2,), ()),), padded_length=5)


def test_ranks_with_equally_many_tokens_get_equally_many_sequences():
    # 6 | 5 3 | 1 1 to the first, 8 tokens each: the last 1 goes where two sequences are, not three
    plan = plan_batch({0: 6, 1: 5, 2: 3, 3: 1, 4: 1, 5: 1}, 2, 100)
    assert plan.bins == (((0, 3, 4),), ((1, 2, 5),))


def test_a_long_sequence_is_alone_and_stretches_every_micro_batch():
    plan = plan_batch({0: 3, 1: 20, 2: 3, 3: 3}, 1, 8)
    assert (1,) in plan.bins[0]
    assert plan.padded_length == 20
    assert {order for bin_ in plan.bins[0] for order in bin_} == {0, 1, 2, 3}


def test_a_rank_without_sequences_has_as_many_micro_batches_of_padding():
    plan = plan_batch({7: 4}, 3, 8)
    assert plan.bins == (((7,),), ((),), ((),)) and plan.padded_length == 4
    assert plan.rank_of == {7: 0}
    assert plan_batch({}, 2, 8) == BatchPlan(bins=(((),), ((),)), padded_length=1)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(1, 60), st.integers(1, 4), st.integers(1, 8))
def test_every_plan(values, ranks, max_tokens, micro_batch_multiple, length_multiple):
    lengths = dict(enumerate(values, start=100))
    plan = plan_batch(
        lengths,
        ranks,
        max_tokens,
        micro_batch_multiple=micro_batch_multiple,
        length_multiple=length_multiple,
    )
    bins = [bin_ for rank_bins in plan.bins for bin_ in rank_bins]
    assert sorted(order for bin_ in bins for order in bin_) == sorted(lengths)  # each exactly once
    assert all(_load(bin_, lengths) <= max_tokens or len(bin_) == 1 for bin_ in bins)

    assert len(plan.bins) == ranks
    (count,) = {len(rank_bins) for rank_bins in plan.bins}
    assert count >= 1 and count % micro_batch_multiple == 0

    longest = max(_load(bin_, lengths) for bin_ in bins)
    assert plan.padded_length % length_multiple == 0
    assert max(1, longest) <= plan.padded_length < max(1, longest) + length_multiple

    for rank, rank_bins in enumerate(plan.bins):
        assert all(plan.rank_of[order] == rank for bin_ in rank_bins for order in bin_)


def test_a_long_sequence_adds_no_empty_micro_batches():
    """Each would be padded to the long sequence's length, and cost as much as it does."""
    assert plan_batch({0: 40}, 1, 8) == BatchPlan(bins=(((0,),),), padded_length=40)
    # 20 alone; 3 + 3 within 8
    assert plan_batch({0: 3, 1: 20, 2: 3}, 1, 8) == BatchPlan(bins=(((1,), (0, 2)),), padded_length=20)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(1, 60), st.integers(1, 4))
def test_never_more_micro_batches_than_sequences(values, ranks, max_tokens, multiple):
    """One sequence to a micro-batch always fits; only whole rounds can ask for more."""
    plan = plan_batch(dict(enumerate(values)), ranks, max_tokens, micro_batch_multiple=multiple)
    most = max(sum(map(len, rank_bins)) for rank_bins in plan.bins)
    assert len(plan.bins[0]) < max(1, most) + multiple


@settings(deadline=None)
@given(LENGTHS.filter(bool), st.integers(1, 6))
def test_ranks_and_micro_batches_are_balanced(values, ranks):
    """The heaviest part took its last sequence as the lightest one: no two differ by more than one
    sequence."""
    lengths = dict(enumerate(values))
    plan = plan_batch(lengths, ranks, max_tokens=max(values) * 2)
    loads = [sum(_load(bin_, lengths) for bin_ in rank_bins) for rank_bins in plan.bins]
    assert max(loads) - min(loads) <= max(values)
    for rank_bins in plan.bins:
        inner = [_load(bin_, lengths) for bin_ in rank_bins]
        assert max(inner) - min(inner) <= max(values)


def test_longest_first_balances_better_than_in_order():
    # in order: 2+2+4 = 8 against 2+2 = 4 or worse; longest first: 4+2 and 2+2+2
    plan = plan_batch({0: 2, 1: 2, 2: 2, 3: 2, 4: 4}, 2, 100)
    assert sorted(sum(map(len, rank_bins)) for rank_bins in plan.bins) == [2, 3]
    assert plan.padded_length == 6


@settings(deadline=None)
@given(st.permutations(list(enumerate([3, 3, 3, 9, 1, 1, 5, 5, 2]))))
def test_plan_does_not_depend_on_the_order_of_the_dict(items):
    """Ranks learn of the lengths in different orders, and must come to one plan."""
    assert plan_batch(dict(items), 2, 10) == plan_batch(dict(sorted(items)), 2, 10)


def test_pack_by_hand():
    """Two sequences of 3 and 4 tokens, padded to 10."""
    batch = pack(
        [
            _sequence([11, 12, 13], 1, [-0.25, -0.5], advantage=1.5),
            _sequence([21, 22, 23, 24], 3, [-0.75], advantage=-2.0),
        ],
        10,
        CPU,
    )
    assert batch.tokens_T.tolist() == [11, 12, 13, 21, 22, 23, 24, 0, 0, 0]
    # the last token of a sequence predicts nothing, least of all the next sequence's first token
    assert batch.targets_T.tolist() == [12, 13, 0, 22, 23, 24, 0, 0, 0, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2]
    assert batch.response_mask_T.tolist() == [False, True, True, False, False, False, True] + [False] * 3
    assert batch.sampler_logprobs_T.tolist() == [0.0, -0.25, -0.5, 0.0, 0.0, 0.0, -0.75, 0.0, 0.0, 0.0]
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 10]
    assert batch.advantages_B.tolist() == [1.5, -2.0]
    assert (batch.num_sequences, batch.max_seqlen) == (2, 4)
    assert batch.tokens_T.dtype == batch.targets_T.dtype == batch.positions_T.dtype == torch.int64
    assert batch.response_mask_T.dtype == torch.bool and batch.cu_seqlens.dtype == torch.int32
    assert batch.sampler_logprobs_T.dtype == batch.advantages_B.dtype == torch.float32


def test_pack_without_padding_has_no_padding_sequence():
    batch = pack([_sequence([1, 2], 1, [-0.5]), _sequence([3], 1, [])], 3, CPU)
    assert batch.cu_seqlens.tolist() == [0, 2, 3]
    assert batch.targets_T.tolist() == [2, 0, 0]
    assert (batch.num_sequences, batch.max_seqlen) == (2, 2)


def test_the_padding_counts_as_a_sequence_for_the_longest():
    assert pack([_sequence([1, 2], 1, [-0.5])], 9, CPU).max_seqlen == 7  # attention kernels run over it too


def test_pack_of_supervised_sequences_has_a_mask_but_no_logprobs():
    batch = pack([_sequence([1, 2, 3], 1, [])], 4, CPU)
    assert batch.response_mask_T.tolist() == [False, True, True, False]
    assert batch.sampler_logprobs_T.tolist() == [0.0] * 4


def test_pack_of_nothing_is_padding():
    batch = pack([], 4, CPU)
    assert batch.tokens_T.tolist() == [0] * 4 and not batch.response_mask_T.any()
    assert batch.positions_T.tolist() == [0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 4]
    assert batch.advantages_B.shape == (0,)
    assert (batch.num_sequences, batch.max_seqlen) == (0, 4)


def test_a_sequence_that_does_not_fit_is_refused():
    with pytest.raises(ValueError):
        pack([_sequence([1, 2, 3], 1, [-0.5, -0.5])], 2, CPU)
