"""Choosing tokens: frequencies, cuts and their log-probs, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from grpo_mega.rollout.sampling import SamplingParams, choose, uniforms

PROBABILITIES = torch.tensor([0.5, 0.3, 0.2])


def _choose(us: list[float], **options: Any):
    logits = PROBABILITIES.log().expand(len(us), 3)
    tokens, logprobs = choose(logits, torch.tensor(us, dtype=torch.float64), SamplingParams(8, **options))
    return tokens.tolist(), logprobs.tolist()


def test_inverse_of_the_cumulative_distribution():
    # cumulative .5 .8 1
    tokens, logprobs = _choose([0.0, 0.49, 0.51, 0.79, 0.81, 0.999999])
    assert tokens == [0, 0, 1, 1, 2, 2]
    assert logprobs == pytest.approx([math.log(p) for p in (0.5, 0.5, 0.3, 0.3, 0.2, 0.2)])


def test_top_p_keeps_the_smallest_set_and_renormalises():
    # .5 < .6 <= .5 + .3: two tokens stay, .625 and .375
    tokens, logprobs = _choose([0.6, 0.63, 0.99], top_p=0.6)
    assert tokens == [0, 1, 1]
    assert logprobs == pytest.approx([math.log(0.625), math.log(0.375), math.log(0.375)])


def test_top_p_below_the_best_token_keeps_that_one():
    assert _choose([0.99], top_p=0.01) == ([0], [0.0])


def test_top_k_cuts_before_top_p():
    # top 2 hold .8; of these .5 is .625, enough for top_p .6
    assert _choose([0.99], top_k=2, top_p=0.6) == ([0], [0.0])
    assert _choose([0.99], top_k=2)[0] == [1]


def test_temperature_sharpens():
    # squares .25 .09 .04 over their sum .38
    tokens, logprobs = _choose([0.6, 0.7], temperature=0.5)
    assert tokens == [0, 1]
    assert logprobs == pytest.approx([math.log(0.25 / 0.38), math.log(0.09 / 0.38)])


def test_greedy_ignores_the_random_number():
    tokens, logprobs = _choose([0.0, 0.99], temperature=0.0)
    assert tokens == [0, 0]
    assert logprobs == pytest.approx([math.log(0.5)] * 2)


def test_uniforms_are_named_not_drawn():
    whole = uniforms(3, "train-5/2", 16)
    assert (uniforms(3, "train-5/2", 4) == whole[:4]).all()
    assert not np.allclose(uniforms(3, "train-5/3", 16), whole)
    assert not np.allclose(uniforms(4, "train-5/2", 16), whole)
    many = np.concatenate([uniforms(0, f"p/{i}", 8) for i in range(2000)])
    assert abs(many.mean() - 0.5) < 0.01 and abs(many.var() - 1 / 12) < 0.005
