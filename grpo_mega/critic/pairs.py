"""A step's pairs, a teacher's and a student's answer to the same prompt, laid out over ranks and
micro-batches so that the loss over all of them has its exact gradient.

The loss is no sum over micro-batches: batch norm divides by the std of ALL scores, of both sides, on all
ranks. A pipeline schedule wants a loss for each micro-batch all the same. So an update takes two passes:

    1. forward only, a micro-batch at a time: raw_N, one number of each sequence, summed up on every rank
    2. on every rank alike, loss(raw_N) and g_N = d loss / d raw_N by autograd over these N numbers
    3. forward and backward, a micro-batch at a time, of sum_n g_n raw_n with g_n held constant

The chain rule makes the gradient of 3 that of the loss: sum_n (d loss / d raw_n) (d raw_n / d weights). Which
rank holds which sequence, and how they are cut into micro-batches, nowhere enters.

The end-of-sequence at an answer's end is taken off first: no score looks at it or is moved by it. Then equal
answers to a prompt are one sequence, computed once, and their difference is exactly 0, whichever of the two
had been cut off before its end.

# N distinct sequences of the step, P pairs of the step
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from grpo_mega.batching import deal
from grpo_mega.critic.scores import ScoredBatch, ScoreKind, counted, scored
from grpo_mega.data.packing import pack
from grpo_mega.engine.device import device
from grpo_mega.engine.parallel import Layout
from grpo_mega.types import TrainSequence


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """Two answers to one prompt, tokenised alike.

    Example: AnswerPair(uid="train-17/3", prompt_ids=(19, 7), teacher_ids=(4, 5, 1), student_ids=(4, 6, 1),
                        prompt="2+2=", teacher="4", student="5")
    """

    uid: str  # of the student's sample
    prompt_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    student_ids: tuple[int, ...]
    prompt: str = ""
    teacher: str = ""
    student: str = ""

    def without_end(self, eos_ids: Collection[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Teacher and student, each less the end-of-sequence at its end; a lone one stays."""
        return _without_end(self.teacher_ids, eos_ids), _without_end(self.student_ids, eos_ids)


def _without_end(answer: tuple[int, ...], eos_ids: Collection[int]) -> tuple[int, ...]:
    end = len(answer)
    while end > 1 and answer[end - 1] in eos_ids:
        end -= 1
    return answer[:end]


@dataclass(frozen=True, slots=True)
class PairBatch:
    """One step's pairs: this rank's micro-batches, and on every rank alike which sequences make which pair.

    Example: places 0 and 1, one teacher for both, the second student's answer equal to the teacher's:
             teacher_P = 0 0, student_P = 1 0, identical_P = false true, two sequences in all
    """

    batches: list[ScoredBatch]
    places_P: tuple[int, ...]  # rising: the step's number of each pair
    teacher_P: torch.Tensor  # int64: its sequence
    student_P: torch.Tensor
    identical_P: torch.Tensor  # bool: the two answers are the same text
    lengths_N: torch.Tensor  # float64: tokens of each answer that count
    tokens: int  # of all sequences

    @property
    def count(self) -> int:
        return int(self.lengths_N.numel())


@dataclass(frozen=True, slots=True)
class _Entry:
    """What every rank must know of a pair; a sequence's number is that of the place and side that brought it
    first, twice the place for a teacher's, one more for a student's."""

    place: int
    teacher: int
    student: int
    teacher_length: int
    student_length: int
    identical: bool


def distribute_pairs(
    places: Sequence[int],
    pairs: Sequence[AnswerPair],
    layout: Layout,
    micro_batch_tokens: int,
    eos_ids: Collection[int],
    kind: ScoreKind,
) -> PairBatch:
    """Balance the step's pairs over data-parallel ranks by tokens and pack this rank's share. A collective:
    each rank brings the pairs it made, `places` are their numbers in the step.

    A teacher's answer is computed once for all pairs of its prompt that one rank brought.
    """
    sequences, mine = _distinct(places, pairs, eos_ids)
    gathered: list[list[_Entry]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, mine)
    entries = sorted((entry for part in gathered for entry in part), key=lambda entry: entry.place)
    dealt = deal(sequences, layout, micro_batch_tokens)
    index_of = {order: index for index, order in enumerate(sorted(dealt.lengths.total))}
    batches = [
        scored(
            pack(bin_, dealt.padded_length, device()),
            [index_of[sequence.order] for sequence in bin_],
            eos_ids,
            kind,
        )
        for bin_ in dealt.bins
    ]
    lengths_N = torch.ones(len(index_of), dtype=torch.float64)
    for entry in entries:
        lengths_N[index_of[entry.teacher]] = entry.teacher_length
        lengths_N[index_of[entry.student]] = entry.student_length
    return PairBatch(
        batches=batches,
        places_P=tuple(entry.place for entry in entries),
        teacher_P=_on_device([index_of[entry.teacher] for entry in entries], torch.int64),
        student_P=_on_device([index_of[entry.student] for entry in entries], torch.int64),
        identical_P=_on_device([entry.identical for entry in entries], torch.bool),
        lengths_N=lengths_N.to(device()),
        tokens=sum(dealt.lengths.total.values()),
    )


def _on_device(values: Sequence[int | bool], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device())


def _distinct(
    places: Sequence[int], pairs: Sequence[AnswerPair], eos_ids: Collection[int]
) -> tuple[list[TrainSequence], list[_Entry]]:
    """This rank's sequences, equal ones once, and which pair consists of which."""
    number_of: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    sequences: list[TrainSequence] = []
    entries: list[_Entry] = []
    for place, pair in zip(places, pairs, strict=True):
        answers = pair.without_end(eos_ids)
        numbers: list[int] = []
        for side, answer in enumerate(answers):
            key = (pair.prompt_ids, answer)
            if key not in number_of:
                number_of[key] = 2 * place + side
                sequences.append(_sequence(2 * place + side, pair, answer))
            numbers.append(number_of[key])
        teacher, student = (int(counted(np.array(answer), eos_ids).sum()) for answer in answers)
        same = numbers[0] == numbers[1] or (bool(pair.teacher) and pair.teacher == pair.student)
        entries.append(_Entry(place, numbers[0], numbers[1], teacher, student, same))
    return sequences, entries


def _sequence(order: int, pair: AnswerPair, answer: tuple[int, ...]) -> TrainSequence:
    tokens = np.array([*pair.prompt_ids, *answer], np.int64)
    return TrainSequence(order, pair.uid, tokens, len(pair.prompt_ids), np.empty(0, np.float32))
