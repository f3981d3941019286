"""Can a critic learn from these pairs what it is meant to? What else tells a teacher's answers from a
student's: their length, how they end, a mark of their form, their language.

# P pairs of a teacher's and a student's answer, N answers of one side
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from grpo_mega.reward.format import find_json, main_script, scripts

Measure = Callable[[str], int]
"""Of a text's length."""

ENDINGS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>", "<eos>", "<|end_of_text|>")
"""End-of-sequence tokens that somebody wrote down as text."""
MIXED_FROM = 0.1
"""Share of letters of other scripts than a text's own from which on it is a mixture."""
SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")
FORMS: Mapping[str, Callable[[str], bool]] = {
    "written end of sequence": lambda text: text.rstrip().endswith(ENDINGS),
    "ends in white space": lambda text: text != text.rstrip(),
    "begins with white space": lambda text: text != text.lstrip(),
    "ends a sentence": lambda text: text.rstrip().endswith(SENTENCE_ENDS),
    "JSON": lambda text: find_json(text).state == "valid",
    "code fence": lambda text: "```" in text,
    "list": lambda text: any(line.lstrip().startswith(("- ", "* ", "1. ")) for line in text.splitlines()),
    "heading": lambda text: any(line.startswith("#") for line in text.splitlines()),
    "bold": lambda text: "**" in text,
    "thinking tag": lambda text: "<think" in text or "</think" in text,
    "several lines": lambda text: "\n" in text.strip(),
}
"""What the form of an answer can give away."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Of one line. Example: Answers("data.jsonl:7", prompt="2+2=", teacher="4", student="5")"""

    where: str
    prompt: str
    teacher: str
    student: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Beyond these no critic learns what it is meant to; halfway from chance, or from 0, is worth a word."""

    length_auc: float = 0.9
    """Of a classifier that sees only the length, in either direction."""
    form_gap: float = 0.9
    """Between the shares of both sides' answers that have a mark of form."""
    identical: float = 0.9
    """Share of pairs that are the same text: they teach nothing."""
    repeated: float = 0.9
    """Share of lines that repeat an earlier one, or of teachers' answers that are one and the same."""
    truncated: float = 0.5
    """Share of a side's answers that were cut off."""
    empty: float = 0.1
    """Share of a side's answers that are empty."""
    script_gap: float = 0.9
    """Distance of both sides' mixture of scripts: half the sum of differences between shares."""


@dataclass(frozen=True, slots=True)
class Quality:
    """What was found. `fatal` are reasons not to train on the set, `doubts` worth a look."""

    numbers: Mapping[str, float]
    lengths: Mapping[str, Sequence[int]]  # by side, for a picture
    examples: Mapping[str, str] = field(default_factory=dict[str, str])  # of a finding: where one is
    fatal: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def examine(
    answers: Sequence[Answers], limits: Limits, measure: Measure, longest: int | None = None
) -> Quality:
    """`longest`: an answer of so many or more was cut off."""
    pairs = [pair for pair in answers if pair.student is not None]
    texts = {"teacher": [pair.teacher for pair in answers]}
    if pairs:
        texts["student"] = [pair.student or "" for pair in pairs]
    lengths = {side: [measure(text) for text in given] for side, given in texts.items()}
    numbers: dict[str, float] = {"pairs": float(len(answers)), "with_student": float(len(pairs))}
    for side, given in texts.items():
        numbers |= _of_side(side, given, lengths[side], longest)
    numbers |= _repetition(answers)
    if pairs:
        same = [pair.teacher.strip() == (pair.student or "").strip() for pair in pairs]
        numbers["identical"] = float(np.mean(same))
        # Of pairs alone: the teachers of lines without a student are no side of a comparison.
        teachers = [
            length
            for pair, length in zip(answers, lengths["teacher"], strict=True)
            if pair.student is not None
        ]
        numbers["length_auc"] = auc(teachers, lengths["student"])
        paired = [pair.teacher for pair in pairs]
        numbers |= {f"form_gap/{name}": gap for name, gap in _form_gaps(paired, texts["student"]).items()}
        numbers["script_gap"] = _script_gap(paired, texts["student"])
    fatal, doubts = _judged(numbers, limits)
    return Quality(numbers, lengths, _examples(answers), fatal, doubts)


