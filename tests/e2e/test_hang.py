"""A run that waits for a rank which never comes."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from grpo_mega.ports import reserved_port
from tests import tiny
from tests.commands import run_command


def test_a_rank_that_never_came_is_named(tmp_path: Path):
    recipe = tiny.recipe_dict(tmp_path / "run", parallel={"dp": 2}, guard={"hang_minutes": 0.05})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with reserved_port() as port:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = run_command("train", path, environment={**os.environ, **place, **meeting})
    assert done.returncode == 85, done.stderr
    assert "rank 0: nothing finished in 0.05 minutes" in done.stderr
    assert "  rank 1: missing; left no stack" in done.stderr
    assert "parallel.py" in done.stderr  # where rank 0 waited
