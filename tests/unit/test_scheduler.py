"""Which groups a step trains on: a pure decision, the same on any number of ranks, that loses nothing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from math import nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_mega.errors import UserError
from grpo_mega.recipe.rollout_block import RolloutBlock
from grpo_mega.rollout.scheduler import (
    Collected,
    GroupScheduler,
    Place,
    group_from_json,
    group_to_json,
    split,
)
from grpo_mega.types import Group, Prompt, Sample, Score, ScoredGroup

PLACES = st.lists(st.builds(Place, st.integers(0, 40), st.integers(0, 3)), unique_by=lambda p: p.position)


@given(PLACES, st.integers(1, 20), st.randoms())
def test_the_first_prompts_are_kept_in_whatever_order_they_come(places, wanted, random):
    kept, spare = split(places, wanted)
    assert sorted(kept + spare, key=lambda p: p.position) == kept + spare
    assert Counter(kept + spare) == Counter(places)
    assert len(kept) == min(wanted, len(places))
    shuffled = list(places)
    random.shuffle(shuffled)
    assert split(shuffled, wanted) == (kept, spare)


@dataclass
class Ahead:
    first: int
    count: int
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Prompts:
    """Whether each prompt's group teaches something is known beforehand; a rank gets every so many-th."""

    teaching: list[bool]
    rank: int = 0
    ranks: int = 1
    asked: list[int] = field(default_factory=list)
    begun: list[Ahead] = field(default_factory=list)
    updates: int = 0

    def sample(self, first: int, count: int) -> list[ScoredGroup]:
        self.asked += range(first, first + count)
        mine = range(first, first + count)[self.rank :: self.ranks]
        return [scored(self.prompt(position), self.updates) for position in mine]

    def begin(self, first: int, count: int) -> Ahead:
        self.begun.append(Ahead(first, count))
        return self.begun[-1]

    def finish(self, work: Ahead) -> list[ScoredGroup]:
        return self.sample(work.first, work.count)

    def good(self, first: int, count: int, mine: list[ScoredGroup]) -> list[bool]:
        return [self.teaching[position % len(self.teaching)] for position in range(first, first + count)]

    def prompt(self, position: int) -> Prompt:
        return Prompt(f"train-{position}", position, "", (1, 2), "")


def scored(prompt: Prompt, version: int) -> ScoredGroup:
    samples = tuple(
        Sample(f"{prompt.uid}/{i}", i, (3, 4), (-0.1, -1 / 3), "x", "stop", versions=(version, version))
        for i in range(2)
    )
    scores = (Score(1.0, {"exact": 1.0}, 1.0), Score(0.25, {"exact": 0.25}, nan))
    return ScoredGroup(prompt.index, Group(prompt, samples), scores)


def block_of(wanted: int, dynamic: dict | None = None, staleness: int = 0) -> RolloutBlock:
    engine = "sglang" if staleness else "local"
    return RolloutBlock.model_validate(
        {
            "engine": engine,
            "prompts_per_step": wanted,
            "dynamic_sampling": dynamic,
            "max_staleness": staleness,
        }
    )


def positions(collected: Collected) -> list[int]:
    return [group.position for group in collected.groups]


def run(block: RolloutBlock, sources: list[Prompts], steps: int) -> list[list[int]]:
    """The positions trained on in each step, over all ranks, in the order of their places."""
    schedulers = [GroupScheduler(block, rank, len(sources)) for rank in range(len(sources))]
    trained, books = [], Counter()
    for scheduler in schedulers:
        scheduler.turn_to(0, None)
    for step in range(steps):
        pairs = zip(schedulers, sources, strict=True)
        made = [scheduler.collect(source, step, steps - step - 1) for scheduler, source in pairs]
        books.update(made[0].metrics)
        by_place = {
            place: position
            for one in made
            for place, position in zip(one.places, positions(one), strict=True)
        }
        assert sorted(by_place) == list(range(made[0].count))
        assert all(one.count == made[0].count and one.metrics == made[0].metrics for one in made)
        trained.append([by_place[place] for place in sorted(by_place)])
    gone = sum(books[f"rollout/groups_{name}"] for name in ("kept", "dropped", "expired"))
    assert len(sources[0].asked) == gone + made[0].metrics["rollout/groups_spare"], "a group was lost"
    return trained


TEACHING = st.lists(st.booleans(), min_size=4, max_size=30).filter(lambda flags: sum(flags) * 4 >= len(flags))
DYNAMIC = st.fixed_dictionaries(
    {
        "over_sample": st.sampled_from([1.0, 1.5, 3.0]),
        "max_extra_rounds": st.just(40),
        "spare_steps": st.integers(0, 2),
    }
)


@given(TEACHING, DYNAMIC, st.integers(1, 5), st.integers(0, 3), st.integers(2, 4))
def test_the_same_groups_on_any_number_of_ranks(teaching, dynamic, wanted, staleness, ranks):
    block = block_of(wanted, dynamic, staleness)
    alone = Prompts(teaching)
    trained = run(block, [alone], 5)
    assert run(block, [Prompts(teaching, rank, ranks) for rank in range(ranks)], 5) == trained
    every = [position for step in trained for position in step]
    assert all(teaching[position % len(teaching)] for position in every)
    assert len(set(every)) == len(every), "a group was trained on twice"
    assert every == sorted(every), "prompts come in their order"
    assert all(len(step) == wanted for step in trained)
    assert alone.asked == list(range(len(alone.asked))), "a prompt was left out or asked twice"


