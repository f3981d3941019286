"""Rules on the form of a response. Each adds its number where it applies; the sum is clipped.

JSON missing -.5, else incomplete -.3, else invalid -.25, else keys missing -.2; more than 5 characters before
it -.3; none of these +.05. Thinking leak -.4, mixed language -.4, JSON values in another language -.35. A run
of at least 10 characters three times in a row -.5, repeated 4-grams up to -.4, output given twice -.35, up to
-.6 for more than 1.5 times the reference's length, -.3 for less than .3 times. The numbers are fields of the
block.

`parts` holds what each rule added, 0 where it does not apply. The reference is the problem's
teacher_response, or else its answer; without either the rules about it do not apply. A language is known by
its letters: latin, cjk, cyrillic or arabic; letters of no such script are not counted.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from grpo_mega.errors import UserError
from grpo_mega.recipe.reward_blocks import FormatReward, Script
from grpo_mega.reward.base import RewardResult
from grpo_mega.types import Prompt, Sample

JSON_RULES = ("json_missing", "json_incomplete", "json_invalid", "prefix", "keys_missing", "correct")
LANGUAGE_RULES = ("thinking_leak", "mixed_language", "foreign_values")
REPETITION_RULES = ("repeated_run", "repeated_ngrams", "output_twice")
LENGTH_RULES = ("too_long", "too_short")
RULES = (*JSON_RULES, *LANGUAGE_RULES, *REPETITION_RULES, *LENGTH_RULES)

LONGEST_RUN = 200
"""Of the runs that are looked for: the search is linear in the response's length, times this."""
FENCE = re.compile(r"^```\w*\s*\n?")
SCRIPT_OF_NAME: Mapping[str, Script] = {
    "LATIN": "latin",
    "CJK": "cjk",
    "HIRAGANA": "cjk",
    "KATAKANA": "cjk",
    "HANGUL": "cjk",
    "CYRILLIC": "cyrillic",
    "ARABIC": "arabic",
}


@dataclass(frozen=True, slots=True)
class FoundJson:
    """The first JSON object of a response. Example: FoundJson("valid", 0, "{}", {})"""

    state: str  # missing, incomplete, invalid or valid
    start: int = 0  # characters before it, white space and a code fence left out
    text: str = ""
    value: Any = None


class FormatScorer:
    """The clipped sum. It says nothing about success: there is no pass rate."""

    def __init__(self, block: FormatReward, name: str):
        self.name, self._block = name, block
        try:
            self._thinking = re.compile(block.thinking, re.IGNORECASE)
        except re.error as error:
            raise UserError(
                f"thinking = {block.thinking!r} is not a regular expression: {error}",
                where="reward.format.thinking",
                remedy="correct it; inside YAML, single quotes keep backslashes as they are",
            ) from error
        run, more = block.run_characters, max(block.run_characters, LONGEST_RUN)
        self._run = re.compile(rf"(\S.{{{run - 1},{more}}}?)\1{{{block.run_times - 1}}}", re.DOTALL)

    def score(self, prompt: Prompt, sample: Sample) -> RewardResult:
        text = sample.text.strip()
        reference = (prompt.teacher_response or prompt.answer).strip()
        found = find_json(text) if self._block.expect_json else None
        parts = dict.fromkeys(RULES, 0.0)
        parts |= self._on_json(found)
        parts |= self._on_language(text, found, reference)
        parts |= self._on_repetition(text, found)
        parts |= self._on_length(text, reference)
        value = min(max(sum(parts.values()), self._block.lowest), self._block.highest)
        return RewardResult(value, parts=parts)

    def _on_json(self, found: FoundJson | None) -> dict[str, float]:
        block = self._block
        if found is None:
            return {}
        if found.state == "missing":
            return {"json_missing": block.json_missing}
        parts: dict[str, float] = {}
        if found.state == "incomplete":
            parts["json_incomplete"] = block.json_incomplete
        elif found.state == "invalid":
            parts["json_invalid"] = block.json_invalid
        elif any(key not in found.value for key in block.keys):
            parts["keys_missing"] = block.keys_missing
        if found.start > block.prefix_characters:
            parts["prefix"] = block.prefix
        return parts or {"correct": block.correct}

    def _on_language(self, text: str, found: FoundJson | None, reference: str) -> dict[str, float]:
        block, parts = self._block, dict[str, float]()
        if self._thinking.search(text):
            parts["thinking_leak"] = block.thinking_leak
        letters = scripts(text)
        if letters and 1 - max(letters.values()) / letters.total() > block.mixed_share:
            parts["mixed_language"] = block.mixed_language
        wanted = block.script or main_script(reference)
        if found is not None and found.state == "valid" and wanted is not None:
            said = main_script(" ".join(_strings(found.value)))
            if said is not None and said != wanted:
                parts["foreign_values"] = block.foreign_values
        return parts

    def _on_repetition(self, text: str, found: FoundJson | None) -> dict[str, float]:
        block, parts = self._block, dict[str, float]()
        if self._run.search(text):
            parts["repeated_run"] = block.repeated_run
        excess = (repeated_ngrams(text, block.ngram_size) - block.ngram_share) / (1 - block.ngram_share)
        if excess > 0:
            parts["repeated_ngrams"] = block.repeated_ngrams * excess
        if _given_twice(text, found):
            parts["output_twice"] = block.output_twice
        return parts

    def _on_length(self, text: str, reference: str) -> dict[str, float]:
        block = self._block
        if not reference:
            return {}
        ratio = len(text) / len(reference)
        if ratio < block.too_short_ratio:
            return {"too_short": block.too_short}
        if ratio > block.too_long_ratio:
            share = (ratio - block.too_long_ratio) / (block.too_long_full - block.too_long_ratio)
            return {"too_long": block.too_long * min(1.0, share)}
        return {}