def auc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """The chance that one of the positives is larger than one of the negatives, a tie counting half.

    Example: 3, 5 against 1, 3 -> (1 + .5 + 1 + 1) / 4 = .875
    """
    sorted_negatives = np.sort(np.asarray(negatives, dtype=np.float64))
    below = np.searchsorted(sorted_negatives, positives, side="left")
    not_above = np.searchsorted(sorted_negatives, positives, side="right")
    return float((below + not_above).sum() / 2 / (len(positives) * len(negatives)))


def is_truncated(text: str, length: int, longest: int | None) -> bool:
    """At the limit, or something is open that would have been closed: a code fence, a JSON object that the
    text begins with, a thinking tag."""
    if longest is not None and length >= longest:
        return True
    begins_json = text.lstrip().startswith("{")
    return (
        text.count("```") % 2 == 1
        or text.count("<think>") > text.count("</think>")
        or (begins_json and find_json(text).state == "incomplete")
    )


def _of_side(
    side: str, texts: Sequence[str], lengths: Sequence[int], longest: int | None
) -> dict[str, float]:
    quantiles = np.quantile(lengths, [0.05, 0.5, 0.95])
    cut = [is_truncated(text, length, longest) for text, length in zip(texts, lengths, strict=True)]
    return {
        f"{side}_length_mean": float(np.mean(lengths)),
        f"{side}_length_std": float(np.std(lengths)),
        f"{side}_length_min": float(min(lengths)),
        f"{side}_length_p05": float(quantiles[0]),
        f"{side}_length_median": float(quantiles[1]),
        f"{side}_length_p95": float(quantiles[2]),
        f"{side}_length_max": float(max(lengths)),
        f"{side}_empty": _share(not text.strip() for text in texts),
        f"{side}_truncated": _share(cut),
        f"{side}_written_end": _share(map(FORMS["written end of sequence"], texts)),
        f"{side}_mixed_language": _share(map(_is_mixed, texts)),
    }


def _share(marks: Iterable[bool]) -> float:
    return float(np.mean(list(marks)))


def _is_mixed(text: str) -> bool:
    letters = scripts(text)
    return bool(letters) and 1 - max(letters.values()) / letters.total() > MIXED_FROM


def _repetition(answers: Sequence[Answers]) -> dict[str, float]:
    """Shares of lines that repeat an earlier one, whole or in its prompt, and of the commonest answer."""
    count = len(answers)
    whole = len({(pair.prompt, pair.teacher, pair.student) for pair in answers})
    prompts = len({pair.prompt for pair in answers})
    commonest = Counter(pair.teacher.strip() for pair in answers).most_common(1)[0][1]
    return {
        "repeated_lines": 1 - whole / count,
        "repeated_prompts": 1 - prompts / count,
        "commonest_teacher_answer": commonest / count,
    }


def _form_gaps(teachers: Sequence[str], students: Sequence[str]) -> dict[str, float]:
    """Share among teachers less share among students, by mark of form."""
    return {name: _share(map(has, teachers)) - _share(map(has, students)) for name, has in FORMS.items()}


def _script_gap(teachers: Sequence[str], students: Sequence[str]) -> float:
    sides = [Counter(main_script(text) for text in texts) for texts in (teachers, students)]
    shares = [{script: count / side.total() for script, count in side.items()} for side in sides]
    names = {script for side in shares for script in side}
    return sum(abs(shares[0].get(name, 0.0) - shares[1].get(name, 0.0)) for name in names) / 2


@dataclass(frozen=True, slots=True)
class _Rule:
    """A number that should be small, what it means where it is not, and what is to be done."""

    value: float
    bound: float
    what: str
    remedy: str


