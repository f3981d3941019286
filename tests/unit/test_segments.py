"""Structured responses: which part each token belongs to, and what credit it gets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo_mega.algo import PolicyLoss
from grpo_mega.algo.innovations.sca import ANSWER as A
from grpo_mega.algo.innovations.sca import PROCESS as P
from grpo_mega.algo.innovations.sca import STRUCTURE as S
from grpo_mega.algo.innovations.sca import UNPARSED as U
from grpo_mega.algo.segments import Markers, batch_segments, segments_of_response
from grpo_mega.data.packing import pack
from grpo_mega.types import TrainSequence

T1, T2, A1, A2 = 11, 12, 13, 14
SINGLE = Markers((T1,), (T2,), (A1,), (A2,))
DOUBLE = Markers((T1, 0), (T2,), (A1,), (A2, 0))


@pytest.mark.parametrize(
    ("ids", "markers", "expected"),
    [
        ([T1, 1, 2, T2, A1, 3, A2, 9], SINGLE, [S, P, P, S, S, A, S, S]),
        ([5, T1, T2, 6, A1, A2], SINGLE, [S] * 6),  # nothing between the markers
        ([T1, 0, 1, T2, A1, 3, A2, 0], DOUBLE, [S, S, P, S, S, A, S, S]),
        ([T1, 1, T2, A1, 3], SINGLE, [U] * 5),  # a marker is missing
        ([A1, 3, A2, T1, 1, T2], SINGLE, [U] * 6),  # out of order
        ([T1, 1, T2, T1, 2, T2, A1, 3, A2], SINGLE, [S, S, S, S, P, S, S, A, S]),  # the last match counts
        ([T1, 1, T2, A1, 4, A2, A1, 3, A2], SINGLE, [S, P, S, S, S, S, S, A, S]),
        ([], SINGLE, []),
        ([A2], DOUBLE, [U]),  # shorter than the marker that it begins
        ([T1, T1, 0, 7, T2, A1, A2, A2, 0], DOUBLE, [S, S, S, P, S, S, A, S, S]),  # half a marker is text
    ],
)
def test_the_parts_of_a_response(ids: list[int], markers: Markers, expected: list[int]) -> None:
    assert segments_of_response(np.array(ids, np.int64), markers).tolist() == expected


def test_of_a_packed_batch_only_responses_are_parsed() -> None:
    """The second prompt holds markers too: they are not the policy's."""
    response = [T1, 1, T2, A1, 3, A2]
    sequences = [
        TrainSequence(0, "a/0", np.array([7, 7, *response]), 2, np.zeros(6, np.float32)),
        TrainSequence(1, "b/0", np.array([*response, 5, 5]), 6, np.zeros(2, np.float32)),
    ]
    batch = pack(sequences, 20, torch.device("cpu"))
    expected = [U, U, S, P, S, S, A, S] + [U] * 12
    assert batch_segments(batch, SINGLE).tolist() == expected


def _weights(segments: list[int], **options: object) -> torch.Tensor:
    """Credit of each token, read off the gradient of the per-token loss at ratio 1 and advantage -1."""
    count = len(segments)
    trainer_T = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    loss = PolicyLoss({"innovations": {"sca": options}, "aggregate": "seq-mean-token-sum"})
    loss(
        trainer_T,
        torch.zeros(count, dtype=torch.float64),
        torch.tensor([-1.0]),
        torch.tensor([0, count]),
        segments_T=torch.tensor(segments, dtype=torch.int8),
    ).loss.backward()
    assert trainer_T.grad is not None
    return trainer_T.grad


def test_credit_by_hand() -> None:
    """L = 6: thought .5 x 6 = 3; four others share .2 x 6 = 1.2; the answer .3 x 6 = 1.8."""
    assert _weights([S, P, S, S, A, S]).tolist() == pytest.approx([0.3, 3.0, 0.3, 0.3, 1.8, 0.3])


def test_a_part_that_is_not_there_leaves_its_share_to_the_others() -> None:
    """No thought: .2 and .3 become .4 and .6 of L = 5."""
    assert _weights([S, S, S, A, S]).tolist() == pytest.approx([0.5, 0.5, 0.5, 3.0, 0.5])


def test_thought_decays_inside_and_keeps_its_share() -> None:
    weights = _weights([S, P, P, P, S, S, A, S])
    thought = weights[1:4]
    assert float(thought.sum()) == pytest.approx(0.5 * 8)
    # LSPD over three tokens: the last weighs e^-2 of the first
    assert float(thought[2] / thought[0]) == pytest.approx(np.exp(-2))
    assert float(weights.mean()) == pytest.approx(1.0)


def test_an_unparsed_response_has_credit_1_everywhere() -> None:
    assert _weights([U, U, U]).tolist() == [1.0, 1.0, 1.0]


def test_without_segments_it_says_what_is_missing() -> None:
    loss = PolicyLoss({"innovations": {"sca": {}}})
    with pytest.raises(ValueError, match="segments_T"):
        loss(torch.zeros(2), torch.zeros(2), torch.ones(1), torch.tensor([0, 2]))
