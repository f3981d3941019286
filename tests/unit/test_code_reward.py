"""The code reward: right programs pass, wrong, broken and deceiving ones do not, and a batch runs at once."""

from __future__ import annotations

import json
import threading
import time

import pytest

from grpo_mega.errors import UserError
from grpo_mega.recipe.reward_blocks import CodeReward, RewardItem, SandboxLimits
from grpo_mega.reward.assembly import RewardAssembly
from grpo_mega.reward.base import BatchReward
from grpo_mega.reward.code import CodeScorer, read_tests, same_value
from grpo_mega.reward.math import MathScorer
from grpo_mega.reward.programs import program_in, workers_here
from grpo_mega.types import Group, Prompt, Sample

ADD_LINES = [{"stdin": "3 4\n", "stdout": "7\n"}, {"stdin": "-1 1\n", "stdout": "0"}]
ADD_CALLS = [
    {"call": "add(3, 4)", "result": 7},
    {"call": "add(0.1, 0.2)", "result": 0.3},
    {"call": "add([1], [2])", "result": [1, 2]},
    {"assert": "assert add('a', 'b') == 'ab'\nassert add(1, 1) == 2"},
]
READS = "print(sum(map(int, input().split())))"
ADD = "def add(a, b):\n    return a + b\n"


@pytest.fixture(scope="module")
def scorer():
    return CodeScorer(CodeReward(limits=SandboxLimits(wall_seconds=20.0)), "code")


def fenced(program, language="python"):
    return f"So:\n```{language}\n{program}\n```\nDone."


def prompt_with(tests):
    return Prompt(uid="train-7", index=7, text="?", token_ids=(5,), answer="", meta={"tests": tests})


def sample_of(text, rollout=0):
    return Sample(f"train-7/{rollout}", rollout, (5,), (-0.1,), text, "stop")


def pass_rate(scorer, program, tests):
    return scorer.score(prompt_with(tests), sample_of(fenced(program))).pass_rate


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("```python\na\n```", "a\n"),
        ("```python\na\n```\nbetter:\n```python\nb\n```", "b\n"),  # the last one counts
        ("```py\na\n```\noutput:\n```\n7\n```", "a\n"),  # Python before what names no language
        ("```\na\n```", "a\n"),
        ("```python title=x\na\n```", "a\n"),
        ("~~~python\na\n```\nb\n~~~", "a\n```\nb\n"),
        ("````python\n```\n````", "```\n"),
        ("  ```python\n  a\n  ```", "  a\n"),
        ("```python\na\nb", "a\nb"),  # the response was cut off
        ("```python\n \n```", None),
        ("print(1)", None),
        ("", None),
    ],
)
def test_the_program_of_a_response(response, expected):
    assert program_in(response, ("python", "py")) == expected


def test_a_whole_text_is_a_program_only_if_allowed():
    assert program_in("print(1)", ("python",), whole_text=True) == "print(1)"
    assert program_in("x\n```python\na\n```", ("python",), whole_text=True) == "a\n"


@pytest.mark.parametrize(
    ("program", "tests", "expected"),
    [
        (READS, ADD_LINES, 1),
        ("print(7)", ADD_LINES, 1 / 2),
        (READS + "\nprint('  ')", ADD_LINES[:1], 1),  # white space at the end does not count
        ("print(' ', end=''); " + READS, ADD_LINES[:1], 0),  # at the beginning of a line it does
        (READS + "\nraise SystemExit(1)", ADD_LINES, 0),  # right, and failed
        ("if __name__ == '__main__': " + READS, ADD_LINES, 1),
        (ADD, ADD_CALLS, 1),
        (ADD + "if __name__ == '__main__': input()", ADD_CALLS[:1], 1),
        ("def add(a, b):\n    return 7", ADD_CALLS, 1 / 4),
        ("def add(a, b): return (a, b)", [{"call": "add(1, {2: None})", "result": [1, {"2": None}]}], 1),
        ("print('x = 7')\n" + ADD, ADD_CALLS, 1),  # what it prints does not matter
        ("def add(a, b: return a", ADD_CALLS, 0),
        ("def add(a, b): raise ValueError", ADD_CALLS, 0),
        ("def add(a, b): return {1, 2}", ADD_CALLS[:1], 0),  # no JSON
    ],
)
def test_programs(scorer, program, tests, expected):
    assert pass_rate(scorer, program, tests) == pytest.approx(expected)


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import sys; sys.stdout.write('true'); sys.stdout.flush()",
        "def add(a, b):\n    import os; os._exit(0)",
        "class Same(int):\n    def __eq__(self, other): return True\ndef add(a, b): return Same(0)",
        "import sys; sys.stdin.read()",
        "import json\njson.loads = json.dumps = lambda *a: '7'",
    ],
)
def test_leaving_early_or_claiming_to_be_equal_passes_no_call(scorer, program):
    assert pass_rate(scorer, program, ADD_CALLS[:1]) == 0


def test_tests_do_not_see_each_other(scorer):
    program = """
import os
print(os.path.exists("left"))
open("left", "w").close()
os.chdir("/"); open("/tmp/left" if os.access("/tmp", os.W_OK) else "/dev/null", "w").close()
"""
    assert pass_rate(scorer, program, [{"stdin": "", "stdout": "False"}] * 2) == 1


