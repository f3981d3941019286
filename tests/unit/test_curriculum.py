"""The curriculum: its laws in the recipe, when it goes on, and that a checkpoint goes on the same way."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from grpo_mega.curriculum import Curriculum, CurriculumState, state_from_json
from grpo_mega.errors import UserError
from grpo_mega.recipe.blocks import DataBlock
from grpo_mega.recipe.curriculum_block import CurriculumBlock, check_curriculum, check_curriculum_hears

EASY = {"name": "easy", "threshold": 0.65, "min_steps": 20, "options": {"digits": 3}}
HARD = {"name": "hard", "threshold": 0.5, "min_steps": 2, "options": {"digits": 6}}
FILE = {"source": "jsonl", "train": "train.jsonl", "eval": "eval.jsonl"}


def block(*stages, **keys) -> CurriculumBlock:
    return CurriculumBlock.model_validate({"kind": "staged", "stages": list(stages or (EASY, HARD)), **keys})


def steps(curriculum: Curriculum, count: int) -> None:
    for _ in range(count):
        curriculum.after_step()


def test_the_default_preset_goes_by_thresholds_alone():
    stages = CurriculumBlock(kind="staged", preset="default").resolved_stages
    assert [(stage.name, stage.threshold, stage.min_steps) for stage in stages] == [
        ("foundation", 0.65, 20),
        ("elementary", 0.60, 25),
        ("intermediate", 0.55, 30),
        ("advanced", 0.50, 35),
        ("expert", 0.45, 40),
        ("comprehensive", 0.40, 50),
    ]
    assert all(stage.levels is None and stage.complexity is None for stage in stages)


def test_the_verilog_preset_filters_too():
    default, verilog = (
        CurriculumBlock(kind="staged", preset=name).resolved_stages for name in ("default", "verilog")
    )
    unfiltered = [stage.model_copy(update={"levels": None, "complexity": None}) for stage in verilog]
    assert unfiltered == list(default)
    assert [(stage.levels, stage.complexity) for stage in verilog] == [
        (("basic",), (0, 3)),
        (("basic", "intermediate"), (0, 5)),
        (("intermediate",), (3, 7)),
        (("intermediate", "advanced"), (5, 9)),
        (("advanced", "expert"), (7, 10)),
        (None, None),
    ]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"kind": "staged"}, "kind staged needs stages"),
        ({"stages": [EASY]}, "set kind to staged"),
        ({"preset": "default"}, "set kind to staged"),
        ({"kind": "staged", "preset": "default", "stages": [EASY]}, "remove preset, or stages"),
        ({"kind": "staged", "stages": [EASY, EASY]}, "two stages are called 'easy'"),
        ({"kind": "staged", "stages": [EASY], "recent": 6}, "must not exceed min_evaluations"),
        ({"kind": "staged", "stages": [{**EASY, "threshold": 1.5}]}, "less than or equal to 1"),
        ({"kind": "staged", "stages": [{**EASY, "complexity": [5, 3]}]}, "5 is above 3"),
        ({"kind": "staged", "stages": [{**EASY, "complexity": [0, 11]}]}, "less than or equal to 10"),
        ({"kind": "staged", "stages": [{**EASY, "levels": []}]}, "at least 1 item"),
        ({"kind": "staged", "stages": [{**EASY, "treshold": 0.5}]}, "Extra inputs are not permitted"),
    ],
)
def test_what_a_curriculum_refuses(keys, said):
    with pytest.raises(ValidationError, match=said):
        CurriculumBlock.model_validate(keys)


@pytest.mark.parametrize(
    ("stage", "data", "said"),
    [
        (EASY, FILE, "'easy': options are arguments of a generated task"),
        ({**EASY, "options": {}, "levels": ["basic"]}, {"task": "add"}, "levels and complexity are fields"),
        ({**EASY, "options": {}, "complexity": [0, 3]}, {"task": "add"}, "levels and complexity are fields"),
        ({**EASY, "options": {}}, {**FILE, "eval": None}, "give data.eval"),
    ],
)
def test_what_a_curriculum_refuses_of_its_data(stage, data, said):
    with pytest.raises(ValueError, match=said):
        check_curriculum(block(stage), DataBlock.model_validate(data))


def test_legal_pairs_of_curriculum_and_data():
    # not to raise is all that is asked of it: each pair differs in one thing from one that is refused above
    check_curriculum(block(), DataBlock(task="add"))
    check_curriculum(CurriculumBlock(kind="staged", preset="verilog"), DataBlock.model_validate(FILE))
    check_curriculum(CurriculumBlock(), DataBlock.model_validate({**FILE, "eval": None}))


def test_a_curriculum_needs_evaluations_within_a_stage():
    check_curriculum_hears(CurriculumBlock(), 0)
    check_curriculum_hears(block(), 25)
    with pytest.raises(ValueError, match=r"set eval\.every above 0"):
        check_curriculum_hears(block(), 0)


def test_the_reasons_for_staying_are_said():
    curriculum = Curriculum(block())
    steps(curriculum, 12)
    assert curriculum.hear(0.4) == (
        "curriculum: stays in 'easy': 1 of 5 evaluations, the last pass rate 0.4 < 0.65, 12 of 20 steps"
    )
    assert curriculum.hear(0.42) == (
        "curriculum: stays in 'easy': 2 of 5 evaluations, mean of the last 2 pass rates 0.41 < 0.65, "
        "12 of 20 steps"
    )
    steps(curriculum, 8)
    assert curriculum.hear(1.0) == "curriculum: stays in 'easy': 3 of 5 evaluations"  # mean .71, 20 steps
    for nothing in (None, math.nan):
        assert curriculum.hear(nothing) == "curriculum: stays in 'easy': the evaluation gave no pass rate"
    assert curriculum.state.evaluation_count == 3


def test_it_goes_on_to_the_next_stage_and_says_to_what():
    curriculum = Curriculum(block())
    steps(curriculum, 20)
    for _ in range(4):
        curriculum.hear(0.9)
    assert curriculum.selection.options == {"digits": 3}
    assert curriculum.hear(0.4) == (  # (.9 + .4) / 2 = .65, exactly enough
        "curriculum: advances from 'easy' to 'hard' (digits 6): mean of the last 2 pass rates 0.65 >= 0.65"
    )
    assert curriculum.state == CurriculumState(stage_index=1, latest_performance=0.4, advanced=True)
    assert (curriculum.stage.name, curriculum.selection.options) == ("hard", {"digits": 6})
    # the pass rates of the easy stage say nothing about this one
    assert curriculum.hear(0.3).startswith("curriculum: stays in 'hard': 1 of 5 evaluations, the last pass")


def test_rounds_raise_the_bar_up_to_the_highest_and_then_it_is_finished():
    curriculum = Curriculum(
        block({**HARD, "threshold": 0.65, "min_steps": 0}, min_evaluations=1, recent=1, max_rounds=5)
    )
    # .65, .75, .85 (in binary .65 + .2 is a hair above .85), .95, then min(1.05, .95)
    for bar in (0.65, 0.75, 0.85, 0.95):
        assert "stays" in curriculum.hear(bar - 0.01)
        assert "advances from 'hard'" in curriculum.hear(bar)
    assert curriculum.state.round == 5 and not curriculum.state.finished
    assert curriculum.threshold == 0.95
    assert curriculum.hear(0.95) == (
        "curriculum: finished: the last pass rate 0.95 >= 0.95 in 'hard' of round 5, the last stage of the "
        "last round; stays there"
    )
    assert curriculum.state.finished
    assert curriculum.hear(1.0) == "curriculum: stays in 'hard' of round 5: all 5 rounds are through"
    assert curriculum.metrics()["curriculum/can_advance"] == 0.0


def test_metrics_are_numbers_and_none_is_made_up():
    curriculum = Curriculum(block(min_evaluations=2))
    before = {
        "curriculum/evaluation_count": 0.0,
        "curriculum/current_stage_idx": 0.0,
        "curriculum/performance_threshold": 0.65,
        "curriculum/can_advance": 0.0,
    }
    assert curriculum.metrics() == before
    curriculum.hear(None)
    assert curriculum.metrics() == before
    steps(curriculum, 20)
    curriculum.hear(0.7)
    assert curriculum.metrics() == before | {
        "curriculum/latest_performance": 0.7,
        "curriculum/evaluation_count": 1.0,
    }
    curriculum.hear(0.8)
    assert curriculum.metrics() == {
        "curriculum/latest_performance": 0.8,  # of the evaluation that ended the stage
        "curriculum/evaluation_count": 0.0,
        "curriculum/current_stage_idx": 1.0,
        "curriculum/performance_threshold": 0.5,
        "curriculum/can_advance": 1.0,
    }
    assert all(type(value) is float for value in curriculum.metrics().values())


def test_evaluation_follows_the_stage_where_asked():
    assert Curriculum(block()).eval_selection == Curriculum(block()).selection
    assert Curriculum(block(eval_follows=False)).eval_selection is None


def test_a_checkpoint_of_a_longer_curriculum_is_refused():
    with pytest.raises(UserError, match=r"stands at stage 3 of the curriculum, and the recipe has 2"):
        Curriculum(block(), CurriculumState(stage_index=2))


RATES = st.none() | st.just(math.nan) | st.integers(0, 20).map(lambda passed: passed / 20)
EVENTS = st.lists(st.just("step") | RATES, max_size=120)


@st.composite
def blocks(draw) -> CurriculumBlock:
    stages = [
        {
            "name": f"stage {number}",
            "threshold": draw(st.integers(0, 20)) / 20,
            "min_steps": draw(st.integers(0, 3)),
        }
        for number in range(draw(st.integers(1, 3)))
    ]
    min_evaluations = draw(st.integers(1, 3))
    return block(
        *stages,
        min_evaluations=min_evaluations,
        recent=draw(st.integers(1, min_evaluations)),
        max_rounds=draw(st.integers(1, 3)),
    )


def play(curriculum: Curriculum, event) -> str:
    if event != "step":
        return curriculum.hear(event)
    curriculum.after_step()
    return ""


@settings(deadline=None, max_examples=150)
@given(blocks(), EVENTS)
def test_it_advances_exactly_when_the_laws_allow_and_never_skips(given_block, events):
    """Against laws written out here over the whole history of the stage."""
    curriculum, stages = Curriculum(given_block), given_block.resolved_stages
    rates, made = [], 0
    for event in events:
        before = curriculum.state
        line = play(curriculum, event)
        after = curriculum.state
        assert "\n" not in line
        made += event == "step"
        is_rate = event != "step" and event is not None and not math.isnan(event)
        rates += [event] if is_rate else []
        stage = stages[before.stage_index]
        bar = min(stage.threshold + 0.1 * (before.round - 1), 0.95)
        recent = rates[-given_block.recent :]
        allowed = (
            is_rate
            and not before.finished
            and len(rates) >= given_block.min_evaluations
            and made >= stage.min_steps
            and sum(recent) / len(recent) >= bar - 1e-9
        )
        place = (before.round - 1) * len(stages) + before.stage_index
        is_end = place + 1 == given_block.max_rounds * len(stages)
        expected = place + (allowed and not is_end)
        assert (after.round - 1, after.stage_index) == divmod(expected, len(stages))
        assert after.finished == (before.finished or (allowed and is_end))
        assert ("advances" in line) == (allowed and not is_end) == (after.advanced and event != "step")
        if expected > place:
            rates, made = [], 0
            assert after.pass_rates == () and after.steps_in_stage == after.evaluation_count == 0


@settings(deadline=None, max_examples=100)
@given(blocks(), EVENTS, EVENTS)
def test_a_state_through_json_has_the_same_future(given_block, past, future):
    straight = Curriculum(given_block)
    for event in past:
        play(straight, event)
    resumed = Curriculum(given_block, state_from_json(json.loads(json.dumps(asdict(straight.state)))))
    assert resumed.state == straight.state
    for event in future:
        assert play(resumed, event) == play(straight, event)
        assert resumed.state == straight.state and resumed.metrics() == straight.metrics()
        assert resumed.selection == straight.selection
