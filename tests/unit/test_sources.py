"""Sources: what a file may hold, what happens to a line that cannot be used, and generated tasks by name."""

from __future__ import annotations

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_mega.data.sources import Split, open_source
from grpo_mega.errors import UserError
from grpo_mega.recipe.blocks import DataBlock

GOOD = {"prompt": "1+1=", "answer": "2"}


def jsonl(tmp_path, *lines, **keys):
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return open_source(DataBlock(source="jsonl", train=path, **keys), "train", seed=0)


def parquet(tmp_path, rows, rows_per_group=2, **keys):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=rows_per_group)
    return open_source(DataBlock(source="parquet", train=path, **keys), "train", seed=0)


def test_jsonl_lines_become_problems_in_any_order(tmp_path):
    rows = [{"prompt": f"é{i}", "answer": i, "teacher_response": f"t{i}", "level": i} for i in range(5)]
    source = jsonl(tmp_path, rows[0], b"", *rows[1:])
    assert len(source) == 5
    for index in (4, 0, 3, 1, 2):
        problem = source.problem(index)
        assert (problem.text, problem.answer, problem.teacher_response) == (
            f"é{index}",
            str(index),
            f"t{index}",
        )
        assert problem.meta == {"level": index}
    assert source.where(1).endswith("data.jsonl:3")  # the blank line 2 counts, as in an editor


def test_keys_can_be_renamed_and_answers_left_out(tmp_path):
    source = jsonl(
        tmp_path,
        {"question": "q"},
        {"question": "r", "solution": 2.5},
        prompt_key="question",
        answer_key="solution",
    )
    assert [source.problem(index).answer for index in range(2)] == ["", "2.5"]
    assert source.problem(0).teacher_response is None


