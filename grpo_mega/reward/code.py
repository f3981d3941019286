"""A Python program in the response, judged by the tests of its problem.

The problem's `tests` is a list (or the JSON text of one), and each test one of

    {"stdin": "3 4\\n", "stdout": "7\\n"}    the program's output on this input; white space at the end of a
                                           line and of the output does not matter
    {"call": "add(3, 4)", "result": 7}     the value of an expression after the program ran, as JSON (a tuple
                                           is a list); it is compared outside of the program's reach
    {"assert": "assert add(3, 4) == 7"}    statements after the program; they share the program's process, so
                                           that a program made to deceive could pass them: prefer the other
                                           two

Every test has a process and a folder of its own. A program that cannot be parsed, fails, ends early or breaks
a limit does not pass. For `call` and `assert` the program's __name__ is "program", not "__main__".
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_mega.errors import UserError
from grpo_mega.recipe.reward_blocks import CodeReward
from grpo_mega.reward.base import RewardResult
from grpo_mega.reward.programs import program_in, score_at_once, workers_here
from grpo_mega.reward.sandbox import Isolation, Sandbox, SandboxResult
from grpo_mega.types import Prompt, Sample

LANGUAGES = ("python", "py", "python3")
CANNOT_BE_PARSED = (b"SyntaxError:", b"IndentationError:", b"TabError:")
FLOAT_TOLERANCE = 1e-9
"""Relative and absolute, between the result of a call and the one expected."""

# The token reaches the harness before the program runs, and only a test that was reached prints it.
HARNESS = b"""
import json, os, sys
def main():
    request = json.loads(sys.stdin.readline())
    token, out = request.pop("token"), os.dup(1)
    space = {"__name__": "program"}
    with open("main.py", encoding="utf-8") as file:
        exec(compile(file.read(), "main.py", "exec"), space)
    if "call" in request:
        said = json.dumps(eval(request["call"], space))
    else:
        exec(request["assert"], space)
        said = "true"
    os.write(out, ("\\n" + token + said + token + "\\n").encode())
