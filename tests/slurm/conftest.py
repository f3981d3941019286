"""One local Slurm for all tests of this folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests import tiny
from tests.beside import Body, Outcome, running
from tests.slurm.cluster import Cluster
from tests.slurm.world import STEPS, World


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
        rollout={"generate": "tests.slurm.unhurried:generate", "prompts_per_step": 4, "prompts_per_batch": 1},
        eval={"every": 0, "samples": 8, "at_start": False},
    )
    content["model"]["scratch"]["layers"] = 2
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture(scope="session")
def beside(
    request: pytest.FixtureRequest,
    cluster: Cluster,
    recipe: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Outcome]:
    folder = tmp_path_factory.mktemp("beside")
    world = World(cluster, recipe, folder / "undisturbed" / "run")

    def call(body: Body) -> None:
        own = folder / body.__name__
        own.mkdir()
        body(world, own)

    with running(request.session.items, call, at_once=None) as outcome:
        yield outcome
        cluster.is_ending.set()
