"""One all-to-all that brings every sequence to the data-parallel rank that trains on it, wherever it was
made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from grpo_mega.engine.device import device
from grpo_mega.types import TrainSequence

_WHOLE = 6  # order, prompt length, total length, number of log-probs, bytes of the uid, entries of the mask
_HEADER = _WHOLE + 2  # advantage, reward


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of every sequence of an update, on any rank, by order."""

    total: dict[int, int]
    trained: dict[int, int]  # tokens in the loss


def gather_lengths(sequences: Sequence[TrainSequence]) -> Lengths:
    """A collective over all ranks: what the batch plan and the global denominators are computed from."""
    mine = np.array([(s.order, s.length, s.trained_length) for s in sequences], np.int64).reshape(-1, 3)
    parts: list[np.ndarray] = [mine] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    rows = np.concatenate(parts).tolist()
    return Lengths({row[0]: row[1] for row in rows}, {row[0]: row[2] for row in rows})


def exchange(
    sequences: Sequence[TrainSequence], dp_rank_of_order: Mapping[int, int], dp_rank_of_rank: Sequence[int]
) -> dict[int, TrainSequence]:
    """Send each sequence to all ranks of its data-parallel rank (its tensor and pipeline ranks need the same
    tokens).

    Numbers travel as float64, which holds token ids up to 2^53 and every float32 exactly.
    """
    outgoing = [
        np.concatenate(
            [np.empty(0), *(_encode(s) for s in sequences if dp_rank_of_order[s.order] == dp_rank)]
        )
        for dp_rank in dp_rank_of_rank
    ]
    sent = torch.tensor([len(part) for part in outgoing], device=device())
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    payload = torch.from_numpy(np.concatenate(outgoing)).to(device())
    result = payload.new_empty(int(received.sum()))
    dist.all_to_all_single(result, payload, received.tolist(), sent.tolist())
    return _decode(result.cpu().numpy())


def _encode(sequence: TrainSequence) -> np.ndarray:
    logprobs = sequence.sampler_logprobs
    uid = np.frombuffer(sequence.uid.encode(), np.uint8)
    trained = np.empty(0, bool) if sequence.trained is None else sequence.trained
    header = (sequence.order, sequence.prompt_length, sequence.length, logprobs.size, uid.size, trained.size)
    return np.concatenate(
        [
            np.array((*header, sequence.advantage, sequence.reward), np.float64),
            uid,
            sequence.token_ids,
            logprobs,
            trained,
        ],
        dtype=np.float64,
    )


def _decode(buffer: np.ndarray) -> dict[int, TrainSequence]:
    sequences, at = {}, 0
    while at < len(buffer):
        header = (int(number) for number in buffer[at : at + _WHOLE])
        order, prompt_length, length, logprobs, uid_bytes, trained = header
        uid = at + _HEADER
        tokens = uid + uid_bytes
        mask = tokens + length + logprobs
        end = mask + trained
        sequences[order] = TrainSequence(
            order=order,
            uid=buffer[uid:tokens].astype(np.uint8).tobytes().decode(),
            token_ids=buffer[tokens : tokens + length].astype(np.int64),
            prompt_length=prompt_length,
            sampler_logprobs=buffer[tokens + length : mask].astype(np.float32),
            advantage=float(buffer[at + _WHOLE]),
            reward=float(buffer[at + _WHOLE + 1]),
            trained=buffer[mask:end].astype(bool) if trained else None,
        )
        at = end
    return sequences
