"""The one exception a user is meant to read: what is wrong, where, which law it breaks and what to do about
it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

USER_ERROR_EXIT_CODE = 2
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """A mistake in a recipe, a file or the environment. The CLI prints it without a traceback and exits with
    code 2.

    Example:
        raise UserError(
            "model.scratch.heads = 6 cannot be split over parallel.tp = 4",
            where="recipes/quickstart.yaml:9 (model.scratch.heads)",
            law="every tensor-parallel rank holds the same whole number of attention heads",
            remedy="set parallel.tp to 1, 2, 3 or 6, or change model.scratch.heads",
        )
    """

    def __init__(
        self, what: str, *, where: str | None = None, law: str | None = None, remedy: str | None = None
    ):
        super().__init__(what)
        self.what, self.where, self.law, self.remedy = what, where, law, remedy

    def __reduce__(self):  # keyword-only fields survive a process boundary
        return _rebuild, (self.what, self.where, self.law, self.remedy)

    def __str__(self) -> str:
        lines = [self.what]
        lines += [
            f"  {label:<7} {text}"
            for label, text in (("where:", self.where), ("law:", self.law), ("remedy:", self.remedy))
            if text
        ]
        return "\n".join(lines)


def _rebuild(what: str, where: str | None, law: str | None, remedy: str | None) -> UserError:
    return UserError(what, where=where, law=law, remedy=remedy)


def as_users_see_it(error: Exception, run_dir: Path | None = None) -> Exception:
    """A full disk is no fault of the program's, wherever it was met. `run_dir`: what was being written to."""
    if _says_disk_full(error):
        named = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        return UserError(
            f"no room left on the disk: {named}{getattr(error, 'strerror', None) or error}",
            where=None if run_dir is None else f"run.dir = {run_dir}{_free(run_dir)}",
            law="a run writes metrics, checkpoints and its model into run.dir",
            remedy="make room, or set run.dir to another disk; --resume goes on from the newest checkpoint",
        )
    return error


@contextmanager
def naming_the_disk(run_dir: Path) -> Iterator[None]:
    """What is done here writes to `run_dir`; a full disk is told with its name."""
    try:
        yield
    except Exception as error:
        seen = as_users_see_it(error, run_dir)
        if seen is error:
            raise
        raise seen from error


def _free(directory: Path) -> str:
    with suppress(OSError):
        return f" ({shutil.disk_usage(directory).free / 1e9:.2f} GB free)"
    return ""


def _says_disk_full(error: Exception) -> bool:
    """Libraries that write files in other languages have the system's words only."""
    if isinstance(error, OSError):
        return error.errno in DISK_FULL
    return not isinstance(error, UserError) and any(os.strerror(code) in str(error) for code in DISK_FULL)
