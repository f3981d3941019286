"""What tells two sides apart: by hand, and the tool on files."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_mega.data_quality import Answers, Limits, auc, examine, is_truncated
from tests.commands import run_command

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "analyze_data_quality.py"


def pairs(*texts: tuple[str, str | None]) -> list[Answers]:
    return [Answers(f"f:{i}", f"prompt {i}", teacher, student) for i, (teacher, student) in enumerate(texts)]


def numbers(*texts: tuple[str, str | None], **options):
    return examine(pairs(*texts), Limits(), len, **options).numbers


def test_auc_by_hand() -> None:
    assert auc([3, 5], [1, 3]) == 0.875  # 3 > 1, 3 = 3, 5 > 1, 5 > 3: (1 + .5 + 1 + 1) / 4
    assert auc([1, 2], [3, 4]) == 0.0
    assert auc([2, 2], [2, 2, 2]) == 0.5


@given(*[st.lists(st.integers(0, 9), min_size=1, max_size=12)] * 2)
def test_auc_counts_every_pair(high: list[int], low: list[int]) -> None:
    counted = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(high, low)]
    assert auc(high, low) == pytest.approx(sum(counted) / len(counted))


def test_lengths_equal_answers_and_repetition_by_hand() -> None:
    found = numbers(("abcd", "ab"), ("same", "same "), ("same", "other"), ("x", None))
    assert (found["pairs"], found["with_student"]) == (4, 3)
    assert found["teacher_length_mean"] == pytest.approx((4 + 4 + 4 + 1) / 4)
    assert found["identical"] == pytest.approx(1 / 3)  # white space aside
    # teachers of pairs 4 4 4, students 2 5 5: 3 of 9 comparisons
    assert found["length_auc"] == pytest.approx(3 / 9)
    assert found["commonest_teacher_answer"] == 0.5
    same = examine([*pairs(("a", "b")), *pairs(("a", "b"))], Limits(), len).numbers
    assert same["repeated_lines"] == 0.5 and same["repeated_prompts"] == 0.5


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ('{"a": 1', True),
        ('{"a": 1}', False),
        ("```python\nx", True),
        ("```python\nx\n```", False),
        ("<think>so", True),
        ("<think>so</think> yes", False),
        ("plain words", False),
    ],
)
def test_what_was_cut_off(text: str, cut: bool) -> None:
    assert is_truncated(text, len(text), None) == cut
    assert is_truncated(text, len(text), len(text))


def test_marks_of_form_and_languages_by_hand() -> None:
    found = numbers(("yes.</s>", "no"), ("fine.</s>", "**well**"), ("да", "ok"), ("no", "ответ is"))
    assert found["form_gap/written end of sequence"] == 0.5
    assert found["form_gap/bold"] == -0.25
    assert found["form_gap/ends a sentence"] == 0.0
    assert found["teacher_written_end"] == 0.5
    # teachers 3 latin, 1 cyrillic; students 3 latin, 1 mostly cyrillic
    assert found["script_gap"] == 0.0 and found["student_mixed_language"] == 0.25


def test_a_sound_set_and_sets_that_train_nothing() -> None:
    sound = [
        ("a good answer", "the wrong one"),
        ("short", "brief"),
        ("some words", "many words here"),
        ("b", "c"),
    ]
    assert not examine(pairs(*sound), Limits(), len).fatal
    for spoilt, reason in (
        ([(teacher * 20, student) for teacher, student in sound], "length alone"),
        ([(teacher, teacher) for teacher, _ in sound], "same text"),
        ([(teacher + "</s>", student) for teacher, student in sound], "'written end of sequence' alone"),
        ([("always this", student) for _, student in sound], "one and the same"),
        ([("", student) for _, student in sound], "of the teacher answers are empty"),
        ([("да", student) for _, student in sound], "different scripts"),
    ):
        fatal = examine(pairs(*spoilt), Limits(), len).fatal
        assert any(reason in text for text in fatal), (reason, fatal)


def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_command(*arguments, script=TOOL)


def lines(count: int) -> list[dict[str, object]]:
    """Unlike lengths on both sides."""
    return [
        {
            "messages": [{"role": "user", "content": f"say {number}"}],
            "teacher_response": f"it is {number}" + "!" * (number % 3),
            "student_response": f"it was {number}" + "?" * (number % 4),
        }
        for number in range(count)
    ]


def test_a_jsonl_file_gives_table_json_and_picture(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, lines(12))))
    done = analyze(data)
    assert done.returncode == 0, done.stderr
    assert "length_auc" in done.stdout and "nothing speaks against" in done.stdout
    found = json.loads((tmp_path / "quality.json").read_text())
    assert found["numbers"]["with_student"] == 12 and found["fatal"] == []
    assert (tmp_path / "quality.png").stat().st_size > 1000


def test_a_parquet_file_that_cannot_train_a_critic_says_why_and_exits_with_1(tmp_path: Path) -> None:
    data = tmp_path / "pairs.parquet"
    rows = [
        {"content": "q", "teacher_response": "a long answer" * (i + 1), "student_response": "no"}
        for i in range(9)
    ]
    pq.write_table(pa.Table.from_pylist(rows), data)
    done = analyze(data, "--out", tmp_path / "found")
    assert done.returncode == 1
    assert "CANNOT TRAIN A CRITIC: length alone tells the sides apart: AUC 1.00" in done.stdout
    assert json.loads((tmp_path / "found" / "quality.json").read_text())["fatal"]


def test_a_bad_line_is_named_and_ends_it_or_is_skipped(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join([*map(json.dumps, lines(8)), '{"content": ']))
    ended = analyze(data)
    assert ended.returncode == 2 and f"{data}:9" in ended.stderr and "not JSON" in ended.stderr
    assert "Traceback" not in ended.stderr
    skipped = analyze(data, "--on-bad-line", "skip")
    assert skipped.returncode == 0 and f"{data}:9 skipped: it is not JSON" in skipped.stderr


def test_a_line_without_a_teacher_and_a_checkpoint_that_is_none_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"content": "q", "student_response": "x"}')
    done = analyze(data)
    assert done.returncode == 2 and "no text under 'teacher_response'" in done.stderr
    data.write_text("\n".join(map(json.dumps, lines(8))))
    done = analyze(data, "--critic", tmp_path)
    assert done.returncode == 2 and "is no checkpoint of a run" in done.stderr


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    done = analyze(tmp_path / "none.jsonl")
    assert done.returncode == 2 and "there is no file" in done.stderr
