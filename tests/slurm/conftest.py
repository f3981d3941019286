"""One local Slurm for all tests of this folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests import tiny
from tests.sglang.conftest import sglang_python  # noqa: F401  # a fixture
from tests.slurm.cluster import Cluster, Job, words


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
    """Two ranks, eight steps of a fraction of a second."""
    folder = tmp_path_factory.mktemp("recipe")
    content = tiny.recipe_dict(
        folder / "run",
        parallel={"dp": 2},
        stages=[{"grpo": {"steps": 8}}],
        eval={"every": 0, "samples": 8, "at_start": False},
    )
    content["model"]["scratch"]["layers"] = 2
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """Eight steps in one go. Submitted with the first test that wants it, and running beside that one."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    changes = {"run.dir": run_dir, "train.updates_per_batch": 1}
    job = cluster.submit("innovation_2_1_ema.sbatch", RECIPE=recipe, OVERRIDES=words(changes))
    return job, run_dir
