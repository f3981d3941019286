"""Matrices of cases: a covering selection runs by default, the rest under `-m exhaustive`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def by_hand(*values: Any) -> Any:
    """One case that only `-m exhaustive` runs."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def covering(cases: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """All cases of a matrix, of which those in `default` run by default.

    Example: covering(["dp2", "tp2", "pp2"], default={"tp2"}) runs tp2 by default, dp2 and pp2 by hand
    """
    return [case if case in default else by_hand(case) for case in _all_of(cases, default)]


def covering_rows(cases: Iterable[tuple[Any, ...]], default: Collection[tuple[Any, ...]]) -> list[Any]:
    """The same where each case is a row of several arguments."""
    return [case if case in default else by_hand(*case) for case in _all_of(cases, default)]


def _all_of(cases: Iterable[Any], default: Collection[Any]) -> list[Any]:
    every = list(cases)
    missing = [case for case in default if case not in every]
    assert not missing, f"no such case: {missing}"
    return every
