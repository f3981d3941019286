"""Problems by level, complexity and options; what names them, and what a wrong file or filter says."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_mega.data.selection import Catalogue, SelectedSource, Selection, select, selection_of
from grpo_mega.data.sources import open_source
from grpo_mega.data.stream import PromptStream
from grpo_mega.data.tokenizer import scratch_tokenizer
from grpo_mega.errors import UserError
from grpo_mega.inputs import Inputs
from grpo_mega.recipe.blocks import DataBlock
from grpo_mega.recipe.curriculum_block import CurriculumBlock, CurriculumStage
from grpo_mega.recipe.schema import Recipe

LEVELS = ("basic", "expert", "basic", None, "intermediate", "basic")
COMPLEXITIES = (1, 9.5, 3, 2, None, 4)
ROWS = tuple(
    {"prompt": f"{i}=", "answer": str(i), "level": level, "complexity": complexity}
    for i, (level, complexity) in enumerate(zip(LEVELS, COMPLEXITIES, strict=True))
)


def write(path: Path, rows=ROWS) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=2)
    return path


def data_of(path: Path, **keys) -> DataBlock:
    return DataBlock(source="jsonl" if path.suffix == ".jsonl" else "parquet", train=path, **keys)


@pytest.fixture(params=["data.jsonl", "data.parquet"])
def path(request, tmp_path) -> Path:
    return write(tmp_path / request.param)


def chosen(path: Path, selection: Selection) -> list[str]:
    source = select(open_source(data_of(path), "train", 0), selection)
    return [source.problem(index).answer for index in range(len(source))]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(), "012345"),
        (Selection(levels=("basic",)), "025"),
        (Selection(levels=("expert", "intermediate")), "14"),
        (Selection(complexity=(2, 4)), "235"),  # both ends; no complexity is in no interval
        (Selection(complexity=(0, 10)), "01235"),
        (Selection(levels=("basic",), complexity=(2, 4)), "25"),
    ],
)
def test_levels_and_complexity_choose_lines(path, selection, expected):
    assert chosen(path, selection) == list(expected)


def test_a_selected_problem_keeps_its_place_in_the_file(path):
    whole = open_source(data_of(path), "train", 0)
    source = select(whole, Selection(levels=("basic",)))
    assert isinstance(source, SelectedSource)
    assert [source.whole_index(index) for index in range(3)] == [0, 2, 5]
    assert [source.where(index) for index in range(3)] == [whole.where(i) for i in (0, 2, 5)]
    assert source.where(2) == f"{path}:6"


def test_a_catalogue_read_once_serves_every_selection(path):
    source = open_source(data_of(path), "train", 0)
    catalogue = Catalogue(source)
    for selection in (Selection(levels=("basic",)), Selection(complexity=(2, 4))):
        assert len(select(source, selection, catalogue)) == len(select(source, selection)) == 3


def test_an_empty_selection_says_what_the_file_has(path):
    with pytest.raises(UserError) as error:
        chosen(path, Selection(levels=("expret",), complexity=(0, 5)))
    assert error.value.what == "no problem of this file has level expret, complexity 0-5"
    assert error.value.where == str(path)
    assert error.value.law and error.value.law.endswith(
        "levels here: basic (3), expert (1), intermediate (1), none (1); complexity 1-9.5"
    )
    assert error.value.remedy and error.value.remedy.endswith("for 'expret', did you mean 'expert'?")


def test_a_file_without_levels_is_told_to_have_some(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"prompt": "1", "answer": "1"}])
    with pytest.raises(UserError) as error:
        chosen(path, Selection(levels=("basic",)))
    assert "levels here: none (1); complexity none" in str(error.value)
    assert "give the lines a 'level'" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"level": 3}, "'level' holds 3, a int"),
        ({"complexity": "3"}, "'complexity' holds '3'"),
        ({"complexity": True}, "'complexity' holds True"),
        ({"complexity": 11}, "'complexity' holds 11"),
        ({"complexity": -0.5}, "'complexity' holds -0.5"),
        ({"complexity": float("nan")}, "'complexity' holds nan"),
    ],
)
def test_a_field_of_another_kind_names_its_line(tmp_path, fields, said):
    path = write(tmp_path / "data.jsonl", [*ROWS[:2], {**ROWS[2], **fields}])
    open_source(data_of(path), "train", 0)  # who selects nothing may write there what they like
    with pytest.raises(UserError, match=said) as error:
        chosen(path, Selection(complexity=(0, 10)))
    assert error.value.where == f"{path}:3"


def test_prompts_are_named_after_the_whole_file(path):
    data = data_of(path, shuffle=False)
    source = select(open_source(data, "train", 0), Selection(levels=("basic",)))
    stream = PromptStream(source, scratch_tokenizer(), data, 0, "train")
    prompts = stream.prompts_for_step(0, 4)
    assert [(prompt.uid, prompt.index) for prompt in prompts] == [
        ("train-0", 0),
        ("train-2", 2),
        ("train-5", 5),
        ("train-0#2", 0),
    ]
    assert [prompt.answer for prompt in prompts] == ["0", "2", "5", "0"]
    with pytest.raises(UserError, match="train-5 has no teacher response") as error:
        stream.teacher_tokens(prompts[2])
    assert error.value.where == f"{path}:6"


def test_a_long_prompt_is_replaced_within_the_selection(tmp_path):
    rows = [{**row, "prompt": "1234567=" if i == 2 else row["prompt"]} for i, row in enumerate(ROWS)]
    path = write(tmp_path / "data.jsonl", rows)
    data = data_of(path, shuffle=False, max_prompt_tokens=4, on_bad_line="skip")
    source = select(open_source(data, "train", 0), Selection(levels=("basic",)))
    prompts = PromptStream(source, scratch_tokenizer(), data, 0, "train").prompts_for_step(0, 3)
    assert [prompt.uid for prompt in prompts] == ["train-0", "train-5@2", "train-5"]


def test_a_stage_says_what_it_selects():
    stage = CurriculumStage(name="a", threshold=0.5, levels=("basic", "expert"), complexity=(0, 2.5))
    assert str(selection_of(stage)) == "level basic or expert, complexity 0-2.5"
    assert str(Selection(options={"digits": 3})) == "digits 3"
    assert str(Selection()) == "all problems"


def inputs_of(data: dict) -> Inputs:
    recipe = Recipe.model_validate({"model": {"scratch": {}}, "data": data})
    return Inputs(recipe, scratch_tokenizer())


def test_options_of_a_stage_make_its_problems():
    inputs = inputs_of({"task": "sort_digits", "options": {"digits": 5, "teacher_accuracy": 1.0}})
    easy = Selection(options={"digits": 3})
    (prompt,) = inputs.train_prompts(0, easy).prompts_for_step(0, 1)
    assert len(prompt.answer) == 3 and prompt.teacher_response == prompt.answer  # data.options count still
    assert len(inputs.train_prompts(0).prompts_for_step(0, 1)[0].answer) == 5
    assert len(inputs.eval_prompts(easy).prompt(0).answer) == 3
    assert len(inputs.eval_prompts().prompt(0).answer) == len(inputs.eval_problems.prompt(0).answer) == 5
    assert inputs.train_prompts(0, Selection(options={"digits": 3})) is inputs.train_prompts(0, easy)
    assert inputs.train_prompts(1, easy) is not inputs.train_prompts(0, easy)  # another order


def test_training_and_evaluation_select_from_their_own_files(tmp_path):
    train, held_out = write(tmp_path / "train.jsonl"), write(tmp_path / "eval.jsonl", ROWS[:2])
    inputs = inputs_of({"source": "jsonl", "train": str(train), "eval": str(held_out)})
    basic = Selection(levels=("basic",))
    prompts = inputs.train_prompts(0, basic).prompts_for_step(0, 3)
    assert sorted(prompt.uid for prompt in prompts) == ["train-0", "train-2", "train-5"]
    assert len(inputs.eval_prompts(basic)) == 1 and len(inputs.eval_prompts()) == 2
    assert inputs.train_prompts(0, basic) is inputs.train_prompts(0, basic)


def test_a_stage_without_problems_is_said_before_the_run(tmp_path):
    train, held_out = write(tmp_path / "train.jsonl"), write(tmp_path / "eval.jsonl", ROWS[:2])
    inputs = inputs_of({"source": "jsonl", "train": str(train), "eval": str(held_out)})
    stages = [
        {"name": "easy", "threshold": 0.5, "levels": ["basic"]},
        {"name": "hard", "threshold": 0.5, "levels": ["intermediate"]},  # trained on, never held out
    ]
    curriculum = CurriculumBlock.model_validate({"kind": "staged", "stages": stages})
    with pytest.raises(UserError, match="no problem of this file has level intermediate") as error:
        inputs.check_curriculum(curriculum)
    assert error.value.where == f"curriculum stage 'hard', {held_out}"
    inputs.check_curriculum(curriculum.model_copy(update={"eval_follows": False}))
    inputs.check_curriculum(CurriculumBlock())


def test_an_unknown_option_of_a_stage_is_said_before_the_run():
    curriculum = CurriculumBlock.model_validate(
        {"kind": "staged", "stages": [{"name": "easy", "threshold": 0.5, "options": {"digit": 3}}]}
    )
    with pytest.raises(UserError, match="no option 'digit'") as error:
        inputs_of({"task": "add"}).check_curriculum(curriculum)
    assert error.value.where == "curriculum stage 'easy', data.options.digit"
    assert error.value.remedy == "did you mean 'digits'?"
