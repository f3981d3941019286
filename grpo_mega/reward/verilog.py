"""A Verilog design in the response, judged by its problem's testbench in Icarus Verilog.

    reward = .6 functional + .2 efficiency + .1 readability + .1 robustness + .1 length + compile, within +-20

    compile      +2; -8 where the design does not compile. A response without a design earns -6 and no more.
    functional   15 * passed / tests * min(1.3^(passed - 1), 2); -4 where the simulation crashes, breaks a
                 limit or ends with an error, -2 where it reports no test
    robustness   5 when every test passes, and 1.5 more when there are at least 5
    efficiency   2 times the share of checks met: constructs that synthesize, and synthesize small
    readability  1 times the share of checks met: comments, indentation, short lines, a statement a line
    length       1 within length_range, below it falling linearly to 0, above it to -1 at twice its end

All numbers are fields of the block. The last three speak of the text, so a design that does not compile has
them too.

What a problem has: `testbench`, Verilog that instantiates the design; optionally `top`, the testbench's
module, and `test_count`, how many tests it makes (a simulation cut short then counts the missing ones as
failed). What a testbench prints: a line "PASS name" or "FAIL name" for each test, or else one line "3/4 tests
passed". Lines with the same name are one test, which passes when none of them says FAIL. Icarus gets the
design first, then `resetall`, then the testbench.

A design must not pass by printing. A testbench that begins its lines with the macro `GRPO_TOKEN, as in

    $display("%s PASS add", `GRPO_TOKEN);

is safe: the token is random, defined after the design, and lines without it do not count. With any other
testbench a design that calls a system task beyond `HARMLESS` ones could have printed the lines itself: its
result counts as none.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_mega.errors import UserError
from grpo_mega.recipe.reward_blocks import VerilogReward
from grpo_mega.reward.base import RewardResult
from grpo_mega.reward.programs import program_in, score_at_once, workers_here
from grpo_mega.reward.sandbox import SEARCH_PATH, Isolation, Sandbox, SandboxResult
from grpo_mega.types import Prompt, Sample

LANGUAGES = ("verilog", "systemverilog", "sv", "v")
TOKEN = "GRPO_TOKEN"
NOT_COMPILED = 97
"""Exit code of the script below. A simulation that ends with it only harms itself."""

TEST_LINE = re.compile(r"(PASS|FAIL)\b[:\s]*(.*)")
SUMMARY_LINE = re.compile(r"([0-9]{1,9})\s*/\s*([0-9]{1,9})\s+tests?\s+passed\b", re.IGNORECASE)
COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?(?:\*/|\Z)|"(?:\\.|[^"\\\n])*"', re.DOTALL)
SYSTEM_TASK = re.compile(r"\$([A-Za-z_][\w$]*)")
HARMLESS = frozenset(
    (
        *("signed", "unsigned", "clog2", "bits", "size", "high", "low", "left", "right", "increment"),
        *("countones", "onehot", "onehot0", "isunknown", "readmemh", "readmemb", "rtoi", "itor"),
        *("time", "stime", "realtime", "random", "urandom"),
    )
)
"""System functions that neither print nor end a simulation."""
LONGEST_LINE = 120
PART_NAMES = ("functional", "efficiency", "readability", "robustness", "length", "compile", "no_code")
NO_PARTS: Mapping[str, float] = dict.fromkeys(PART_NAMES, 0.0)

EFFICIENCY: Mapping[str, re.Pattern[str]] = {
    "no initial block": re.compile(r"\binitial\b"),
    "no delay": re.compile(r"#\s*[\d.]|#\s*\(\s*\d+\s*\)\s*[A-Za-z_]\w*\s*<?="),
    "no division": re.compile(r"[\w)\]]\s*[/%]\s*[A-Za-z_(]"),
    "no loop without end": re.compile(r"\b(?:while|forever|wait)\b"),
    "no casex": re.compile(r"\bcasex\b"),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What Icarus said. Example: Verdict(compiled=True, crashed=False, passed=3, tests=4)"""

    compiled: bool
    crashed: bool
    passed: int
    tests: int  # 0: none was reported