def _judged(numbers: Mapping[str, float], limits: Limits) -> tuple[tuple[str, ...], tuple[str, ...]]:
    fatal: list[str] = []
    doubts: list[str] = []
    for rule in _rules(numbers, limits):
        if rule.value >= rule.bound:
            fatal.append(f"{rule.what} (the limit is {rule.bound:g}): {rule.remedy}")
        elif rule.value >= rule.bound / 2:
            doubts.append(f"{rule.what}: {rule.remedy}")
    if not numbers["with_student"]:
        doubts.append("no student responses: what tells them from the teacher's was not looked at")
    return tuple(fatal), tuple(doubts)


def _rules(numbers: Mapping[str, float], limits: Limits) -> list[_Rule]:
    def shown(name: str, words: str) -> str:
        return f"{numbers[name]:.1%} {words}"

    rules: list[_Rule] = []
    for side in ("teacher", "student"):
        if f"{side}_empty" not in numbers:
            continue
        empty, cut = f"{side}_empty", f"{side}_truncated"
        rules += [
            _Rule(
                numbers[empty], limits.empty, shown(empty, f"of the {side} answers are empty"), "remove them"
            ),
            _Rule(
                numbers[cut],
                limits.truncated,
                shown(cut, f"of the {side} answers are cut off"),
                "generate them again with more room: an end that only one side has is easy to see",
            ),
        ]
    common, again = "commonest_teacher_answer", "repeated_lines"
    rules += [
        _Rule(
            numbers[again], limits.repeated, shown(again, "of the lines repeat an earlier one"), "keep one"
        ),
        _Rule(
            numbers[common],
            limits.repeated,
            shown(common, "of the teacher answers are one and the same"),
            "the critic will know that text and nothing else",
        ),
    ]
    return rules + (_rules_of_pairs(numbers, limits) if numbers["with_student"] else [])


def _rules_of_pairs(numbers: Mapping[str, float], limits: Limits) -> list[_Rule]:
    by_length = numbers["length_auc"]
    side = "longer" if by_length > 0.5 else "shorter"
    rules = [
        _Rule(
            numbers["identical"],
            limits.identical,
            f"{numbers['identical']:.1%} of the pairs are the same text",
            "equal answers teach nothing: take harder prompts, or an earlier student",
        ),
        _Rule(
            # from .5 at chance: doubt begins halfway between that and the limit
            max(0.0, abs(by_length - 0.5)),
            limits.length_auc - 0.5,
            f"length alone tells the sides apart: AUC {by_length:.2f}, the teacher's are {side}",
            "match the lengths, or the critic will reward length",
        ),
        _Rule(
            numbers["script_gap"],
            limits.script_gap,
            f"the sides are written in different scripts: distance {numbers['script_gap']:.2f}",
            "let both answer in one language",
        ),
    ]
    for name in FORMS:
        gap = numbers[f"form_gap/{name}"]
        rules.append(
            _Rule(
                abs(gap),
                limits.form_gap,
                f"{name!r} alone tells the sides apart: {gap:+.1%} of the teacher's over the student's",
                "give both sides the same form",
            )
        )
    return rules


def _examples(answers: Sequence[Answers]) -> dict[str, str]:
    """Where the first of a kind is."""
    kinds: Mapping[str, Callable[[Answers], bool]] = {
        "empty teacher": lambda pair: not pair.teacher.strip(),
        "empty student": lambda pair: pair.student is not None and not pair.student.strip(),
        "truncated teacher": lambda pair: is_truncated(pair.teacher, 0, None),
        "written end of sequence": lambda pair: FORMS["written end of sequence"](pair.teacher),
        "mixed language": lambda pair: _is_mixed(pair.teacher),
    }
    found = {
        name: next((pair.where for pair in answers if is_one(pair)), None) for name, is_one in kinds.items()
    }
    return {name: where for name, where in found.items() if where is not None}
