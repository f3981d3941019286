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
from tests.e2e.test_train import LONGEST_SECONDS, ROOT

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


def _start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "grpo_mega", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_trainer_finds_servers_that_come_later(sglang_python: str, tmp_path: Path):
    sglang = {"python": sglang_python, "mode": "external", "urls_file": str(tmp_path / "addresses")}
    sglang |= {"transport": "tensor", "timeout_seconds": 60}
    recipe = tmp_path / "recipe.yaml"
    blocks = tiny.recipe_dict(tmp_path / "run", rollout={"engine": "sglang", "sglang": sglang})
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
    rows = [row for row in tiny.metrics_of(tmp_path / "run") if "actor/loss" in row]
    assert len(rows) == 5 and all(row["mismatch/abs_max"] < 1e-3 for row in rows)