class VerilogScorer:
    """The preset above. `pass_rate` is the share of tests passed, 0 where none was run."""

    def __init__(
        self,
        block: VerilogReward,
        name: str,
        hidden: Sequence[Path] = (),
        isolation: Isolation | None = None,
    ):
        self.name, self._block = name, block
        self._iverilog, self._vvp = _tool("iverilog"), _tool("vvp")
        self._sandbox = Sandbox(block.limits, hidden=(*block.hidden, *hidden), isolation=isolation)

    def score(self, prompt: Prompt, sample: Sample) -> RewardResult:
        testbench = _testbench(prompt, self.name)
        design = program_in(sample.text, LANGUAGES, whole_text=True)
        if design is None or not re.search(r"\bmodule\b", without_comments(design)):
            return RewardResult(
                self._block.no_code, pass_rate=0.0, parts={**NO_PARTS, "no_code": self._block.no_code}
            )
        verdict = self._simulate(design, testbench, prompt)
        return result_of(verdict, design, self._block)

    def score_many(self, pairs: Sequence[tuple[Prompt, Sample]]) -> list[RewardResult]:
        return score_at_once(self.score, pairs, workers_here(self._block.workers))

    def _simulate(self, design: str, testbench: str, prompt: Prompt) -> Verdict:
        token = secrets.token_hex(16)
        top, count = prompt.meta.get("top"), prompt.meta.get("test_count")
        # Names that the design cannot know, so that it cannot include the files.
        names = {kind: f"{kind}_{secrets.token_hex(8)}.sv" for kind in ("design", "token", "testbench")}
        compile_command = [
            self._iverilog,
            f"-g{self._block.standard}",
            *(["-s", _identifier(str(top), prompt, self.name)] if top else []),
            "-o",
            "design.vvp",
            *names.values(),
        ]
        files = {
            "run.sh": f"{' '.join(compile_command)} >&2 || exit {NOT_COMPILED}\n"
            f"exec {self._vvp} -n design.vvp\n",
            names["design"]: design + "\n",
            names["token"]: f'`resetall\n`define {TOKEN} "{token}"\n',
            names["testbench"]: testbench + "\n",
        }
        result = self._sandbox.run(
            ["/bin/sh", "run.sh"],
            files={name: text.encode("utf-8", "replace") for name, text in files.items()},
        )
        expected = int(str(count)) if count is not None else 0
        return verdict_of(result, design, token if f"`{TOKEN}" in testbench else None, expected)


def verdict_of(result: SandboxResult, design: str, token: str | None, expected_tests: int = 0) -> Verdict:
    """Reads what the testbench printed; with a token, only the lines that begin with it."""
    if result.exit_code == NOT_COMPILED:
        return Verdict(compiled=False, crashed=False, passed=0, tests=0)
    if not result.succeeded:
        return Verdict(compiled=True, crashed=True, passed=0, tests=0)
    if token is None and not _is_silent(design):
        return Verdict(compiled=True, crashed=False, passed=0, tests=0)
    lines = [line.strip() for line in result.stdout.decode("utf-8", "replace").splitlines()]
    if token is not None:
        lines = [line.removeprefix(token).lstrip() for line in lines if line.startswith(token)]
    passed, tests = _count(lines)
    # A testbench that never came to report is no proof of failed tests, only of no result.
    tests = max(tests, expected_tests) if tests else 0
    return Verdict(compiled=True, crashed=False, passed=passed, tests=tests)


def _count(lines: Sequence[str]) -> tuple[int, int]:
    passes: dict[str, bool] = {}
    for place, line in enumerate(lines):
        found = TEST_LINE.match(line)
        if found:
            name = found[2] or f"unnamed, line {place}"
            passes[name] = passes.get(name, True) and found[1] == "PASS"
    if passes:
        return sum(passes.values()), len(passes)
    for line in reversed(lines):
        found = SUMMARY_LINE.search(line)
        if found:
            return min(int(found[1]), int(found[2])), int(found[2])
    return 0, 0


