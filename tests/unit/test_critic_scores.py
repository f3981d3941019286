"""Where an answer is scored: by its own tokens, whatever padding and end-of-sequence do.

# T packed tokens, B sequences, N sequences of the step
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_mega.critic.pairs import AnswerPair, _distinct
from grpo_mega.critic.scores import ScoredBatch, counted, mixed, scored
from grpo_mega.data.packing import pack
from grpo_mega.types import TrainSequence

EOS, STOP = 1, 2
PAD = 0  # what `pack` fills up with; EOS may be 0 as well
CPU = torch.device("cpu")


def batch_of(
    answers: list[list[int]], kind: str, *, prompt=(7, 8), padded: int = 40, eos=(EOS,)
) -> ScoredBatch:
    sequences = [
        TrainSequence(
            order, f"made-{order}", np.array([*prompt, *answer]), len(prompt), np.empty(0, np.float32)
        )
        for order, answer in enumerate(answers)
    ]
    return scored(pack(sequences, padded, CPU), range(len(answers)), eos, kind)


def weights_at(batch: ScoredBatch, sequence: int) -> list[float]:
    start, stop = batch.batch.cu_seqlens[sequence : sequence + 2].tolist()
    return batch.weights_T[start:stop].tolist()


@pytest.mark.parametrize(
    ("answer", "last", "mean"),
    [
        ([5, 6, EOS], [0, 1, 0], [0.5, 0.5, 0]),
        ([5, 6], [0, 1], [0.5, 0.5]),  # cut off before its end
        ([5, 6, EOS, EOS], [0, 1, 0, 0], [0.5, 0.5, 0, 0]),
        ([EOS], [1], [1]),  # a lone one is used as it is
        ([5, EOS, 6, EOS], [0, 0, 1, 0], [0.5, 0, 0.5, 0]),
    ],
    ids=["ended", "cut off", "ended twice", "nothing but the end", "an end inside"],
)
def test_the_end_of_sequence_is_not_scored(answer, last, mean) -> None:
    for kind, expected in (("last", last), ("mean", mean)):
        batch = batch_of([[9, 9], answer], kind)
        assert weights_at(batch, 1) == [0, 0, *expected]  # two of the prompt first
        assert not batch.weights_T[int(batch.batch.cu_seqlens[2]) :].any()


def test_lengths_decide_where_padding_and_end_have_one_id() -> None:
    """Here 0 pads, and 0 ends an answer too."""
    batch = batch_of([[5, 6, PAD], [5, PAD]], "last", eos=(PAD,))
    assert weights_at(batch, 0) == [0, 0, 0, 1, 0]
    assert weights_at(batch, 1) == [0, 0, 1, 0]


def test_several_tokens_may_end_an_answer() -> None:
    batch = batch_of([[5, 6, STOP]], "last", eos=(EOS, STOP))
    assert weights_at(batch, 0) == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_raw_scores_by_hand(kind) -> None:
    # behind prompts of two tokens: values 2, 3 | EOS and 7
    batch = batch_of([[5, 6, EOS], [4]], kind, padded=10)
    values_T = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert batch.raw_scores(values_T).tolist() == [3.0 if kind == "last" else 2.5, 7.0]


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_token_gradients_are_those_of_the_scores(kind) -> None:
    batch = batch_of([[5, 6, EOS], [4], [3, 3, 3]], kind, padded=16)
    values_T = torch.randn(16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gradient_N = torch.tensor([0.3, -2.0, 1.5], dtype=torch.float64)
    (expected,) = torch.autograd.grad((batch.raw_scores(values_T) * gradient_N).sum(), values_T)
    torch.testing.assert_close(batch.token_gradients(gradient_N), expected)


def test_a_micro_batch_of_padding_scores_nothing() -> None:
    batch = batch_of([], "last", padded=8)
    assert batch.raw_scores(torch.ones(8)).tolist() == []
    assert not batch.token_gradients(torch.ones(3, dtype=torch.float64)).any()


def test_the_length_mix_by_known_numbers() -> None:
    """Seen in an old run: a raw difference of 13.88, .291 a token, mixed to 9.81; what the temperatures 2 and
    5 make of it."""
    raw, per_token = 13.88, 0.291
    value = mixed(torch.tensor([raw], dtype=torch.float64), torch.tensor([raw / per_token])).item()
    assert value == pytest.approx(0.7 * raw + 0.3 * per_token)
    assert value == pytest.approx(9.81, abs=0.01)
    sigmoid = [1 / (1 + math.exp(-9.81 / tau)) for tau in (2, 5)]
    assert sigmoid == pytest.approx([0.993, 0.877], abs=5e-4)


tokens = st.integers(3, 9)
answers = st.lists(tokens, min_size=1, max_size=6)
ends = st.lists(st.just(EOS), max_size=3)


@given(answers, ends, ends, st.sampled_from(["last", "mean"]))
def test_ends_and_padding_never_move_a_score(answer, end, other_end, kind) -> None:
    """A causal model gives the same values to the same beginnings."""

    def score(tail: list[int], padded: int) -> float:
        batch = batch_of([[*answer, *tail]], kind, padded=padded)
        values_T = torch.arange(padded, dtype=torch.float32).sin()
        return batch.raw_scores(values_T).item()

    assert score(end, 14) == score(other_end, 24)


@given(answers, ends, ends)
def test_equal_answers_are_one_sequence(answer, end, other_end) -> None:
    """Whichever was cut off: their difference is then exactly 0, with no arithmetic between them."""
    pair = AnswerPair("a/0", (7, 8), (*answer, *end), (*answer, *other_end))
    sequences, (entry,) = _distinct([3], [pair], (EOS,))
    assert entry.teacher == entry.student == 6 and entry.identical
    assert [sequence.token_ids.tolist() for sequence in sequences] == [[7, 8, *answer]]
    assert entry.teacher_length == entry.student_length == len(answer)


def test_a_teacher_is_computed_once_for_all_pairs_of_its_prompt() -> None:
    pairs = [AnswerPair(f"a/{i}", (7,), (4, 5, EOS), (4, i, EOS)) for i in (6, 7, 7)]
    sequences, entries = _distinct([0, 1, 2], pairs, (EOS,))
    assert [sequence.order for sequence in sequences] == [0, 1, 3]
    assert [(entry.teacher, entry.student) for entry in entries] == [(0, 1), (0, 3), (0, 3)]


def test_the_same_text_counts_as_identical_whatever_its_tokens() -> None:
    pair = AnswerPair("a/0", (7,), (4, 5), (6,), teacher="ab", student="ab")
    sequences, (entry,) = _distinct([0], [pair], (EOS,))
    assert entry.identical and len(sequences) == 2
    other = AnswerPair("a/0", (7,), (4, 5), (6,))  # no texts were given
    assert not _distinct([0], [other], (EOS,))[1][0].identical


def test_an_answer_without_a_token_is_refused() -> None:
    with pytest.raises(AssertionError, match="at least one token"):
        counted(np.array([], dtype=np.int64), (EOS,))
