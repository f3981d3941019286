"""One local Slurm for all tests of this folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tests import tiny
from tests.slurm.beside import STEPS, World
from tests.slurm.cluster import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    # Paths of sockets are short, and pytest's own folders are not.
    with tempfile.TemporaryDirectory(prefix="grpo_mega-slurm-") as name:
        slurm = Cluster(Path(name) / "cluster")
        slurm.folder.mkdir()
        Path(name).chmod(0o755)
        try:
            slurm.start()
            yield slurm
        finally:
            slurm.stop()


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two ranks, a few steps of half a second, most of which they sleep."""
    folder = tmp_path_factory.mktemp("recipe")
    content = tiny.recipe_dict(
        folder / "run",
        parallel={"dp": 2},
        stages=[{"grpo": {"steps": STEPS}}],
        rollout={"generate": "tests.slurm.unhurried:generate"},
        eval={"every": 0, "samples": 8, "at_start": False},
    )
    content["model"]["scratch"]["layers"] = 2
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture(scope="session")
def world(
    request: pytest.FixtureRequest,
    cluster: Cluster,
    recipe: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    tests = [getattr(item, "function", None) for item in request.session.items]
    bodies = [body for test in tests if (body := getattr(test, "body", None)) is not None]
    world = World(cluster, recipe, tmp_path_factory.mktemp("beside"))
    with ThreadPoolExecutor(max(1, len(bodies))) as executor:
        world.start(bodies, executor)
        try:
            yield world
        finally:
            cluster.is_ending.set()