def result_of(verdict: Verdict, design: str, block: VerilogReward) -> RewardResult:
    """The preset's arithmetic; `parts` are its terms before their weights."""
    functional = robustness = 0.0
    if verdict.compiled and verdict.crashed:
        functional = block.crash
    elif verdict.compiled and not verdict.tests:
        functional = block.unparsable
    elif verdict.compiled:
        bonus = min(block.pass_bonus ** max(verdict.passed - 1, 0), block.pass_bonus_cap)
        functional = block.functional_scale * verdict.passed / verdict.tests * bonus
        if verdict.passed == verdict.tests:
            many = verdict.tests >= block.many_tests_at_least
            robustness = block.all_passed + (block.many_tests if many else 0.0)
    parts = {
        "functional": functional,
        "efficiency": block.efficiency_scale * efficiency(design),
        "readability": block.readability_scale * readability(design),
        "robustness": robustness,
        "length": block.length_scale * length(design, block.length_range),
        "compile": block.compile_success if verdict.compiled else block.compile_failure,
    }
    total = (
        block.functional_weight * parts["functional"]
        + block.efficiency_weight * parts["efficiency"]
        + block.readability_weight * parts["readability"]
        + block.robustness_weight * parts["robustness"]
        + block.length_weight * parts["length"]
        + parts["compile"]
    )
    rate = verdict.passed / verdict.tests if verdict.tests else 0.0
    return RewardResult(
        value=min(max(total, -block.clip), block.clip),
        pass_rate=rate,
        parts={**NO_PARTS, **parts},
        passed_tests=verdict.passed if verdict.tests else None,
        total_tests=verdict.tests or None,
    )


def without_comments(design: str) -> str:
    """Strings go too, but for their quotes."""
    return COMMENT_OR_STRING.sub(lambda found: '""' if found[0].startswith('"') else " ", design)


def _is_silent(design: str) -> bool:
    return all(task in HARMLESS for task in SYSTEM_TASK.findall(without_comments(design)))


def efficiency(design: str) -> float:
    """The share of checks met, 0..1."""
    code = without_comments(design)
    defaults = len(re.findall(r"\bdefault\b", code)) >= len(re.findall(r"\bcase[xz]?\b", code))
    met = [not pattern.search(code) for pattern in EFFICIENCY.values()] + [defaults]
    return sum(met) / len(met)


def readability(design: str) -> float:
    """The share of checks met, 0..1."""
    lines = [line for line in design.splitlines() if line.strip()]
    code_lines = [line for line in without_comments(design).splitlines() if line.strip()]
    checks: tuple[Callable[[], bool], ...] = (
        lambda: "//" in design or "/*" in design,
        lambda: any(line[0] in " \t" for line in lines),
        lambda: all(len(line) <= LONGEST_LINE for line in lines),
        lambda: all(line.count(";") < 2 for line in code_lines if not re.search(r"\bfor\b", line)),
    )
    return sum(check() for check in checks) / len(checks)


def length(design: str, allowed: tuple[int, int]) -> float:
    """1 within the range; below it the share of its beginning; above it down to -1 at twice its end."""
    characters = len(re.sub(r"\s+", "", without_comments(design)))
    shortest, longest = allowed
    if characters < shortest:
        return characters / shortest
    return max(-1.0, 1.0 - 2.0 * max(0, characters - longest) / longest)


def _tool(name: str) -> str:
    path = shutil.which(name, path=SEARCH_PATH)
    if path is not None:
        return path
    raise UserError(
        f"{name} is not installed",
        where="reward.verilog",
        law="the Verilog reward compiles and simulates with Icarus Verilog, found in " + SEARCH_PATH,
        remedy="apt install iverilog",
    )


def _testbench(prompt: Prompt, reward_name: str) -> str:
    testbench = prompt.meta.get("testbench")
    if isinstance(testbench, str) and testbench.strip():
        return testbench
    raise UserError(
        f"prompt {prompt.uid} has no testbench",
        where=f"reward {reward_name}, scoring prompt {prompt.uid}",
        law="the Verilog reward simulates a design with the problem's field `testbench`",
        remedy="add it to the problems of data.train and data.eval, or choose another reward",
    )


def _identifier(name: str, prompt: Prompt, reward_name: str) -> str:
    if re.fullmatch(r"[A-Za-z_]\w*", name):
        return name
    raise UserError(
        f"top {name!r} of prompt {prompt.uid} is no name of a module",
        where=f"reward {reward_name}, scoring prompt {prompt.uid}",
        remedy="give the name of the testbench's module, or leave `top` out",
    )
