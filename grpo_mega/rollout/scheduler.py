"""Which groups a step trains on: those whose rewards differ, and those that were sampled ahead.

A step wants `prompts_per_step` groups. With dynamic sampling it asks for more, drops the groups that teach
nothing and asks again while some are missing; good groups that it does not need wait for the next step. With
a staleness above 0 the next steps' groups are sampled while this one trains.

All of it is decided from what every rank knows, in the order of the prompts: the same on any layout.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any, Generic, Protocol, TypeVar

from grpo_mega.errors import UserError
from grpo_mega.recipe.rollout_block import RolloutBlock
from grpo_mega.types import Group, Prompt, Sample, Score, ScoredGroup


class Work(Protocol):
    """Groups that are being sampled."""

    def cancel(self) -> None:
        """They are not wanted any more."""
        ...


WorkT = TypeVar("WorkT", bound=Work)


@dataclass(frozen=True, slots=True)
class Place:
    """A group, as every rank knows it: only one holds it.

    Example: Place(position=35, born=4): of prompt 35 of the stage, sampled for its step 4
    """

    position: int
    born: int


class Source(Protocol[WorkT]):
    """What a scheduler draws from. All ranks make the same calls in the same order; each gets its own
    share."""

    def sample(self, first: int, count: int) -> list[ScoredGroup]:
        """Groups of the stage's prompts `first` to `first + count - 1`, with their scores."""
        ...

    def begin(self, first: int, count: int) -> WorkT:
        """Begin to sample them, and return at once."""
        ...

    def finish(self, work: WorkT) -> list[ScoredGroup]:
        """Wait for what was begun."""
        ...

    def good(self, first: int, count: int, mine: Sequence[ScoredGroup]) -> list[bool]:
        """Of each of these prompts, whether its group teaches something; `mine` are this rank's groups."""
        ...

    def prompt(self, position: int) -> Prompt: ...

    @property
    def updates(self) -> int:
        """Of its weights, that the sampler has taken so far."""
        ...


@dataclass(frozen=True, slots=True)
class Wave(Generic[WorkT]):
    """Groups that are being sampled ahead."""

    first: int
    count: int
    work: WorkT


@dataclass(frozen=True, slots=True)
class Collected:
    """What a step trains on, on this rank."""

    groups: list[ScoredGroup]
    places: list[int]  # of each in the step's batch, 0 to count - 1 over all ranks
    count: int  # groups of the step, on all ranks
    sampled: list[ScoredGroup]  # all that came in for this step, also those not trained on
    metrics: dict[str, float]


def split(good: Iterable[Place], wanted: int) -> tuple[list[Place], list[Place]]:
    """The groups to train on now and those that may wait: the first prompts go first."""
    ordered = sorted(good, key=lambda place: place.position)
    return ordered[:wanted], ordered[wanted:]