main()
"""


@dataclass(frozen=True, slots=True)
class CodeTest:
    """One test. Example: CodeTest("call", "add(3, 4)", 7)"""

    kind: str  # stdin, call or assert
    given: str  # what the program reads, the expression, or the statements
    expected: Any = None  # the output, or the expression's value


class CodeScorer:
    """The share of tests passed; with all_or_nothing 1 or 0."""

    def __init__(
        self,
        block: CodeReward,
        name: str,
        hidden: Sequence[Path] = (),
        isolation: Isolation | None = None,
    ):
        self.name, self._block = name, block
        self._python, readable = _interpreter(block.python)
        self._sandbox = Sandbox(
            block.limits, readable=readable, hidden=(*block.hidden, *hidden), isolation=isolation
        )

    def score(self, prompt: Prompt, sample: Sample) -> RewardResult:
        tests = read_tests(prompt, self.name)
        tests = tests[: self._block.max_tests or len(tests)]
        program = program_in(sample.text, LANGUAGES, whole_text=self._block.whole_text)
        if program is None:
            return self._result(0, len(tests), no_program=1.0)
        passed = timed_out = 0
        for test in tests:
            result, right = self._run(program, test)
            passed += right
            timed_out += result.timed_out
            if _cannot_be_parsed(result):
                break  # no other test can pass
        return self._result(passed, len(tests), timed_out=timed_out / len(tests))

    def _result(self, passed: int, tests: int, **parts: float) -> RewardResult:
        rate = passed / tests
        return RewardResult(
            value=float(passed == tests) if self._block.all_or_nothing else rate,
            pass_rate=rate,
            parts={"no_program": 0.0, "timed_out": 0.0} | parts,
            passed_tests=passed,
            total_tests=tests,
        )

    def score_many(self, pairs: Sequence[tuple[Prompt, Sample]]) -> list[RewardResult]:
        return score_at_once(self.score, pairs, workers_here(self._block.workers))

    def _run(self, program: str, test: CodeTest) -> tuple[SandboxResult, bool]:
        # A lone surrogate, which a tokenizer can produce, is a program that cannot be parsed.
        files = {"main.py": program.encode("utf-8", "surrogatepass")}
        if test.kind == "stdin":
            result = self._sandbox.run([self._python, "main.py"], files=files, stdin=test.given.encode())
            return result, result.succeeded and _same_output(result.stdout, test.expected)
        token = secrets.token_hex(16)
        request = json.dumps({"token": token, test.kind: test.given}).encode() + b"\n"
        files["harness.py"] = HARNESS
        result = self._sandbox.run([self._python, "harness.py"], files=files, stdin=request)
        said = _between(result.stdout, token.encode())
        if not result.succeeded or said is None:
            return result, False
        return result, test.kind == "assert" or same_value(said, test.expected)


def read_tests(prompt: Prompt, reward_name: str) -> list[CodeTest]:
    """The tests of a problem; a problem without any would score 0 whatever the response."""
    raw = prompt.meta.get("tests")
    try:
        listed = json.loads(raw) if isinstance(raw, str) else raw
        if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
            raise ValueError("it is not a list of tests" if listed else "there is none")
        return [_test(test) for test in listed]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"the tests of prompt {prompt.uid} cannot be used: {error}",
            where=f"reward {reward_name}, scoring prompt {prompt.uid}",
            law='a problem has a list `tests`, each {"stdin", "stdout"}, {"call", "result"} or {"assert"}',
            remedy="correct the field `tests` of the problem in data.train or data.eval",
        ) from error


def _test(test: object) -> CodeTest:
    if not isinstance(test, Mapping):
        raise ValueError(f"{test!r} is not a test")
    given = {
        str(key): value for key, value in test.items() if value is not None
    }  # parquet fills up with null
    if "stdin" in given or "stdout" in given:
        return CodeTest("stdin", str(given.get("stdin", "")), str(given["stdout"]))
    if "call" in given:
        return CodeTest("call", str(given["call"]), test["result"])
    return CodeTest("assert", str(given["assert"]))


def _interpreter(wanted: Path | None) -> tuple[str, list[str]]:
    """The interpreter, by a path without links to folders, and the folders it needs to read."""
    chosen = Path(sys.executable) if wanted is None else wanted
    if not os.access(chosen, os.X_OK):
        raise UserError(
            f"there is no interpreter {chosen}",
            where="reward.code.python",
            remedy="give the path of a Python interpreter, or null for the trainer's own",
        )
    path = Path(os.path.realpath(chosen.parent)) / chosen.name
    folders = {str(path.parent.parent), str(Path(os.path.realpath(chosen)).parent.parent)}
    if wanted is None:
        folders |= {sys.prefix, sys.base_prefix}
    return str(path), sorted(folders)


def _cannot_be_parsed(result: SandboxResult) -> bool:
    lines = result.stderr.strip().splitlines()
    return result.exit_code == 1 and bool(lines) and lines[-1].startswith(CANNOT_BE_PARSED)


def _same_output(found: bytes, expected: str) -> bool:
    return _lines(found.decode("utf-8", "replace")) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _between(output: bytes, token: bytes) -> bytes | None:
    parts = output.split(token)
    return parts[1] if len(parts) == 3 else None


def same_value(said: bytes, expected: Any) -> bool:
    """Whether JSON text is the value expected; numbers may differ by rounding."""
    try:
        return _equal(json.loads(said), json.loads(json.dumps(expected)))
    except (ValueError, RecursionError):
        return False


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, float) or isinstance(expected, float):
        numbers = isinstance(found, int | float) and isinstance(expected, int | float)
        return numbers and math.isclose(found, expected, rel_tol=FLOAT_TOLERANCE, abs_tol=FLOAT_TOLERANCE)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_equal, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_equal(found[key], expected[key]) for key in found)
    return found == expected
