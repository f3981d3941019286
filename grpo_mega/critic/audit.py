"""A frozen set of pairs. What the critic says of the pairs it trains on moves with the policy; what it says
of these moves with the critic alone."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grpo_mega.critic.discriminator import Discriminator
from grpo_mega.critic.health import Remedies
from grpo_mega.critic.pairs import AnswerPair, distribute_pairs
from grpo_mega.recipe.critic_block import CriticAudit

PREFIX = "critic_audit"


@dataclass(frozen=True, slots=True)
class AuditSet:
    """Pairs drawn once, the same on every rank, kept in a file beside the checkpoints.

    Example: AuditSet(pairs=(AnswerPair("train-3/0", (5, 7), (4, 1), (9, 1)),))
    """

    pairs: tuple[AnswerPair, ...]

    def save(self, path: Path) -> None:
        """One rank writes; the file appears whole."""
        draft = path.with_name(path.name + ".new")
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps([asdict(pair) for pair in self.pairs]))
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> AuditSet:
        return cls(tuple(_pair(fields) for fields in json.loads(path.read_text())))


def _pair(fields: dict[str, Any]) -> AnswerPair:
    ids = {name: tuple(fields[name]) for name in ("prompt_ids", "teacher_ids", "student_ids")}
    return AnswerPair(**{**fields, **ids})


def is_due(block: CriticAudit, step: int) -> bool:
    """After the first step, and then every so many."""
    return block.pairs > 0 and (step == 1 or step % block.every == 0)


def audit_metrics(
    discriminator: Discriminator,
    audit: AuditSet,
    micro_batch_tokens: int,
    eos_ids: Collection[int],
    remedies: Remedies | None = None,
) -> dict[str, float]:
    """critic_audit/*: the names of critic/* but for those of an update. A collective."""
    layout = discriminator.engine.layout
    places = range(layout.rank, len(audit.pairs), layout.world_size)
    pairs = distribute_pairs(
        places,
        [audit.pairs[place] for place in places],
        layout,
        micro_batch_tokens,
        eos_ids,
        discriminator.block.score,
    )
    return discriminator.measure(pairs, PREFIX, remedies)


def first_pairs(gathered: Sequence[tuple[int, AnswerPair]], count: int) -> AuditSet:
    """Of the pairs of one step, by place; at most one of a prompt as long as there are prompts enough."""
    ordered = [pair for _, pair in sorted(gathered, key=lambda item: item[0])]
    seen: set[tuple[int, ...]] = set()
    fresh: list[AnswerPair] = []
    rest: list[AnswerPair] = []
    for pair in ordered:
        (rest if pair.prompt_ids in seen else fresh).append(pair)
        seen.add(pair.prompt_ids)
    return AuditSet(tuple([*fresh, *rest][:count]))
