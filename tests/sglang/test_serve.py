"""A real server started by `grpo-mega serve`, and a trainer that waits for its address."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from tests import tiny
from tests.beside import beside_others
from tests.e2e.test_train import LONGEST_SECONDS, ROOT
from tests.sglang.conftest import assert_all_gone

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


def _start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "grpo_mega", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@beside_others
def test_two_ranks_find_servers_that_come_later_and_sample_one_step_ahead(sglang_python: str, tmp_path: Path):
    """Every step has all its groups, none is older than allowed; the servers stay until told to end."""
    run_dir = tmp_path / "run"
    sglang = {"python": sglang_python, "mode": "external", "urls_file": str(tmp_path / "addresses")}
    sglang |= {"transport": "tensor", "timeout_seconds": 60}
    recipe = tmp_path / "recipe.yaml"
    rollout = {"engine": "sglang", "max_staleness": 1, "dynamic_sampling": {}, "sglang": sglang}
    blocks = tiny.recipe_dict(run_dir, rollout=rollout, parallel={"dp": 2})
    recipe.write_text(yaml.safe_dump(blocks))
    trainer = _start("train", recipe, "--quiet")
    servers = _start("serve", recipe, f"run.dir={tmp_path / 'served'}")
    try:
        _, errors = trainer.communicate(timeout=LONGEST_SECONDS)
        assert trainer.returncode == 0, errors
        helpers = psutil.Process(servers.pid).children(recursive=True)
        assert helpers  # they outlive the trainer
        servers.send_signal(signal.SIGTERM)
        printed, _ = servers.communicate(timeout=60)
        assert servers.returncode == 143 and "server 0: http://127.0.0.1:" in printed
        assert not psutil.wait_procs(helpers, timeout=10)[1]
    finally:
        trainer.kill()
        servers.kill()
    rows = [row for row in tiny.metrics_of(run_dir) if "rollout/groups_kept" in row]
    assert len(rows) == 5 and rows[0]["mismatch/abs_max"] < 1e-3
    for number, row in enumerate(rows):
        assert row["rollout/groups_kept"] == 8 and row["rollout/groups_missing"] == 0
        # the first step has no step to be sampled in; spare groups wait for one step more
        assert row["rollout/staleness_max"] <= min(number, 2)
        assert row["rollout/retried_requests"] == 0
    assert all(row["rollout/staleness_mean"] > 0 for row in rows[1:])
    assert_all_gone(run_dir)