def test_one_program_that_hangs_fails_only_its_own_test():
    scorer = CodeScorer(CodeReward(limits=SandboxLimits(wall_seconds=1.5)), "code")
    program = "import time\nn = int(input())\nif n == 2: time.sleep(60)\nprint(n)"
    tests = [{"stdin": f"{n}\n", "stdout": f"{n}"} for n in (1, 2, 3)]
    result = scorer.score(prompt_with(tests), sample_of(fenced(program)))
    assert result.value == pytest.approx(2 / 3)
    assert (result.passed_tests, result.total_tests) == (2, 3)
    assert dict(result.parts) == {"no_program": 0, "timed_out": pytest.approx(1 / 3)}


def test_a_program_that_cannot_be_parsed_is_run_once(scorer, monkeypatch):
    runs = []
    run = scorer._sandbox.run
    monkeypatch.setattr(scorer._sandbox, "run", lambda *args, **keys: runs.append(1) or run(*args, **keys))
    assert pass_rate(scorer, "def (", ADD_LINES * 10) == 0 and len(runs) == 1


def test_options():
    tests = [*ADD_LINES, {"stdin": "1 1", "stdout": "3"}]
    some = CodeScorer(CodeReward(all_or_nothing=True, whole_text=True), "code")
    result = some.score(prompt_with(tests), sample_of(READS))
    assert (result.value, result.pass_rate) == (0, pytest.approx(2 / 3))
    first = CodeScorer(CodeReward(all_or_nothing=True, max_tests=2), "code")
    result = first.score(prompt_with(tests), sample_of(fenced(READS)))
    assert (result.value, result.pass_rate, result.total_tests) == (1, 1, 2)


def test_a_response_without_a_program_scores_0(scorer):
    result = scorer.score(prompt_with(ADD_LINES), sample_of("I cannot."))
    assert (result.value, result.pass_rate, result.parts["no_program"]) == (0, 0, 1)


@pytest.mark.parametrize("program", ["print('\ud83d')", "\x00", "(" * 5000])
def test_texts_that_are_hardly_programs(scorer, program):
    assert pass_rate(scorer, program, ADD_LINES[:1]) == 0


@pytest.mark.parametrize(
    ("said", "expected", "same"),
    [
        (b"1", 1.0, True),
        (b"1", True, False),
        (b"0.30000000000000004", 0.3, True),
        (b"0.3001", 0.3, False),
        (b"[1, [2]]", (1, (2,)), True),
        (b'{"a": 1}', {"a": 1, "b": 2}, False),
        (b"null", None, True),
        (b"not json", "not json", False),
        (b"[" * 100000, [], False),
    ],
)
def test_values_are_compared_as_json(said, expected, same):
    assert same_value(said, expected) == same


@pytest.mark.parametrize(
    "tests", [None, [], "[", "3", {}, [3], [{}], [{"stdin": "1"}], [{"call": "f()"}], [{"assert": None}]]
)
def test_problems_without_usable_tests_are_the_users_mistake(scorer, tests):
    with pytest.raises(UserError, match="train-7"):
        scorer.score(prompt_with(tests), sample_of(fenced(ADD)))


def test_tests_as_json_text_and_with_the_nulls_of_a_table():
    as_rows = [{"stdin": None, "stdout": None, "call": "f()", "result": None, "assert": None}]
    (test,) = read_tests(prompt_with(json.dumps(as_rows)), "code")
    assert (test.kind, test.given, test.expected) == ("call", "f()", None)


def test_an_interpreter_that_is_not_there():
    with pytest.raises(UserError, match="no interpreter"):
        CodeScorer(CodeReward(python="/no/python"), "code")


def test_a_batch_is_scored_at_once_and_in_order():
    block = CodeReward(workers=4, limits=SandboxLimits(wall_seconds=30.0))
    prompt = prompt_with([{"stdin": "", "stdout": "1"}])
    slow = "import time; time.sleep({}); print({})"
    groups = [
        Group(prompt, tuple(sample_of(fenced(slow.format(0.6, n % 2)), n) for n in range(4))),
        Group(prompt, (sample_of("none"),)),
    ]
    rewards = RewardAssembly([RewardItem(code=block, weight=2.0)])
    started = time.monotonic()
    first, second = rewards.score_groups(groups)
    assert time.monotonic() - started < 0.6 * 4 + 1
    assert [score.total for score in first] == [0, 2, 0, 2]
    assert second[0].components == {"code": 0, "code/no_program": 1, "code/timed_out": 0}
    assert (first[1].pass_rate, first[1].passed_tests, first[1].total_tests) == (1, 1, 1)


def test_only_slow_rewards_score_batches(scorer):
    assert isinstance(scorer, BatchReward)
    assert not isinstance(MathScorer, BatchReward)
    assert workers_here(3) == 3 and workers_here(0) >= 1


def test_the_first_mistake_in_a_batch_is_raised(scorer):
    before = threading.active_count()
    with pytest.raises(UserError, match="train-7"):
        scorer.score_many([(prompt_with([]), sample_of(fenced(READS)))] * 3)
    assert threading.active_count() == before
