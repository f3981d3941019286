"""From a data block to a source of problems."""

from __future__ import annotations

from pathlib import Path

from grpo_mega.data.problem import Problem, Source, Split
from grpo_mega.errors import UserError
from grpo_mega.recipe.blocks import DataBlock

__all__ = ["DEFAULT_SIZES", "Problem", "Source", "Split", "open_source"]

DEFAULT_SIZES: dict[Split, int] = {"train": 2**20, "eval": 512}
"""Problems of a generated task when the recipe names no number."""


def open_source(data: DataBlock, split: Split, seed: int) -> Source:
    """The problems of one split. Files are checked line by line here, and the options of generated tasks.

    The libraries behind a source are imported only when it is the one chosen.
    """
    if data.source == "jsonl":
        from grpo_mega.data.files import JsonlSource

        return JsonlSource(_path_of(data, split), data)
    if data.source == "parquet":
        from grpo_mega.data.files import ParquetSource

        return ParquetSource(_path_of(data, split), data)
    if data.task is None:
        raise UserError(
            f"data.source {data.source} needs a task", where="data.task", remedy="name one, e.g. sort_digits"
        )
    size = _size_of(data, split)
    if data.source == "reasoning_gym":
        from grpo_mega.data.gym import GymSource

        return GymSource(data.task, data.options, split, seed, size)
    from grpo_mega.data.procedural import ProceduralSource

    return ProceduralSource(data.task, data.options, split, seed, size)


def _given(data: DataBlock, split: Split) -> Path | int | None:
    return data.train if split == "train" else data.eval


def _path_of(data: DataBlock, split: Split) -> Path:
    given = _given(data, split)
    if not isinstance(given, Path):
        raise UserError(
            f"data.source {data.source} reads {split} problems from a file, and data.{split} is {given}",
            where=f"data.{split}",
            remedy=f"set data.{split} to the path of a {data.source} file",
        )
    if not given.is_file():
        raise UserError(
            f"{given} is a directory, not a file" if given.is_dir() else f"there is no file {given}",
            where=f"data.{split}",
            law=f"paths start at the working directory ({Path.cwd()})",
            remedy="correct the path",
        )
    return given


def _size_of(data: DataBlock, split: Split) -> int:
    given = _given(data, split)
    if isinstance(given, Path):
        raise UserError(
            f"data.source {data.source} generates its problems, and data.{split} is the path {given}",
            where=f"data.{split}",
            remedy=f"set data.{split} to a number of problems, or data.source to jsonl or parquet",
        )
    return DEFAULT_SIZES[split] if given is None else given