def test_conversations_keep_their_messages_and_their_last_answer_teaches(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    source = jsonl(tmp_path, {"messages": turns, "answer": "x"}, {"prompt": turns[:1]}, template="chat")
    assert source.problem(0).meta["messages"] == (turns[0],)
    assert source.problem(0).teacher_response == "hello"
    assert source.problem(1).meta["messages"] == (turns[0],) and source.problem(1).teacher_response is None


def test_a_prompt_comes_before_messages(tmp_path):
    turns = [{"role": "user", "content": "other"}]
    problem = jsonl(tmp_path, {"prompt": "hi", "messages": turns}, template="chat").problem(0)
    assert problem.text == "hi" and "messages" not in problem.meta


BAD_LINES = {
    "broken": (b'{"prompt": "x"', "not JSON"),
    "list": ([1], "not an object"),
    "missing": ({"promt": "x"}, "no 'prompt'"),
    "null": ({"prompt": None}, "no 'prompt'"),
    "empty": ({"prompt": " \n"}, "empty"),
    "number": ({"prompt": 3}, "holds a int"),
    "no_messages": ({"prompt": []}, "asks nothing"),
    "odd_message": ({"prompt": [{"role": "user"}]}, "message 1"),
    "only_system": ({"prompt": [{"role": "system", "content": "x"}]}, "asks nothing"),
    "answer": ({"prompt": "x", "answer": ["a"]}, "'answer' holds a list"),
    "teacher": ({"prompt": "x", "teacher_response": 5}, "'teacher_response' holds a int"),
    "latin1": (b'{"prompt": "\xe9"}', "not UTF-8"),
    "half_a_pair": (b'{"prompt": "\\ud83d"}', "not valid Unicode"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_stops_the_run_with_its_place(tmp_path, name):
    line, reason = BAD_LINES[name]
    with pytest.raises(UserError) as caught:
        jsonl(tmp_path, GOOD, line, template="chat")
    assert reason in caught.value.what
    assert str(caught.value.where).endswith("data.jsonl:2")
    assert "data.on_bad_line" in str(caught.value.remedy)


def test_bad_lines_can_be_skipped_each_reported_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        source = jsonl(
            tmp_path, b"{", GOOD, *(line for line, _ in BAD_LINES.values()), GOOD, on_bad_line="skip"
        )
    assert len(source) == 2
    assert [source.where(index).rsplit(":", 1)[1] for index in range(2)] == ["2", str(3 + len(BAD_LINES))]
    skipped = [record.getMessage() for record in caplog.records if "skipped:" in record.getMessage()]
    assert len(skipped) == 1 + len(BAD_LINES)
    assert f"{1 + len(BAD_LINES)} lines skipped, 2 used" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("lines", [(), (b"",), (b"{",)])
def test_a_file_without_a_good_line_is_refused(tmp_path, lines):
    with pytest.raises(UserError, match=r"no line that can be used|is empty"):
        jsonl(tmp_path, *lines, on_bad_line="skip")


def test_a_raw_prompt_cannot_be_a_conversation(tmp_path):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    with pytest.raises(UserError, match=r"data\.template"):
        jsonl(tmp_path, {"prompt": turns})
    assert jsonl(tmp_path, {"prompt": turns[1:]}).problem(0).text == "u"


def test_a_file_that_changes_under_the_run_is_noticed(tmp_path):
    source = jsonl(tmp_path, GOOD, GOOD)
    (tmp_path / "data.jsonl").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="no longer can"):
        source.problem(1)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    assert jsonl(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode()).problem(0).answer == "2"


def test_parquet_rows_become_problems_in_any_order(tmp_path):
    rows = [{"prompt": f"p{i}", "answer": i, "level": i % 2} for i in range(7)]
    rows[3] = {"prompt": "", "answer": 3, "level": 1}
    source = parquet(tmp_path, rows, on_bad_line="skip")
    expected = [0, 1, 2, 4, 5, 6]
    assert len(source) == 6
    for index in (5, 0, 3, 1, 4, 2):
        problem = source.problem(index)
        assert (problem.text, problem.answer) == (f"p{expected[index]}", str(expected[index]))
        assert problem.meta == {"level": expected[index] % 2}
    assert source.where(3).endswith("data.parquet:5")


def test_parquet_messages_and_mistakes(tmp_path):
    turns = [{"role": "user", "content": "hi"}]
    assert parquet(tmp_path, [{"prompt": turns}], template="chat").problem(0).meta["messages"] == tuple(turns)
    with pytest.raises(UserError, match="did you mean 'prompts'"):
        parquet(tmp_path, [{"prompts": "x"}])
    with pytest.raises(UserError) as caught:
        parquet(tmp_path, [{"prompt": "x"}, {"prompt": ""}])
    assert str(caught.value.where).endswith("data.parquet:2")
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        open_source(DataBlock(source="parquet", train=tmp_path / "text.parquet"), "train", seed=0)


def test_files_and_numbers_are_not_mixed_up(tmp_path):
    cases: tuple[tuple[DataBlock, Split, str], ...] = (
        (DataBlock(source="jsonl", train=tmp_path / "none.jsonl"), "train", "there is no file"),
        (DataBlock(source="jsonl", train=tmp_path), "train", "is a directory"),
        (DataBlock(source="jsonl", train=tmp_path), "eval", "data.eval is None"),
        (DataBlock(task="add", train=tmp_path), "train", "generates its problems"),
    )
    for block, split, what in cases:
        with pytest.raises(UserError, match=what) as caught:
            open_source(block, split, seed=0)
        assert caught.value.where == f"data.{split}" and caught.value.remedy


def test_generated_tasks_have_the_sizes_asked_for():
    block = DataBlock(task="add")
    assert [len(open_source(block, split, seed=0)) for split in ("train", "eval")] == [2**20, 512]
    block = DataBlock(task="add", train=10, eval=5)
    assert [len(open_source(block, split, seed=0)) for split in ("train", "eval")] == [10, 5]


def test_reasoning_gym_problems_are_repeatable_and_disjoint():
    # One-digit sums of two terms: 200 texts, so 100 draws a side collide unless the text decides the side.
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    block = DataBlock(source="reasoning_gym", task="chain_sum", options=options, train=100, eval=100)
    problems = {
        split: [source.problem(index) for index in range(100)]
        for split in ("train", "eval")
        for source in [open_source(block, split, seed=0)]
    }
    assert {problem.text for problem in problems["train"]}.isdisjoint(
        problem.text for problem in problems["eval"]
    )
    again = open_source(block, "train", seed=0)
    assert [again.problem(index) for index in reversed(range(100))] == problems["train"][::-1]
    assert [open_source(block, "train", seed=1).problem(index) for index in range(100)] != problems["train"]
    assert problems["train"][0].teacher_response == problems["train"][0].answer


def test_reasoning_gym_names_are_checked():
    for task, options, what in (
        ("chain_sums", {}, "did you mean 'chain_sum'"),
        ("chain_sum", {"min_term": 2}, "did you mean 'min_terms'"),
        ("chain_sum", {"seed": 2}, "use the recipe's seed"),
        ("chain_sum", {"min_terms": 9, "max_terms": 2}, "max_terms must be >= min_terms"),
    ):
        with pytest.raises(UserError, match=what):
            open_source(DataBlock(source="reasoning_gym", task=task, options=options), "train", seed=0)
