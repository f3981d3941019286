"""The blocks of `reward:`, one for each kind of reward, and what an untrusted program may use."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from grpo_mega.block import Block, NotNegative, Positive

Script = Literal["latin", "cjk", "cyrillic", "arabic"]


class RuleReward(Block):
    kind: Literal["exact", "contains", "number", "regex", "reasoning_gym"] = "exact"
    """exact: the response equals the answer; contains: holds it; number: its last number equals the answer's;
    regex: `pattern` matches ({answer} in it stands for the answer); reasoning_gym: the task's own scorer."""
    pattern: str | None = None
    strip: bool = True
    """Ignore white space around response and answer."""
    ignore_case: bool = False
    extract: str | None = None
    """A regular expression whose first group is the answer inside the response; no match scores 0."""

    @model_validator(mode="after")
    def regex_needs_a_pattern(self) -> RuleReward:
        if (self.kind == "regex") != (self.pattern is not None):
            raise ValueError("pattern belongs to kind: regex, and kind: regex needs it")
        return self


class MathReward(Block):
    """Symbolic equality of the last boxed or plain expression with the answer."""

    timeout_seconds: float = Field(default=5.0, gt=0)


class SandboxLimits(Block):
    """What one run of an untrusted program may use; past a limit it is killed."""

    wall_seconds: float = Field(default=10.0, gt=0)
    cpu_seconds: Positive = 5
    """Processor time of each of its processes."""
    memory_mib: Positive = 1024
    """Of all its processes together, and of each one's address space."""
    processes: Positive = 32
    """At a time, threads included."""
    disk_mib: Positive = 64
    """All files together, where the sandbox has a file system of its own."""
    file_mib: Positive = 16
    """Each file."""
    open_files: Positive = 64
    """In each process."""
    output_kib: Positive = 256
    """Of standard output, and as much of standard error."""


class CodeReward(Block):
    """A Python program in the response, run against the tests of the problem's `tests` field."""

    all_or_nothing: bool = False
    """1 if every test passes, else 0; false: the share of tests passed."""
    whole_text: bool = False
    """A response without a fenced block is a program as a whole; false: it has no program and scores 0."""
    max_tests: NotNegative = 0
    """Only the first this many tests of a problem; 0 = all."""
    python: Path | None = None
    """The interpreter of the programs; null: the trainer's own, with what is installed there."""
    workers: NotNegative = 0
    """Programs run at a time on each rank; 0 = the processor cores divided among the machine's ranks."""
    limits: SandboxLimits = SandboxLimits()
    """For each test."""
    hidden: tuple[Path, ...] = ()
    """Folders that programs must not see, besides the run's own."""


class VerilogReward(Block):
    """A Verilog design in the response, compiled with the testbench of the problem's `testbench` field."""

    functional_weight: float = 0.6
    efficiency_weight: float = 0.2
    readability_weight: float = 0.1
    robustness_weight: float = 0.1
    length_weight: float = 0.1
    compile_success: float = 2.0
    """Added to the weighted sum, as is compile_failure."""
    compile_failure: float = -8.0
    no_code: float = -6.0
    """The whole reward of a response without a design."""
    crash: float = -4.0
    """The functional part when the simulation does not end by itself, or fails."""
    unparsable: float = -2.0
    """The functional part when the simulation reports no test."""
    functional_scale: float = Field(default=15.0, gt=0)
    """The functional part: functional_scale * pass ratio * min(pass_bonus^(passed - 1), pass_bonus_cap)."""
    pass_bonus: float = Field(default=1.3, ge=1)
    pass_bonus_cap: float = Field(default=2.0, ge=1)
    all_passed: float = 5.0
    """The robustness part when every test passes."""
    many_tests: float = 1.5
    """More of it when they are at least many_tests_at_least."""
    many_tests_at_least: Positive = 5
    efficiency_scale: float = 2.0
    """The efficiency part: this times the share of efficiency checks that the design meets."""
    readability_scale: float = 1.0
    """The readability part: this times the share of readability checks that the design meets."""
    length_scale: float = 1.0
    """The length part: +1 within length_range, falling to -1 at twice its end, times this."""
    length_range: tuple[NotNegative, Positive] = (20, 4000)
    """Characters of a design, comments and white space left out."""
    clip: float = Field(default=20.0, gt=0)
    """The reward stays within plus and minus this."""
    standard: Literal["2001", "2005", "2009", "2012"] = "2012"
    """Of Verilog: iverilog's -g."""
    workers: NotNegative = 0
    """Simulations at a time on each rank; 0 = the processor cores divided among the machine's ranks."""
    limits: SandboxLimits = SandboxLimits()
    hidden: tuple[Path, ...] = ()
    """Folders that a design must not see, besides the run's own."""

    @model_validator(mode="after")
    def length_range_is_ordered(self) -> VerilogReward:
        shortest, longest = self.length_range
        if shortest >= longest:
            raise ValueError(f"length_range [{shortest}, {longest}] must rise")
        return self


