"""The one exception a user is meant to read: what is wrong, where, which law it breaks and what to do about
it."""

from __future__ import annotations

import errno

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


def as_users_see_it(error: Exception) -> Exception:
    """A full disk is no fault of the program's, wherever it was met."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        named = f"{error.filename}: " if error.filename else ""
        return UserError(
            f"no room left on the disk: {named}{error.strerror}",
            law="a run writes metrics, checkpoints and its model into run.dir",
            remedy="make room, or set run.dir to another disk; --resume goes on from the newest checkpoint",
        )
    return error