def find_json(text: str) -> FoundJson:
    """The object that begins at the first brace."""
    start = text.find("{")
    if start < 0:
        return FoundJson("missing")
    before = len(FENCE.sub("", text[:start].strip() + "\n").strip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
        return FoundJson("valid", before, text[start:end], value)
    except (ValueError, RecursionError):  # an integer of thousands of digits is a ValueError too
        return FoundJson("invalid" if _closes(text, start) else "incomplete", before)


def _closes(text: str, start: int) -> bool:
    """Whether the braces and brackets opened from `start` on are closed again, strings aside."""
    depth, in_string, escaped = 0, False, False
    for character in text[start:]:
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_string = True
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
            if depth == 0:
                return True
    return False


def _strings(value: Any) -> Iterator[str]:
    """The texts among the values, at any depth; keys are not among them."""
    ahead = [value]
    while ahead:
        item = ahead.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            ahead += item.values()
        elif isinstance(item, list):
            ahead += item


def scripts(text: str) -> Counter[Script]:
    """Letters by script."""
    counts = Counter[Script]()
    for character, count in Counter(text).items():
        script = _script(character)
        if script is not None:
            counts[script] += count
    return counts


@lru_cache(maxsize=65536)
def _script(character: str) -> Script | None:
    if not character.isalpha():
        return None
    return SCRIPT_OF_NAME.get(unicodedata.name(character, "").split(" ")[0])


def main_script(text: str) -> Script | None:
    """That of most letters; None where there are no letters."""
    counts = scripts(text)
    return counts.most_common(1)[0][0] if counts else None


def repeated_ngrams(text: str, size: int) -> float:
    """The share of n-grams that occurred before: 1 - distinct / all. Words are split at white space, and a
    text of few words is taken by the character where its script has none (cjk)."""
    words = text.split()
    if main_script(text) == "cjk":
        words = [character for character in text if not character.isspace()]
    grams = [tuple(words[place : place + size]) for place in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _given_twice(text: str, found: FoundJson | None) -> bool:
    if found is not None and found.state == "valid" and found.value:
        again = text.find("{", text.find(found.text) + len(found.text))
        if again >= 0:
            second = find_json(text[again:])
            return second.state == "valid" and second.value == found.value
    middle = (len(text) + 1) // 2
    first, last = text[:middle].strip(), text[middle:].strip()
    return bool(first) and first == last
