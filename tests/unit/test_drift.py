"""Who is to blame when the policy is far from what its samples were drawn under."""

from __future__ import annotations

import torch

from grpo_mega.data.packing import pack
from grpo_mega.drift import SUSPECTS, _suspects
from grpo_mega.types import PackedBatch, TrainSequence
from tests import tiny


def _packed(sequences: list[TrainSequence]) -> PackedBatch:
    return pack(sequences, 64, torch.device("cpu"))


def test_the_token_that_is_furthest_away_is_named_by_its_place_in_the_response():
    sequences = tiny.random_sequences(2, seed=1)
    batch = _packed(sequences)
    second = sequences[1]
    assert second.prompt_length > 1 and second.response_length > 3
    place = int(batch.cu_seqlens[1]) + second.prompt_length + 3
    logprobs_T = batch.sampler_logprobs_T.clone()
    logprobs_T[place] -= 30.0
    logprobs_T[0] -= 99.0  # of a prompt
    first, *rest = _suspects(logprobs_T, batch)
    assert (first.uid, first.position) == (second.uid, 3)
    assert first.token_id == int(batch.tokens_T[place])
    assert first.distance > 29.0 and len(rest) < SUSPECTS and all(other.distance == 0.0 for other in rest)


def test_a_log_prob_that_is_no_number_is_the_furthest_away():
    batch = _packed(tiny.random_sequences(2, seed=1))
    (place,) = batch.response_mask_T.nonzero()[-1].tolist()
    logprobs_T = batch.sampler_logprobs_T.clone()
    logprobs_T[place] = torch.nan
    assert _suspects(logprobs_T, batch)[0].distance == float("inf")
