"""Can this set train a critic? Lengths, equal answers, ends and forms that only one side has, repetition,
truncation, languages; and what a critic says of it.

    python tools/analyze_data_quality.py pairs.jsonl
    python tools/analyze_data_quality.py pairs.parquet --tokenizer MODEL --critic RUN/checkpoints/step_000200

A line has `messages` or `content` (the prompt), `teacher_response`, and `student_response` where there is
one. Prints a table and writes quality.json and quality.png. Exit code 0: nothing speaks against the set; 1:
it cannot train a critic, for the reasons given; 2: it cannot be read.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from grpo_mega import launch
from grpo_mega.data.sources import Source, open_source
from grpo_mega.data.tokenizer import load_tokenizer
from grpo_mega.data_quality import Answers, Limits, Quality, examine
from grpo_mega.errors import UserError
from grpo_mega.recipe import Recipe, load_recipe
from grpo_mega.recipe.blocks import DataBlock, ModelBlock, ParallelBlock

CANNOT_TRAIN = 1
DEFAULTS = Limits()
SHOWN_CHECKPOINT = "RUN/checkpoints/step_NNNNNN"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def analyze(
    data: Path,
    critic: Annotated[Path | None, typer.Option(help=f"A checkpoint: {SHOWN_CHECKPOINT}.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default: beside the data.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A model directory; without one, characters.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Answers of so many or more were cut off.")] = None,
    on_bad_line: Annotated[str, typer.Option(help="fail: the first one ends it; skip: it is told.")] = "fail",
    teacher_key: str = "teacher_response",
    student_key: str = "student_response",
    length_auc: Annotated[float, typer.Option(help="Limit.")] = DEFAULTS.length_auc,
    form_gap: Annotated[float, typer.Option(help="Limit.")] = DEFAULTS.form_gap,
    identical: Annotated[float, typer.Option(help="Limit.")] = DEFAULTS.identical,
) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    block = _block(data, on_bad_line, teacher_key)
    source = open_source(block, "train", seed=0)
    answers = [_answers(source, index, student_key, teacher_key) for index in range(len(source))]
    words: Any = None if tokenizer is None else load_tokenizer(ModelBlock(hf=tokenizer))
    limits = replace(DEFAULTS, length_auc=length_auc, form_gap=form_gap, identical=identical)

    def measure(text: str) -> int:
        return len(text) if words is None else len(words.encode(text, add_special_tokens=False))

    quality = examine(answers, limits, measure, max_tokens)
    judged = {} if critic is None else _judged_by(critic, source, block, answers)
    folder = out or data.parent
    folder.mkdir(parents=True, exist_ok=True)
    _show(quality, judged, "tokens" if words else "characters")
    _write(quality, judged, folder / "quality.json")
    _draw(quality, "tokens" if words else "characters", folder / "quality.png")
    if quality.fatal:
        raise typer.Exit(CANNOT_TRAIN)


def _block(data: Path, on_bad_line: str, teacher_key: str) -> DataBlock:
    source = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}.get(data.suffix)
    if source is None:
        raise UserError(
            f"{data.name} is no kind of file that is known",
            where="DATA",
            law="a set is a .jsonl or a .parquet file",
            remedy="write it as one of them",
        )
    if on_bad_line not in ("fail", "skip"):
        raise UserError(f"--on-bad-line {on_bad_line}", where="--on-bad-line", remedy="fail or skip")
    return DataBlock.model_validate(
        {
            "source": source,
            "train": data,
            "template": "chat",
            "prompt_key": "content",
            "teacher_key": teacher_key,
            "on_bad_line": on_bad_line,
        }
    )


def _answers(source: Source, index: int, student_key: str, teacher_key: str) -> Answers:
    problem = source.problem(index)
    student = problem.meta.get(student_key)
    if problem.teacher_response is None or not (student is None or isinstance(student, str)):
        key = teacher_key if problem.teacher_response is None else student_key
        raise UserError(
            f"this line has no text under {key!r}",
            where=source.where(index),
            law="a critic learns from pairs: a teacher's answer, and where there is one a student's",
            remedy=f"write it as a string, or name another field with --{key.partition('_')[0]}-key",
        )
    return Answers(source.where(index), problem.text, problem.teacher_response, student)


def _judged_by(
    checkpoint: Path, source: Source, block: DataBlock, answers: list[Answers]
) -> dict[str, float]:
    """What the critic of a checkpoint says of the pairs: critic/* as a run reports them."""
    recipe_file = checkpoint.parent.parent / "recipe.yaml"
    if not recipe_file.is_file() or not checkpoint.is_dir():
        raise UserError(
            f"{checkpoint} is no checkpoint of a run",
            where="--critic",
            law=f"it is a folder {SHOWN_CHECKPOINT}, and RUN/recipe.yaml says what it holds",
            remedy="name one of the folders under the run's checkpoints",
        )
    recipe = load_recipe(recipe_file).recipe
    if recipe.critic.kind != "discriminator":
        raise UserError(
            f"the run of {checkpoint} trained no discriminator (critic.kind is {recipe.critic.kind})",
            where="--critic",
            remedy="name a checkpoint of a run with critic.kind: discriminator",
        )
    if not any(pair.student is not None for pair in answers):
        raise UserError(
            "a critic compares, and no line has a student's answer",
            where="--critic",
            remedy="add student_response to the lines, or name its field with --student-key",
        )
    measured: dict[str, float] = {}

    def worker() -> None:
        measured.update(_measure(recipe, checkpoint, source, block, answers))

    launch.run_distributed(worker, 1, [])
    return measured


def _measure(
    recipe: Recipe, checkpoint: Path, source: Source, block: DataBlock, answers: list[Answers]
) -> dict[str, float]:
    from grpo_mega.critic.discriminator import Discriminator
    from grpo_mega.critic.pairs import AnswerPair, distribute_pairs
    from grpo_mega.data.stream import PromptStream
    from grpo_mega.engine.checkpoint import load_checkpoint
    from grpo_mega.engine.parallel import shutdown
    from grpo_mega.parts import build

    recipe = recipe.model_copy(update={"parallel": ParallelBlock()})
    parts = build(recipe, quiet=True, fresh=False, check_inputs=False)
    assert parts.critic is not None
    load_checkpoint(parts.engine, checkpoint, {"critic": parts.critic})
    template = block.model_copy(update={"template": recipe.data.template, "system": recipe.data.system})
    words: Any = parts.inputs.tokenizer
    prompts = PromptStream(source, words, template, recipe.seed, "train")

    def pair_of(index: int, answer: Answers) -> AnswerPair:
        prompt = prompts.prompt(index)
        student = (*words.encode(answer.student, add_special_tokens=False), words.eos_token_id)
        ids = prompt.token_ids, prompts.teacher_tokens(prompt), student
        return AnswerPair(prompt.uid, *ids, prompt.text, answer.teacher, answer.student or "")

    made = [pair_of(i, answer) for i, answer in enumerate(answers) if answer.student is not None]
    eos_ids, tokens = parts.inputs.sampling.stop_ids, recipe.train.micro_batch_tokens
    pairs = distribute_pairs(range(len(made)), made, parts.layout, tokens, eos_ids, recipe.critic.score)
    measured = Discriminator(parts.critic, recipe.critic).measure(pairs, "critic")
    shutdown()
    return measured


def _show(quality: Quality, judged: dict[str, float], unit: str) -> None:
    table = Table("", "", title=f"lengths in {unit}")
    for name, value in {**quality.numbers, **judged}.items():
        table.add_row(name, f"{value:,.4g}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for what, where in quality.examples.items():
        console.print(f"{what}: first at {where}", markup=False)
    for text in quality.doubts:
        console.print(f"look at: {text}", markup=False)
    for text in quality.fatal:
        console.print(f"CANNOT TRAIN A CRITIC: {text}", markup=False)
    if not quality.fatal:
        console.print("nothing speaks against training a critic on this set")


def _write(quality: Quality, judged: dict[str, float], path: Path) -> None:
    found = {
        "numbers": {**quality.numbers, **judged},
        "fatal": quality.fatal,
        "doubts": quality.doubts,
        "examples": dict(quality.examples),
    }
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _draw(quality: Quality, unit: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2))
    left.hist(list(quality.lengths.values()), bins=40, label=list(quality.lengths), density=True)
    left.set_xlabel(unit)
    left.set_title("length of an answer")
    left.legend()
    gaps = {name: value for name, value in quality.numbers.items() if name.startswith("form_gap/")}
    right.barh([name.removeprefix("form_gap/") for name in gaps], list(gaps.values()))
    right.set_xlim(-1, 1)
    right.set_title("share of the teacher's answers less share of the student's")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _main() -> int:
    app()
    return 0


if __name__ == "__main__":
    sys.exit(launch.guarded(_main))
