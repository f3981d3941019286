"""Choosing the next token, reproducibly: every sample has its own random numbers, named and not drawn in
turn.

# N rows of a generation batch, V vocabulary
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """temperature 0 is greedy; top_p 1 and top_k 0 are off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: frozenset[int] = frozenset()


def uniforms(seed: int, uid: str, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) that depend on the run's seed and the sample's uid alone: not on the rank,
    nor on what was sampled before. A longer request starts with the same numbers."""
    key = hashlib.blake2b(f"{seed}/{uid}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count)


def sample_seed(seed: int, uid: str) -> int:
    """63 bits that depend on the run's seed and the sample's uid alone, like the local engine's numbers."""
    key = hashlib.blake2b(f"{seed}/{uid}".encode(), digest_size=8).digest()
    return int.from_bytes(key, "little") >> 1


def choose(
    logits_NV: torch.Tensor, uniform_N: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row and its log-prob under the distribution it was drawn from.

    That distribution is softmax(logits / temperature), cut to the top_k most probable tokens, then to the
    smallest set of them that holds top_p of the mass, and renormalised. Greedy has no distribution: its
    log-prob is that of the softmax.

    Example: probabilities (.5, .3, .2), top_p .6 -> drawn from (.625, .375): u = .7 gives token 1, log .375
    """
    logits_NV = logits_NV.float()
    if params.temperature == 0:
        token_N = logits_NV.argmax(-1)
        return token_N, _at(torch.log_softmax(logits_NV, -1), token_N)
    logprob_NV = torch.log_softmax(logits_NV / params.temperature, -1)
    if params.top_k or params.top_p < 1.0:
        dropped_NV = _outside_top(logprob_NV, params)
        logprob_NV = torch.log_softmax(logprob_NV.masked_fill(dropped_NV, -torch.inf), -1)
    cumulative_NV = logprob_NV.double().exp().cumsum(-1)
    # scaled by the actual total, a hair off 1, so that the last token is never overshot
    point_N1 = uniform_N[:, None] * cumulative_NV[:, -1:]
    token_N = torch.searchsorted(cumulative_NV, point_N1, right=True)[:, 0].clamp(max=logits_NV.shape[1] - 1)
    return token_N, _at(logprob_NV, token_N)


def _at(logprob_NV: torch.Tensor, token_N: torch.Tensor) -> torch.Tensor:
    return logprob_NV.gather(1, token_N[:, None])[:, 0]


def _outside_top(logprob_NV: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """True for tokens that top_k or top_p leave out; equal probabilities rank by token id."""
    sorted_NV, order_NV = logprob_NV.sort(dim=-1, descending=True, stable=True)
    probability_NV = sorted_NV.exp()
    if params.top_k:
        probability_NV[:, params.top_k :] = 0.0
    before_NV = probability_NV.cumsum(-1) - probability_NV  # mass of all more probable tokens
    total_N1 = probability_NV.sum(-1, keepdim=True)
    outside_sorted_NV = (before_NV >= params.top_p * total_N1) | (probability_NV == 0.0)
    outside_sorted_NV[:, 0] = False
    return torch.empty_like(outside_sorted_NV).scatter_(1, order_NV, outside_sorted_NV)
