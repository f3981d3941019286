"""Two ranks, which share one model, sample from two servers behind a router; one of these is killed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests import tiny
from tests.beside import beside_others
from tests.processes import run_ranks
from tests.sglang.conftest import assert_all_gone, processes_about

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

STEPS, PROMPTS, GROUP = 5, 8, 4
LONGEST_SECONDS = 480  # three times a server starts, with both processors busy
VICTIM = "server-1"


@beside_others
def test_one_of_two_servers_is_killed_in_a_run(sglang_python: str, tmp_path: Path):
    """Each step trains on all that was asked for, sampled from the trainer's weights, and both servers sample
    to the end."""
    run_dir, kept = tmp_path / "run", tmp_path / "kept"
    sglang = {"python": sglang_python, "mode": "router", "servers": 2, "concurrency": 16}
    sglang |= {"transport": "distributed", "timeout_seconds": 60}
    rollout = {"engine": "sglang", "sglang": sglang, "prompts_per_step": PROMPTS, "group_size": GROUP}
    recipe = tiny.recipe_dict(run_dir, rollout=rollout, parallel={"tp": 2})
    killer = threading.Thread(target=_kill_while_it_samples, args=(run_dir / "servers", kept), daemon=True)
    killer.start()
    work = partial(tiny.train_on_pool, dump=kept)
    assert run_ranks(2, work, recipe, limit_seconds=LONGEST_SECONDS) == [0, 0]
    killer.join()
    rows = [row for row in tiny.metrics_of(run_dir) if "reward/mean" in row]
    assert len(rows) == STEPS
    assert all(row["mismatch/abs_max"] < 1e-3 for row in rows)
    assert rows[0]["rollout/server_restarts"] == 0 and rows[-1]["rollout/server_restarts"] == 1
    wanted = Counter(dict.fromkeys(range(GROUP), PROMPTS))
    for step in range(STEPS):
        samples = pq.read_table(kept / f"stage_1_step_{step:06d}").to_pylist()
        assert Counter(sample["rollout_index"] for sample in samples) == wanted
        assert len({sample["uid"] for sample in samples}) == PROMPTS * GROUP
    lives = [_lives(run_dir / "servers", f"server-{index}") for index in range(2)]
    assert [len(life) for life in lives] == [1, 2]
    assert all(_sampled(life[-1]) for life in lives)
    assert len(_lives(run_dir / "servers", "router")) == 2  # one for each set of servers
    assert not tiny.beyond_overwrite(run_dir)
    assert_all_gone(run_dir)


def _kill_while_it_samples(folder: Path, kept: Path) -> None:
    """Once two steps are over, as soon as the victim has answered something more."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while not (kept / "stage_1_step_000001").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    before = _sampled(_lives(folder, VICTIM)[-1])
    while _sampled(_lives(folder, VICTIM)[-1]) == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    port = _lives(folder, VICTIM)[-1].partition("--port ")[2].split()[0]
    for process in processes_about(folder.parent):
        command = process.info["cmdline"]
        if command[1:3] == ["-m", "sglang.launch_server"] and port in command:
            process.kill()


def _lives(folder: Path, name: str) -> list[str]:
    """What a program has printed, for each time it was started."""
    log = (folder / f"{name}.log").read_text(errors="replace")
    return log.split("\n== ")[1:]


def _sampled(printed: str) -> int:
    return printed.count('"POST /generate HTTP/1.1" 200')
