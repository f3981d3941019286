"""Tests whose jobs run beside one another: each mostly waits, and the cluster has room for several."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path

from tests.sglang.conftest import installed_sglang
from tests.slurm.cluster import Cluster, Job, words

INNOVATION = "innovation_2_1_ema.sbatch"
STEPS = 10
ENDLESS = {"stages.grpo.steps": 100_000}


@dataclass(eq=False)
class World:
    """What such a test has: the cluster, and a job of `STEPS` steps in one go to compare with."""

    cluster: Cluster
    recipe: str
    folder: Path
    undisturbed: Job = field(init=False)
    _outcomes: dict[Body, Future[None]] = field(default_factory=dict["Body", "Future[None]"], init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self.undisturbed = self.submit(INNOVATION, self.undisturbed_dir)

    @property
    def undisturbed_dir(self) -> Path:
        return self.folder / "undisturbed" / "run"

    def submit(self, file: str, run_dir: Path, *options: str, **changes: object) -> Job:
        """A training job with one update a batch; guard__hang_minutes is guard.hang_minutes."""
        given = {"run.dir": run_dir, "train.updates_per_batch": 1}
        given |= {key.replace("__", "."): value for key, value in changes.items()}
        return self.cluster.submit(file, *options, RECIPE=self.recipe, OVERRIDES=words(given))

    def sglang_python(self) -> str:
        with self._lock:
            return installed_sglang()

    def start(self, bodies: Iterable[Body], executor: Executor) -> None:
        for body in bodies:
            folder = self.folder / body.__name__
            folder.mkdir()
            self._outcomes[body] = executor.submit(body, self, folder)

    def outcome_of(self, body: Body) -> None:
        self._outcomes[body].result()


Body = Callable[[World, Path], None]


def beside_others(body: Body) -> Callable[[World], None]:
    """A test that starts, in a thread of its own, with the first of all chosen ones of this kind."""

    @wraps(body)
    def test(world: World) -> None:
        world.outcome_of(body)

    del test.__wrapped__  # pytest would ask for the body's arguments
    test.body = body  # type: ignore[attr-defined]
    return test
