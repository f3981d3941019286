"""metrics.jsonl whatever is configured; the other trackers get everything, and may fail without harm."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from grpo_mega.errors import UserError
from grpo_mega.monitor import trackers as trackers_module
from grpo_mega.monitor.jsonl import read_metrics
from grpo_mega.monitor.trackers import JsonlTracker, Trackers, open_trackers
from grpo_mega.types import StepReport

TRAINING = {"actor/loss": 0.5, "reward/mean": 0.25}
EVALUATION = {"eval_avg_test_pass_rate": 0.75, "pass@4": 1.0}
HISTOGRAM = {"ratio": ([1, 3], [0.0, 0.5, 1.0])}


class FailingTracker:
    name = "failing"

    def __init__(self):
        self.calls = 0

    def _fail(self, *arguments: object, **named: object) -> None:
        self.calls += 1
        raise ConnectionError(f"no answer to call {self.calls}")

    start = write = histograms = table = finish = _fail

    def status(self) -> dict[str, object]:
        return {"calls": self.calls}


def _open(
    names: tuple[str, ...], run_dir: Path, resume_step: int = 0, said: list[str] | None = None
) -> Trackers:
    return open_trackers(
        names,
        run_dir,
        resume_step=resume_step,
        project="tests",
        run_name="a run",
        wandb_policy="auto",
        say=(said if said is not None else []).append,
    )


def _train(trackers: Trackers, steps: range, *, resumed_from: int | None = None) -> None:
    trackers.start({"lr": 0.1}, resumed_from_step=resumed_from)
    for step in steps:
        trackers.write(StepReport(step, "grpo", TRAINING), step)
        if step % 2 == 0:
            trackers.write(StepReport(step, "grpo", EVALUATION, is_evaluation=True), step)
    trackers.histograms(steps[-1], HISTOGRAM)
    trackers.table("samples", ["prompt", "answer"], [["1+1", "2|3"], ["2+2", 4]], steps[-1])
    trackers.finish()


@pytest.mark.parametrize("names", [(), ("none",), ("jsonl",)])
def test_metrics_jsonl_is_always_written_and_alone_by_default(tmp_path, names):
    trackers = _open(names, tmp_path)
    _train(trackers, range(1, 4))
    assert [record.step for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert trackers.status() == {"jsonl": {"records": 4}}


def test_a_resume_repeats_no_line(tmp_path):
    _train(_open((), tmp_path), range(1, 6))
    _train(_open((), tmp_path, resume_step=4), range(4, 7), resumed_from=3)
    steps = [record.step for record in read_metrics(tmp_path / "metrics.jsonl") if "eval" not in str(record)]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_failing_tracker_never_raises_and_is_told_of_once(tmp_path):
    said, failing = [], FailingTracker()
    trackers = Trackers(JsonlTracker(tmp_path, 0), [failing], said.append)
    _train(trackers, range(1, 4))
    assert said == ["tracking with failing failed, training goes on: no answer to call 1"]
    assert failing.calls == 8  # start, 4 reports, histograms, table, finish: it is asked again each time
    assert trackers.status()["failing"] == {
        "tracker_failures": 8,
        "tracker_last_error": "ConnectionError: no answer to call 8",
        "calls": 8,
    }
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4


def test_a_failing_metrics_jsonl_ends_the_run(tmp_path):
    trackers = Trackers(JsonlTracker(tmp_path, 0), [], lambda text: None)
    trackers.finish()
    with pytest.raises(ValueError, match="closed file"):
        trackers.write(StepReport(1, "grpo", TRAINING), 1)


def test_an_unknown_name(tmp_path):
    with pytest.raises(UserError, match="unknown tracker 'mlflow'"):
        _open(("jsonl", "mlflow"), tmp_path)


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_names_its_remedy(tmp_path, monkeypatch, package):
    monkeypatch.setattr(trackers_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        _open((package,), tmp_path)
    assert f"pip install 'grpo-mega[{package}]'" in str(caught.value)


def test_nothing_is_imported_before_it_is_used(tmp_path):
    """A run that only writes metrics.jsonl does not pay for the others."""
    import subprocess

    code = (
        "import sys, pathlib; from grpo_mega.monitor.trackers import open_trackers;"
        "open_trackers(['none'], pathlib.Path(sys.argv[1]), resume_step=0, project='', run_name='',"
        " wandb_policy='auto', say=print);"
        "import grpo_mega.monitor.wandb_sync;"
        "print([name for name in ('wandb', 'tensorboard', 'torch') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def _tensorboard_scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_holds_numbers_histograms_and_tables(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _train(_open(("tensorboard",), tmp_path), range(1, 4))
    folder = tmp_path / "tensorboard"
    assert _tensorboard_scalars(folder, "actor/loss") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert _tensorboard_scalars(folder, "eval_avg_test_pass_rate") == [(2, 0.75)]
    events = EventAccumulator(str(folder))
    events.Reload()
    (histogram,) = events.Histograms("ratio")
    assert histogram.step == 3
    # 1 value in the middle of [0, .5] and 3 in the middle of [.5, 1]: .25 + 3 * .75 = 2.5
    assert (histogram.histogram_value.num, histogram.histogram_value.sum) == (4, 2.5)
    (table,) = events.Tensors("samples/text_summary")
    assert b"| 1+1 | 2\\|3 |" in table.tensor_proto.string_val[0]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    _train(_open(("tensorboard",), tmp_path), range(1, 6))
    _train(_open(("tensorboard",), tmp_path, resume_step=4), range(4, 8), resumed_from=3)
    steps = [step for step, _ in _tensorboard_scalars(tmp_path / "tensorboard", "actor/loss")]
    assert steps == [1, 2, 3, 4, 5, 6, 7]


@pytest.fixture
def wandb_of_its_own():
    """wandb keeps what it read from the environment until it is torn down."""
    wandb = pytest.importorskip("wandb")
    yield
    wandb.teardown()


def test_wandb_keeps_training_and_evaluation_of_one_step_apart(tmp_path, monkeypatch, wandb_of_its_own):
    from tests import wandb_files

    monkeypatch.setenv("WANDB_MODE", "offline")
    said: list[str] = []
    trackers = _open(("jsonl", "wandb"), tmp_path, said=said)
    _train(trackers, range(1, 4))
    rows = wandb_files.all_rows(tmp_path)
    assert [(row["_trainer_step"], row["_record"]) for row in rows] == [
        (1, "train"),
        (2, "train"),
        (2, "eval"),
        (3, "train"),
        (3, "histograms"),
        (3, "table/samples"),
    ]
    assert rows[2]["pass@4"] == 1.0
    assert said == []
    status = trackers.status()["wandb"]
    assert (status["delivered"], status["pending"], status["tracker_failures"]) == (6, 0, 0)
    json.dumps(trackers.status())  # for a command that prints it


def test_wandb_that_cannot_be_reached_is_told_of_once(tmp_path, monkeypatch, wandb_of_its_own):
    from grpo_mega.monitor import wandb_delivery

    for name, value in {"WANDB_MODE": "online", "WANDB_API_KEY": "too short"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(wandb_delivery, "RECONNECT_SECONDS", 0.01)
    said: list[str] = []
    trackers = _open(("wandb",), tmp_path, said=said)
    _train(trackers, range(1, 4))
    assert len(said) == 1
    assert "training goes on" in said[0]
    assert trackers.status()["wandb"]["pending"] == 6
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4
