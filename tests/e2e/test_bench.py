"""Benchmarks run, compare the same work, and leave numbers and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grpo_mega.cli import app


def _rows(directory: Path, title: str) -> dict[str, dict[str, float]]:
    assert (directory / f"{title}.png").stat().st_size > 0
    written = json.loads((directory / f"{title}.json").read_text())
    assert written["machine"]["threads"] >= 1
    return {row["variant"]: row for row in written["rows"]}


@pytest.mark.slow
def test_logprob_variants_agree_with_each_other(tmp_path: Path) -> None:
    size = ["--tokens", "64", "--hidden", "32", "--vocab", "5000", "--repeats", "1"]
    done = CliRunner().invoke(app, ["bench", "logprob", "--out", str(tmp_path), *size])
    assert done.exit_code == 0, done.output
    rows = _rows(tmp_path, "logprob")
    assert {"naive", "eager", "compiled"} <= rows.keys()
    assert all(row["error"] < 1e-4 for row in rows.values())


@pytest.mark.slow
def test_losses_are_timed_against_the_plain_one(tmp_path: Path) -> None:
    size = ["--sequences", "2", "--length", "80", "--repeats", "1"]
    done = CliRunner().invoke(app, ["bench", "losses", "--out", str(tmp_path), *size])
    assert done.exit_code == 0, done.output
    rows = _rows(tmp_path, "losses")
    assert rows["plain clipped PPO, eager"]["of_plain"] == 1.0
    assert {"all compatible, eager", "all compatible, compiled"} <= rows.keys()
