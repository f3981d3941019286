"""logs/critic_scoring_details/scoring_details_<time>.log: what was scored, how, and who won. For reading.

The texts lie on the ranks that made them: all take part, rank 0 writes.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from grpo_mega.critic.pairs import AnswerPair, PairBatch
from grpo_mega.critic.ranking import PairScores
from grpo_mega.critic.scores import counted

FOLDER = Path("logs") / "critic_scoring_details"
SHOWN_IDS = 4
"""Token ids up to the scored position."""
GAP_WATCH, GAP_ALARM = 0.5, 1.0
"""Of identical answers: up to the first all is well."""


@dataclass(frozen=True, slots=True)
class _Line:
    place: int
    pair: AnswerPair
    teacher: float
    student: float


def write_details(
    run_dir: Path,
    places: Sequence[int],
    made: Sequence[AnswerPair],
    pairs: PairBatch,
    scores: PairScores,
    metrics: Mapping[str, float],
    eos_ids: Collection[int],
    *,
    step: int,
    count: int,
) -> Path | None:
    """The step's first `count` pairs and the summary of all. Each rank brings the pairs it made (`places`,
    `made`). A collective; the path on rank 0."""
    shown = set(pairs.places_P[:count])
    numbers = {place: index for index, place in enumerate(pairs.places_P)}
    teacher_P, student_P = scores.teacher_P.tolist(), scores.student_P.tolist()
    mine = [
        _Line(place, pair, teacher_P[numbers[place]], student_P[numbers[place]])
        for place, pair in zip(places, made, strict=True)
        if place in shown
    ]
    is_lead = dist.get_rank() == 0
    gathered: list[list[_Line]] = [[] for _ in range(dist.get_world_size())]
    dist.gather_object(mine, gathered if is_lead else None)
    if not is_lead:
        return None
    lines = sorted((line for part in gathered for line in part), key=lambda line: line.place)
    text = [f"step {step}: {len(lines)} of {len(pairs.places_P)} pairs", ""]
    text += [_block(line, eos_ids) for line in lines]
    text.append(_summary(metrics))
    return _write(run_dir / FOLDER, "\n".join(text))


def _block(line: _Line, eos_ids: Collection[int]) -> str:
    pair, difference = line.pair, line.teacher - line.student
    verdict = "teacher wins" if difference > 0 else "student wins" if difference < 0 else "tie"
    rows = [
        f"[{line.place}] {pair.uid}: {verdict}, difference {difference:+.4f}",
        f"  prompt   {pair.prompt!r}",
    ]
    for side, score, text, answer in (
        ("teacher", line.teacher, pair.teacher, pair.teacher_ids),
        ("student", line.student, pair.student, pair.student_ids),
    ):
        places = np.flatnonzero(counted(np.array(answer), eos_ids))
        last = int(places[-1])
        near = list(answer[max(0, last + 1 - SHOWN_IDS) : last + 1])
        rows.append(
            f"  {side}  score {score:+.4f}, length {len(places)}, scored at {last}, ids up to it {near}"
        )
        rows.append(f"           {text!r}")
    return "\n".join([*rows, ""])


def _summary(metrics: Mapping[str, float]) -> str:
    def of(name: str) -> str:
        value = metrics.get(f"critic/{name}")
        return "-" if value is None else f"{value:.4f}"

    rows = [
        f"  {side}s  mean {of(f'{side}_score_mean')}, std {of(f'{side}_score_std')}, "
        f"from {of(f'{side}_score_min')} to {of(f'{side}_score_max')}"
        for side in ("teacher", "student")
    ]
    gap = metrics.get("critic/identical_gap")
    return "\n".join(
        [
            "all pairs of the step",
            *rows,
            f"  T > S    {of('d_acc')} of all pairs",
            f"  identical answers: {metrics.get('critic/identical_pairs', 0.0):.0f}, {gap_verdict(gap)}",
            "",
        ]
    )


def gap_verdict(gap: float | None) -> str:
    """Example: .7 -> "gap 0.7000: watch" """
    if gap is None:
        return "no gap to measure"
    word = "ok" if gap <= GAP_WATCH else "watch" if gap <= GAP_ALARM else "ALARM"
    return f"gap {gap:.4f}: {word}"


def _write(folder: Path, text: str) -> Path:
    """A new file, also within the same second."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d_%H%M%S")
    path, count = folder / f"scoring_details_{stamp}.log", 1
    while path.exists():
        count += 1
        path = folder / f"scoring_details_{stamp}_{count}.log"
    path.write_text(text, encoding="utf-8")
    return path