@dataclass(eq=False)
class GroupScheduler(Generic[WorkT]):
    """scheduler.turn_to((stage, selection)); scheduler.collect(source, step, remaining)

    `own_state` of every rank goes into checkpoints. Groups in flight do not: their prompts are asked again.
    """

    block: RolloutBlock
    rank: int = 0
    ranks: int = 1
    _next: int = field(default=0, init=False)  # the first prompt that was not asked yet
    _good: list[Place] = field(default_factory=list[Place], init=False)  # on any rank
    _held: dict[int, ScoredGroup] = field(default_factory=dict[int, ScoredGroup], init=False)  # here
    _waves: deque[Wave[WorkT]] = field(default_factory=deque[Wave[WorkT]], init=False)
    _of: tuple[int, Hashable] | None = field(default=None, init=False)  # what prompts are drawn from
    _unread: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]], init=False)  # of a checkpoint

    @property
    def is_dynamic(self) -> bool:
        return self.block.dynamic_sampling is not None

    @property
    def is_selective(self) -> bool:
        """Whether a step may train on other groups than those sampled for it."""
        return self.is_dynamic or self.block.max_staleness > 0

    def turn_to(self, stage: int, selection: Hashable) -> None:
        """Prompts come from there now. What is left of others is of no use any more."""
        if self._of == (stage, selection):
            return
        if self._of is not None:
            self.stop()
            self._good, self._held, self._unread = [], {}, []
        if self._of is None or self._of[0] != stage:
            self._next = 0
        self._of = (stage, selection)

    def stop(self) -> None:
        """Nothing is sampled ahead any more; those prompts are the next ones."""
        if self._waves:
            self._next = self._waves[0].first
        while self._waves:
            self._waves.popleft().work.cancel()

    def collect(self, source: Source[WorkT], step: int, remaining: int) -> Collected:
        """The groups of a step, and the next ones begun where they may be; `remaining` steps follow."""
        wanted, rounds, dropped = self.block.prompts_per_step, 0, 0
        self._read_groups(source)
        expired = self._expire(step)
        if not self.is_dynamic and not self._waves:
            self._next = step * wanted
        sampled: list[ScoredGroup] = []
        while len(self._good) < wanted and (self._waves or rounds <= self._extra_rounds):
            first, count, mine = self._draw(source)
            dropped += self._sort(source, first, count, mine, step)
            sampled += mine
            rounds += 1
        kept, self._good = split(self._good, wanted)
        if not kept:
            raise self._nothing(rounds)
        groups = [(place, self._held.pop(where.position)) for place, where in self._mine(kept)]
        metrics = {
            "rollout/groups_kept": float(len(kept)),
            "rollout/groups_dropped": float(dropped),
            "rollout/groups_spare": float(len(self._good)),
            "rollout/groups_missing": float(wanted - len(kept)),
            "rollout/groups_expired": float(expired),
            "rollout/extra_rounds": float(max(0, rounds - 1)),
        }
        self._begin_ahead(source, remaining)
        return Collected(
            [group for _, group in groups], [place for place, _ in groups], len(kept), sampled, metrics
        )

    @property
    def _extra_rounds(self) -> int:
        dynamic = self.block.dynamic_sampling
        return 0 if dynamic is None else dynamic.max_extra_rounds

    def _ask_for(self, missing: int) -> int:
        dynamic = self.block.dynamic_sampling
        return missing if dynamic is None else ceil(dynamic.over_sample * missing)

    def _draw(self, source: Source[WorkT]) -> tuple[int, int, list[ScoredGroup]]:
        """What was begun first, else as many as are missing."""
        if self._waves:
            wave = self._waves.popleft()
            return wave.first, wave.count, source.finish(wave.work)
        first, count = self._next, self._ask_for(self.block.prompts_per_step - len(self._good))
        self._next += count
        return first, count, source.sample(first, count)

    def _sort(
        self, source: Source[WorkT], first: int, count: int, mine: Sequence[ScoredGroup], step: int
    ) -> int:
        """Remember the good ones; how many are none."""
        is_good = source.good(first, count, mine) if self.is_dynamic else [True] * count
        self._good += [Place(first + i, step) for i in range(count) if is_good[i]]
        self._held |= {group.position: group for group in mine if is_good[group.position - first]}
        return is_good.count(False)

    def _expire(self, step: int) -> int:
        """Spare groups that waited too long go; how many."""
        dynamic = self.block.dynamic_sampling
        if dynamic is None:
            return 0
        old = [place for place in self._good if step - place.born > dynamic.spare_steps]
        self._good = [place for place in self._good if place not in old]
        for place in old:
            self._held.pop(place.position, None)
        return len(old)

    def _mine(self, kept: Sequence[Place]) -> list[tuple[int, Place]]:
        return [(place, where) for place, where in enumerate(kept) if where.position in self._held]

    def _begin_ahead(self, source: Source[WorkT], remaining: int) -> None:
        """Spare groups count for the steps that come first."""
        wanted = self.block.prompts_per_step
        while len(self._waves) < min(self.block.max_staleness, remaining):
            spare = max(0, len(self._good) - wanted * len(self._waves))
            count = self._ask_for(max(0, wanted - spare))
            if not count:
                break
            self._waves.append(Wave(self._next, count, source.begin(self._next, count)))
            self._next += count

    def _nothing(self, rounds: int) -> UserError:
        return UserError(
            f"in none of the groups of {rounds} rounds do the rewards differ: there is nothing to learn from",
            where="rollout.dynamic_sampling",
            law="an advantage is relative to the other samples of its group",
            remedy="take problems that are neither too easy nor too hard, a reward with more steps, a higher "
            "rollout.temperature or rollout.group_size, or more rollout.dynamic_sampling.max_extra_rounds",
        )

    # ---- checkpoints ----

    def own_state(self, updates: int) -> dict[str, Any]:
        """What this rank knows. `updates` of its weights has the sampler taken: a resumed one counts anew."""
        assert self._of is not None
        held = [group_to_json(self._held[place.position], updates) for _, place in self._mine(self._good)]
        return {
            "stage": self._of[0],
            "next": self._waves[0].first if self._waves else self._next,
            "good": [[place.position, place.born] for place in self._good],
            "held": held,
        }

    def restore(self, states: Sequence[Mapping[str, Any]], stage: int, selection: Hashable) -> None:
        """What `own_state` of every rank said. Their prompts can be read at the next step."""
        if states[0]["stage"] != stage:
            return
        self._of, self._next = (stage, selection), states[0]["next"]
        self._good = [Place(position, born) for position, born in states[0]["good"]]
        shares = [state["held"] for state in states]
        if len(shares) != self.ranks:  # other ranks than those: each takes its turn
            everywhere = sorted((group for share in shares for group in share), key=lambda g: g["position"])
            shares = [everywhere[rank :: self.ranks] for rank in range(self.ranks)]
        self._unread = shares[self.rank]

    def _read_groups(self, source: Source[WorkT]) -> None:
        for value in self._unread:
            position = value["position"]
            self._held[position] = group_from_json(value, source.prompt(position), source.updates)
        self._unread = []


def group_to_json(scored: ScoredGroup, updates: int) -> dict[str, Any]:
    """Without its prompt, which follows from the position; versions as updates before the newest one."""
    samples = [
        {
            "ids": sample.response_ids,
            "logprobs": sample.sampler_logprobs,
            "text": sample.text,
            "reason": sample.finish_reason,
            "chosen": sample.chosen,
            "behind": [updates - version for version in sample.versions],
        }
        for sample in scored.group.samples
    ]
    return {"position": scored.position, "samples": samples, "scores": [asdict(s) for s in scored.scores]}


def group_from_json(value: Mapping[str, Any], prompt: Prompt, updates: int) -> ScoredGroup:
    samples = [
        Sample(
            uid=f"{prompt.uid}/{index}",
            rollout_index=index,
            response_ids=tuple(sample["ids"]),
            sampler_logprobs=tuple(sample["logprobs"]),
            text=sample["text"],
            finish_reason=sample["reason"],
            chosen=None if sample["chosen"] is None else tuple(sample["chosen"]),
            versions=tuple(updates - behind for behind in sample["behind"]),
        )
        for index, sample in enumerate(value["samples"])
    ]
    scores = tuple(Score(**score) for score in value["scores"])
    return ScoredGroup(value["position"], Group(prompt, tuple(samples)), scores)
