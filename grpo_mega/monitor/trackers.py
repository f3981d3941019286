"""Where the numbers of a run go: metrics.jsonl always, TensorBoard and Weights & Biases where wanted.

    trackers = open_trackers(recipe.tracker, run_dir, resume_step=0, project=..., run_name=..., ...)
    trackers.start(config, resumed_from_step=None)
    trackers.write(report, stage_step)      # after every step and every evaluation
    trackers.finish()

On rank 0 only. metrics.jsonl is the record of the run: a failure to write it ends the run. A failure of any
other tracker is counted and told once, and training goes on.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from grpo_mega.errors import UserError
from grpo_mega.monitor.jsonl import MetricsWriter

if TYPE_CHECKING:  # types.py imports torch
    from grpo_mega.monitor.wandb_sync import WandbSyncManager
    from grpo_mega.types import StepReport

TENSORBOARD_FOLDER = "tensorboard"
WANDB_FOLDER = "wandb_sync"
"""A report is an evaluation when all its metrics begin like this. It shares its step with a training
report."""

Histograms = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Name -> (counts, edges), one more edge than counts."""
WandbPolicy = Literal["auto", "resume", "new"]


class Tracker(Protocol):
    @property
    def name(self) -> str: ...

    def start(self, config: Mapping[str, Any], *, resumed_from_step: int | None) -> None:
        """Before the first report. `resumed_from_step`: of the checkpoint; None for a new training."""
        ...

    def write(self, report: StepReport, stage_step: int) -> None: ...

    def histograms(self, step: int, histograms: Histograms) -> None: ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None: ...

    def finish(self) -> None: ...

    def status(self) -> dict[str, Any]: ...


class JsonlTracker:
    """metrics.jsonl. It holds numbers; histograms and tables are for the eye and go to the others."""

    name = "jsonl"

    def __init__(self, run_dir: Path, resume_step: int):
        self._writer = MetricsWriter(run_dir, resume_step)
        self._records = 0

    def start(self, config: Mapping[str, Any], *, resumed_from_step: int | None) -> None:
        pass

    def write(self, report: StepReport, stage_step: int) -> None:
        self._writer.write(report, stage_step)
        self._records += 1

    def histograms(self, step: int, histograms: Histograms) -> None:
        pass

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        pass

    def finish(self) -> None:
        self._writer.close()

    def status(self) -> dict[str, Any]:
        return {"records": self._records}


class TensorBoardTracker:
    """`tensorboard --logdir RUN_DIR/tensorboard`."""

    name = "tensorboard"

    def __init__(self, run_dir: Path, resume_step: int):
        _require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        # On a resume, events of steps that will be written again are hidden.
        self._writer = SummaryWriter(
            str(run_dir / TENSORBOARD_FOLDER), purge_step=resume_step if resume_step > 0 else None
        )

    def start(self, config: Mapping[str, Any], *, resumed_from_step: int | None) -> None:
        text = json.dumps(config, indent=1, default=str)
        self._writer.add_text("config", f"```json\n{text}\n```", (resumed_from_step or 0))

    def write(self, report: StepReport, stage_step: int) -> None:
        for name, value in report.metrics.items():
            self._writer.add_scalar(name, value, report.step)

    def histograms(self, step: int, histograms: Histograms) -> None:
        for name, (counts, edges) in histograms.items():
            counts, edges = [float(count) for count in counts], [float(edge) for edge in edges]
            middles = [(low + high) / 2 for low, high in pairwise(edges)]
            self._writer.add_histogram_raw(
                name,
                min=edges[0],
                max=edges[-1],
                num=int(sum(counts)),
                sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
                sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
                bucket_limits=edges[1:],
                bucket_counts=counts,
                global_step=step,
            )

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        self._writer.add_text(name, _markdown(columns, rows), step)

    def finish(self) -> None:
        self._writer.close()

    def status(self) -> dict[str, Any]:
        return {"folder": str(self._writer.log_dir)}


