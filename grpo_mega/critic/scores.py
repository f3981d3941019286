"""From a value for each token to one score of an answer.

    last   the value of the last token that is not the end-of-sequence; a lone one is used as it is
    mean   the mean over the tokens that are not

Both are linear in the values, raw = sum_t c_t v_t, with constants c_t that follow from tokens and lengths
alone: never from padding ids, which may equal the end-of-sequence, and never from whether an answer ends with
one.

# T packed tokens of one micro-batch, B its sequences, N sequences of the step
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from grpo_mega.types import PackedBatch

ScoreKind = Literal["last", "mean"]

RAW_SHARE, PER_TOKEN_SHARE = 0.7, 0.3
"""Of the length mix."""


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """A micro-batch and how its sequences are scored.

    Example: answers (a b EOS) and (c) behind prompts of one token, `last`, orders 4 and 7:
             weights_T = 0 0 1 0 0 1, sequence_T = 0 0 0 0 1 1, orders_B = 4 7
    """

    batch: PackedBatch
    orders_B: torch.Tensor  # int64: the step's number of each sequence
    sequence_T: torch.Tensor  # int64: which of the B a token belongs to; padding says the last
    weights_T: torch.Tensor  # float32, 0 at every token that does not count

    def raw_scores(self, values_T: torch.Tensor) -> torch.Tensor:
        """raw_B in float64."""
        raw_B = values_T.new_zeros(max(1, self.orders_B.numel()), dtype=torch.float64)
        weighted_T = self.weights_T.double() * values_T.double()
        return raw_B.index_add(0, self.sequence_T, weighted_T)[: self.orders_B.numel()]

    def token_gradients(self, gradient_N: torch.Tensor) -> torch.Tensor:
        """d loss / d values_T from d loss / d raw_N."""
        if not self.orders_B.numel():  # padding only
            return torch.zeros_like(self.weights_T)
        return self.weights_T * gradient_N[self.orders_B][self.sequence_T].float()


def scored(
    batch: PackedBatch, orders: Sequence[int], eos_ids: Collection[int], kind: ScoreKind
) -> ScoredBatch:
    """How the sequences of a micro-batch are scored; `orders` are theirs, as they were packed."""
    tokens, mask = batch.tokens_T.cpu().numpy(), batch.response_mask_T.cpu().numpy()
    boundaries = batch.cu_seqlens.cpu().numpy()
    weights = np.zeros(len(tokens), np.float32)
    sequence = np.full(len(tokens), max(0, len(orders) - 1), np.int64)
    for index in range(len(orders)):
        start, stop = int(boundaries[index]), int(boundaries[index + 1])
        sequence[start:stop] = index
        answer = start + np.flatnonzero(mask[start:stop])
        places = answer[counted(tokens[answer], eos_ids)]
        if kind == "last":
            weights[places[-1]] = 1.0
        else:
            weights[places] = 1.0 / len(places)
    place = batch.tokens_T.device
    return ScoredBatch(
        batch=batch,
        orders_B=torch.tensor(orders, dtype=torch.int64, device=place),
        sequence_T=torch.from_numpy(sequence).to(place),
        weights_T=torch.from_numpy(weights).to(place),
    )


def counted(answer: np.ndarray, eos_ids: Collection[int]) -> np.ndarray:
    """Which tokens of an answer a score may look at: all but the end-of-sequence, or all where there is
    nothing else."""
    assert len(answer), "an answer has at least one token"
    content = ~np.isin(answer, list(eos_ids))
    return content if content.any() else np.ones_like(content)


def mixed(raw_N: torch.Tensor, lengths_N: torch.Tensor) -> torch.Tensor:
    """.7 raw + .3 raw / length: what the first implementation used, a bias towards short answers.

    Example: raw 10 of 5 tokens -> 7 + .6 = 7.6
    """
    return RAW_SHARE * raw_N + PER_TOKEN_SHARE * raw_N / lengths_N