class FormatReward(Block):
    """Rules on the form of a response: each adds its number where it applies, and the sum is clipped."""

    expect_json: bool = True
    """false leaves out the rules on JSON."""
    keys: tuple[str, ...] = ()
    """Keys that the response's JSON object must have."""
    script: Script | None = None
    """Of the language wanted; null: that of the reference, and where there is none the response's own."""
    thinking: str = r"</?(?:think|thinking|thought|reasoning|scratchpad)\b[^>]*>"
    """A regular expression for thoughts that leaked into the response."""

    json_missing: float = -0.5
    json_incomplete: float = -0.3
    """The text ends inside the object."""
    json_invalid: float = -0.25
    prefix: float = -0.3
    """More than prefix_characters before the object (a code fence is not counted)."""
    prefix_characters: NotNegative = 5
    keys_missing: float = -0.2
    correct: float = 0.05
    """None of the rules on JSON above applies."""
    thinking_leak: float = -0.4
    mixed_language: float = -0.4
    """More than mixed_share of the letters belong to another script than most do."""
    mixed_share: float = Field(default=0.2, ge=0, lt=1)
    foreign_values: float = -0.35
    """Most letters of the JSON values belong to another script than the one wanted."""
    repeated_run: float = -0.5
    """At least run_characters characters stand run_times times in a row."""
    run_characters: Positive = 10
    run_times: int = Field(default=3, ge=2)
    repeated_ngrams: float = -0.4
    """In full where every ngram_size words repeat earlier ones; from 0 at a share of ngram_share."""
    ngram_size: Positive = 4
    ngram_share: float = Field(default=0.35, ge=0, lt=1)
    output_twice: float = -0.35
    """The response, or its JSON object, comes a second time."""
    too_long: float = -0.6
    """In full at too_long_full times the reference's length; from 0 at too_long_ratio."""
    too_long_ratio: float = Field(default=1.5, gt=0)
    too_long_full: float = Field(default=3.0, gt=0)
    too_short: float = -0.3
    """Shorter than too_short_ratio times the reference."""
    too_short_ratio: float = Field(default=0.3, ge=0)
    lowest: float = -1.5
    """The sum is clipped to [lowest, highest]."""
    highest: float = 0.1

    @model_validator(mode="after")
    def too_long_grows(self) -> FormatReward:
        if self.too_long_full <= self.too_long_ratio:
            raise ValueError(
                f"too_long_full ({self.too_long_full}) must be greater "
                f"than too_long_ratio ({self.too_long_ratio})"
            )
        return self

    @model_validator(mode="after")
    def clip_is_ordered(self) -> FormatReward:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest ({self.lowest}) must be less than highest ({self.highest})")
        return self


class OverlongReward(Block):
    """0 for a response of up to rollout.max_new_tokens - buffer tokens, then falling in a straight line to -1
    at max_new_tokens."""

    buffer: Positive
    """Tokens."""


class DiscriminatorReward(Block):
    """The score that the critic gives a sample, in adversarial stages."""


class RewardItem(Block):
    """One entry of `reward`: exactly one kind, and what it counts."""

    rule: RuleReward | None = None
    math: MathReward | None = None
    code: CodeReward | None = None
    verilog: VerilogReward | None = None
    format: FormatReward | None = None
    overlong: OverlongReward | None = None
    discriminator: DiscriminatorReward | None = None
    weight: float = 1.0

    @property
    def name(self) -> str:
        return self.rule.kind if self.rule is not None else self._kinds()[0]

    def _kinds(self) -> list[str]:
        given = {
            "rule": self.rule,
            "math": self.math,
            "code": self.code,
            "verilog": self.verilog,
            "format": self.format,
            "overlong": self.overlong,
            "discriminator": self.discriminator,
        }
        return [kind for kind, block in given.items() if block is not None]

    @model_validator(mode="after")
    def exactly_one_kind(self) -> RewardItem:
        if len(self._kinds()) != 1:
            raise ValueError(
                "a reward is exactly one of rule, math, code, verilog, format, overlong, discriminator "
                "(plus its weight)"
            )
        return self
