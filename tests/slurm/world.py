"""What tests have whose jobs run beside one another: most of the time each waits."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from tests.sglang.conftest import installed_sglang
from tests.slurm.cluster import Cluster, Job, words

INNOVATION = "innovation_2_1_ema.sbatch"
STEPS = 10
ENDLESS = {"stages.grpo.steps": 100_000}


@dataclass(eq=False)
class World:
    """The cluster, and a job of `STEPS` steps in one go to compare with."""

    cluster: Cluster
    recipe: str
    undisturbed_dir: Path
    undisturbed: Job = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self.undisturbed = self.submit(INNOVATION, self.undisturbed_dir)

    def submit(self, file: str, run_dir: Path, *options: str, **changes: object) -> Job:
        """A training job with one update a batch; guard__hang_minutes is guard.hang_minutes."""
        given = {"run.dir": run_dir, "train.updates_per_batch": 1}
        given |= {key.replace("__", "."): value for key, value in changes.items()}
        return self.cluster.submit(file, *options, RECIPE=self.recipe, OVERRIDES=words(given))

    def sglang_python(self) -> str:
        with self._lock:
            return installed_sglang()
