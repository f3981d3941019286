"""Training with servers as the sampler, on two ranks: rank 0 owns the server, both sample from it."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from tests import tiny
from tests.processes import run_ranks

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


def test_two_ranks_train_on_what_a_server_samples(sglang_python: str, tmp_path: Path):
    run_dir = tmp_path / "run"
    recipe = tiny.recipe_dict(
        run_dir,
        rollout={
            "engine": "sglang",
            "sglang": {"python": sglang_python, "transport": "distributed", "timeout_seconds": 60},
        },
        parallel={"tp": 2},
    )
    assert run_ranks(2, tiny.train_on_pool, recipe) == [0, 0]
    rows = [row for row in tiny.metrics_of(run_dir) if "reward/mean" in row]
    assert len(rows) == 5
    for row in rows:  # after every step's sync the server samples from what the trainer computes
        assert row["mismatch/abs_max"] < 1e-3
    assert (run_dir / "servers" / "server-0.log").is_file()
    assert not tiny.beyond_overwrite(run_dir)
    deadline = time.monotonic() + 10
    while mine := _processes_about(run_dir):
        assert time.monotonic() < deadline, mine
        time.sleep(0.2)


def _processes_about(run_dir: Path) -> list[psutil.Process]:
    processes = psutil.process_iter(["cmdline"])
    return [process for process in processes if str(run_dir) in " ".join(process.info["cmdline"] or [])]
