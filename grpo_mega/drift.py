"""How far the policy is from what its samples were drawn under: what the guard watches, and who is to blame.

# T packed tokens of one micro-batch, B its sequences
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from grpo_mega.engine.policy import PolicyEngine
from grpo_mega.monitor import histogram
from grpo_mega.monitor.metrics import Metric, merge
from grpo_mega.types import PackedBatch

Level = Literal["token", "sequence"]
SUSPECTS = 8
DIAGNOSIS_FILE = "diagnosis.json"


@dataclass(frozen=True, slots=True)
class Suspect:
    """A token whose log-prob is far from what it was when it was sampled.

    Example: Suspect(uid="train-17/3", position=4, token_id=9, trainer=-31.2, sampler=-.1)
    """

    uid: str
    position: int  # in the response
    token_id: int
    trainer: float  # its log-prob under the policy now
    sampler: float

    @property
    def distance(self) -> float:
        difference = abs(self.trainer - self.sampler)
        return difference if difference == difference else float("inf")


def drift_metrics(logprobs_T: torch.Tensor, batch: PackedBatch, level: Level) -> dict[str, Metric]:
    """Before the update, of a micro-batch: against the behaviour policy, and the reference where there is
    one."""
    metrics = {"guard/drift_behaviour": _drift(logprobs_T, batch.sampler_logprobs_T, batch, level)}
    if batch.reference_logprobs_T is not None:
        metrics["guard/drift_reference"] = _drift(logprobs_T, batch.reference_logprobs_T, batch, level)
    return metrics


def probe(
    engine: PolicyEngine,
    batches: Sequence[PackedBatch],
    temperature: float,
    tokens: int,
    level: Level,
    histograms: dict[str, list[float]],
) -> tuple[dict[str, float], list[Suspect]]:
    """After the update, on about `tokens` tokens of each rank: the drift, and this rank's worst tokens."""
    if not tokens:
        return {}, []
    chosen = batches[: max(1, tokens // batches[0].tokens_T.shape[0])]
    logprobs = engine.logprobs(chosen, temperature)
    pairs = list(zip(logprobs, chosen, strict=False))  # no log-probs before the last pipeline stage
    merged = merge(
        {"guard/drift_probe": _drift(values_T, batch.sampler_logprobs_T, batch, level)}
        for values_T, batch in pairs
    )
    return engine.reduce_metrics(merged, histograms), _worst(s for pair in pairs for s in _suspects(*pair))


def not_finite(engine: PolicyEngine, batches: Sequence[PackedBatch], temperature: float) -> list[Suspect]:
    """This rank's tokens to look at after a skipped update, which left the weights as they were."""
    logprobs = engine.logprobs(batches, temperature)
    return _worst(s for pair in zip(logprobs, batches, strict=False) for s in _suspects(*pair))


def worst_of_all_ranks(mine: Sequence[Suspect]) -> list[Suspect]:
    """A collective."""
    gathered: list[list[Suspect]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(mine))
    unique = {(s.uid, s.position): s for part in gathered for s in part}
    return _worst(unique.values())


def describe(suspects: Sequence[Suspect], text_of: Callable[[int], str]) -> str:
    """One line for each token."""
    return "\n".join(
        f"sample {s.uid}, response token {s.position} ({text_of(s.token_id)!r}, id {s.token_id}): "
        f"log-prob {s.sampler:.3f} when sampled, {s.trainer:.3f} now"
        for s in suspects
    )


def write_diagnosis(run_dir: Path, step: int, why: str, suspects: Sequence[Suspect], advice: str) -> Path:
    path = run_dir / DIAGNOSIS_FILE
    tokens = [{key: _valid(value) for key, value in asdict(s).items()} for s in suspects]
    path.write_text(
        json.dumps({"step": step, "why": why, "tokens": tokens, "advice": advice}, indent=1) + "\n"
    )
    return path


def keep_for_replay(folder: Path, step: int, rank: int, batches: Sequence[PackedBatch]) -> Path:
    """The micro-batches of an update that was skipped, as dictionaries of tensors: torch.load reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:06d}_rank_{rank}.pt"
    torch.save([{name: getattr(batch, name) for name in PackedBatch.__slots__} for batch in batches], path)
    return path


def _valid(value: object) -> object:
    return str(value) if isinstance(value, float) and value - value != 0 else value


def _drift(logprobs_T: torch.Tensor, other_T: torch.Tensor, batch: PackedBatch, level: Level) -> Metric:
    difference_T = (logprobs_T.detach() - other_T).where(batch.response_mask_T, 0.0)
    if level == "token":
        return _quantile(difference_T, batch.response_mask_T)
    sequence_T = torch.searchsorted(
        batch.cu_seqlens.long(), torch.arange(len(difference_T), device=difference_T.device), right=True
    )
    empty_B = difference_T.new_zeros(len(batch.cu_seqlens))
    sums_B = empty_B.index_add(0, sequence_T - 1, difference_T)
    answered_B = empty_B.index_add(0, sequence_T - 1, batch.response_mask_T.float()) > 0
    return _quantile(sums_B, answered_B)


def _quantile(values: torch.Tensor, mask: torch.Tensor) -> Metric:
    known = torch.nan_to_num(values, nan=torch.inf)  # the histogram's last bin
    return Metric(histogram.counts(known, mask), mask.sum(), "abs_p999")


def _suspects(logprobs_T: torch.Tensor, batch: PackedBatch) -> list[Suspect]:
    distance_T = (logprobs_T - batch.sampler_logprobs_T).abs().nan_to_num(nan=torch.inf)
    distance_T = distance_T.where(batch.response_mask_T, -1.0)
    top = distance_T.topk(min(SUSPECTS, len(distance_T)))
    return [
        _suspect(place, float(logprobs_T[place]), batch)
        for place, distance in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        if distance >= 0
    ]


def _suspect(place: int, logprob: float, batch: PackedBatch) -> Suspect:
    sequence = int((batch.cu_seqlens <= place).sum()) - 1
    start = int(batch.cu_seqlens[sequence])
    return Suspect(
        uid=batch.uids[sequence],
        position=int(batch.response_mask_T[start:place].sum()),
        token_id=int(batch.tokens_T[place]),
        trainer=logprob,
        sampler=float(batch.sampler_logprobs_T[place]),
    )


def _worst(suspects: Iterable[Suspect]) -> list[Suspect]:
    return sorted(suspects, key=lambda s: (-s.distance, s.uid, s.position))[:SUSPECTS]