@given(st.integers(1, 5), st.integers(0, 3))
def test_without_dynamic_sampling_every_step_has_its_own_prompts(wanted, staleness):
    source = Prompts([False])  # what the groups teach is nobody's concern
    trained = run(block_of(wanted, staleness=staleness), [source], 4)
    assert trained == [list(range(step * wanted, (step + 1) * wanted)) for step in range(4)]
    assert len(source.begun) == (3 if staleness else 0), "what no step of the stage needs is not begun"


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_so_many_steps_are_sampled_ahead(staleness):
    source, scheduler = Prompts([True]), GroupScheduler(block_of(2, staleness=staleness))
    scheduler.turn_to(0, None)
    scheduler.collect(source, 0, 9)
    assert [work.first for work in source.begun] == [2 * (ahead + 1) for ahead in range(staleness)]
    scheduler.collect(source, 1, 8)
    assert len(source.begun) == staleness + 1
    scheduler.stop()
    assert [work.cancelled for work in source.begun] == [False] + [True] * staleness


def test_spare_groups_are_next_and_do_not_wait_for_ever():
    """Of 1.5 x 4 = 6 prompts all teach: 2 are spare, so the next step asks 3 for the 2 that are missing."""
    source, scheduler = Prompts([True]), GroupScheduler(block_of(4, {"spare_steps": 1}))
    scheduler.turn_to(0, None)
    first = scheduler.collect(source, 0, 9)
    assert (positions(first), first.metrics["rollout/groups_spare"]) == ([0, 1, 2, 3], 2)
    second = scheduler.collect(source, 1, 8)
    assert positions(second) == [4, 5, 6, 7] and source.asked == list(range(9))
    assert [g.position for g in second.sampled] == [6, 7, 8]
    late = scheduler.collect(source, 3, 6)  # the spare group 8 was born in step 1
    assert positions(late) == [9, 10, 11, 12] and late.metrics["rollout/groups_expired"] == 1


def test_a_bound_that_is_hit_leaves_a_smaller_step():
    source = Prompts([True, False, False, False])
    scheduler = GroupScheduler(block_of(4, {"over_sample": 1.0, "max_extra_rounds": 1}))
    scheduler.turn_to(0, None)
    made = scheduler.collect(source, 0, 9)  # 0 to 3, then 3 more for those missing: 4 to 6
    assert positions(made) == [0, 4] and made.count == 2
    assert made.metrics == {
        "rollout/groups_kept": 2,
        "rollout/groups_dropped": 5,
        "rollout/groups_spare": 0,
        "rollout/groups_missing": 2,
        "rollout/groups_expired": 0,
        "rollout/extra_rounds": 1,
    }


def test_nothing_at_all_is_said():
    scheduler = GroupScheduler(block_of(2, {}))
    scheduler.turn_to(0, None)
    with pytest.raises(UserError, match="none of the groups of 4 rounds"):
        scheduler.collect(Prompts([False]), 0, 9)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_restored_scheduler_goes_on_as_if_nothing_had_been(ranks):
    """Also on other ranks than those that saved, and with what was in flight asked again."""
    teaching, block = [True, False, True, True], block_of(3, {"spare_steps": 2}, staleness=1)
    sources = [Prompts(teaching, rank, 2) for rank in range(2)]
    old = [GroupScheduler(block, rank, 2) for rank in range(2)]
    for scheduler, source in zip(old, sources, strict=True):
        scheduler.turn_to(1, "a")
        scheduler.collect(source, 0, 9)
        source.updates = 7
    states = json.loads(json.dumps([scheduler.own_state(7) for scheduler in old]))
    assert sum(len(state["held"]) for state in states) == 1
    expected = sorted(
        position
        for scheduler, source in zip(old, sources, strict=True)
        for position in positions(scheduler.collect(source, 1, 8))
    )
    found, spare = [], []
    for rank in range(ranks):
        scheduler = GroupScheduler(block, rank, ranks)
        scheduler.restore(states, 1, "a")
        scheduler.turn_to(1, "a")
        made = scheduler.collect(Prompts(teaching, rank, ranks, updates=1), 1, 8)
        found += positions(made)
        spare += [g for g in made.groups if g not in made.sampled]
    assert sorted(found) == expected
    (waited,) = spare
    assert waited.group.samples[0].versions == (-6, -6)  # seven updates before, as it was


def test_groups_of_other_prompts_are_forgotten():
    source, scheduler = Prompts([True]), GroupScheduler(block_of(4, {}))
    scheduler.turn_to(0, "easy")
    scheduler.collect(source, 0, 9)
    scheduler.turn_to(0, "hard")  # goes on in the stream, without the spare groups 4 and 5
    assert positions(scheduler.collect(source, 1, 8)) == [6, 7, 8, 9]
    scheduler.turn_to(1, "hard")
    assert positions(scheduler.collect(source, 0, 8)) == [0, 1, 2, 3]
    state = scheduler.own_state(0)
    fresh = GroupScheduler(block_of(4, {}))
    fresh.restore([state], 2, "hard")  # saved in another stage
    fresh.turn_to(2, "hard")
    assert positions(fresh.collect(source, 0, 8)) == [0, 1, 2, 3]


def test_a_group_survives_json_to_the_last_bit():
    whole = scored(Prompt("train-3", 3, "", (1,), ""), 5)
    text = json.dumps(group_to_json(whole, 5))
    found = group_from_json(json.loads(text), whole.group.prompt, 5)
    assert found.group == whole.group
    assert repr(found.scores) == repr(whole.scores)  # nan is not itself