class WandbTracker:
    """Weights & Biases, live or offline: WANDB_MODE, WANDB_PROJECT, WANDB_DIR and WANDB_RUN_ID are
    honoured."""

    name = "wandb"

    def __init__(self, run_dir: Path, project: str, run_name: str, policy: WandbPolicy):
        _require("wandb")
        from grpo_mega.monitor.wandb_sync import initialize_wandb_sync_manager

        self._manager: WandbSyncManager = initialize_wandb_sync_manager(
            run_dir / WANDB_FOLDER, project, run_name, policy
        )

    def start(self, config: Mapping[str, Any], *, resumed_from_step: int | None) -> None:
        if resumed_from_step is not None:
            self._manager.update_step_offset(resumed_from_step)
        self._manager.setup_wandb_run(resumed_from_step is not None, config)
        status = self._manager.get_sync_status()
        if status["phase"] == "uninitialised" and status["last_error"]:
            raise RuntimeError(status["last_error"])

    def write(self, report: StepReport, stage_step: int) -> None:
        data = {**report.metrics, "stage": report.stage, "stage_step": stage_step}
        if not self._manager.safe_log(data, report.step, record="eval" if report.is_evaluation else "train"):
            self._complain()

    def histograms(self, step: int, histograms: Histograms) -> None:
        self._manager.log_histograms(step, histograms)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        self._manager.log_table(name, columns, rows, step)

    def finish(self) -> None:
        if not self._manager.finish():
            status = self._manager.get_sync_status()
            raise RuntimeError(
                f"{status['pending']} records are not delivered yet ({status['last_error'] or 'no time'});"
                " they are kept, and sent when this run is resumed"
            )

    def status(self) -> dict[str, Any]:
        return self._manager.get_sync_status()

    def _complain(self) -> None:
        """The manager swallows failures; one that lasts is worth the one line that Trackers prints."""
        status = self._manager.get_sync_status()
        if status["refused"] or status["failures"] or status["connect_failures"]:
            raise RuntimeError(f"{status['last_error']} (records are kept, and sent when it works again)")


class Trackers:
    """One tracker out of several."""

    def __init__(self, jsonl: Tracker, others: Sequence[Tracker], say: Callable[[str], None]):
        self._jsonl = jsonl
        self._others = tuple(others)
        self._say = say
        self._failures = {tracker.name: 0 for tracker in others}
        self._last_error: dict[str, str] = {}

    @property
    def name(self) -> str:
        return "+".join(tracker.name for tracker in (self._jsonl, *self._others))

    def start(self, config: Mapping[str, Any], *, resumed_from_step: int | None) -> None:
        self._each(lambda tracker: tracker.start(config, resumed_from_step=resumed_from_step))

    def write(self, report: StepReport, stage_step: int) -> None:
        self._each(lambda tracker: tracker.write(report, stage_step))

    def histograms(self, step: int, histograms: Histograms) -> None:
        self._each(lambda tracker: tracker.histograms(step, histograms))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        self._each(lambda tracker: tracker.table(name, columns, rows, step))

    def finish(self) -> None:
        self._each(lambda tracker: tracker.finish())

    def status(self) -> dict[str, Any]:
        """Of each tracker by name, with how often it failed and why it did last."""
        others = {
            tracker.name: {
                "tracker_failures": self._failures[tracker.name],
                "tracker_last_error": self._last_error.get(tracker.name),
            }
            | tracker.status()
            for tracker in self._others
        }
        return {self._jsonl.name: self._jsonl.status()} | others

    def _each(self, action: Callable[[Tracker], None]) -> None:
        action(self._jsonl)
        for tracker in self._others:
            try:
                action(tracker)
            except Exception as error:
                self._failures[tracker.name] += 1
                self._last_error[tracker.name] = f"{type(error).__name__}: {error}"
                if self._failures[tracker.name] == 1:
                    self._say(f"tracking with {tracker.name} failed, training goes on: {error}")


def open_trackers(
    names: Sequence[str],
    run_dir: Path,
    *,
    resume_step: int,
    project: str,
    run_name: str,
    wandb_policy: WandbPolicy,
    say: Callable[[str], None],
) -> Trackers:
    """`resume_step`: the first step that will be written; 0 for a new training. `names` from jsonl,
    tensorboard, wandb and none; metrics.jsonl is written whatever they are."""
    unknown = set(names) - {"jsonl", "tensorboard", "wandb", "none"}
    if unknown:
        raise UserError(
            f"unknown tracker {sorted(unknown)[0]!r}",
            where="tracker",
            law="the trackers are jsonl, tensorboard, wandb and none",
            remedy="name one of them",
        )
    others: list[Tracker] = []
    if "tensorboard" in names:
        others.append(TensorBoardTracker(run_dir, resume_step))
    if "wandb" in names:
        others.append(WandbTracker(run_dir, project, run_name, wandb_policy))
    return Trackers(JsonlTracker(run_dir, resume_step), others, say)


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"the tracker {package} is not installed",
            where=f"tracker: [{package}]",
            law="a tracker that the recipe names is there before training starts",
            remedy=f"pip install 'grpo-mega[{package}]', or leave it out of `tracker`",
        )


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        escaped = (str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells)
        return "| " + " | ".join(escaped) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])
