"""curves.png is drawn from whatever a run has measured so far."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from grpo_mega.errors import UserError
from grpo_mega.monitor.jsonl import MetricsWriter
from grpo_mega.monitor.report import draw_curves
from grpo_mega.types import StepReport


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures drawn, so that a test can look at lines instead of pixels."""
    seen: list[Figure] = []
    save = Figure.savefig

    def remember(figure: Figure, *args: object, **kwargs: object) -> None:
        seen.append(figure)
        save(figure, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", remember)
    return seen


def write_run(run_dir: Path) -> None:
    writer = MetricsWriter(run_dir)
    writer.write(StepReport(step=0, stage="sft", metrics={"eval_avg_test_pass_rate": 0.1}), 0)
    for step in range(1, 4):
        writer.write(
            StepReport(step=step, stage="sft", metrics={"sft/loss": 1.0, "actor/grad_norm": 2.0}), step
        )
    for step in range(4, 7):
        metrics = {"reward/mean": 0.5, "actor/loss": math.nan if step == 5 else 0.1, "actor/grad_norm": 1.0}
        writer.write(StepReport(step=step, stage="grpo", metrics=metrics), step - 3)
    writer.write(StepReport(step=6, stage="grpo", metrics={"eval_avg_test_pass_rate": 0.4}), 3)
    writer.close()


def test_only_panels_with_data_are_drawn_with_their_stages(tmp_path: Path, figures: list[Figure]):
    write_run(tmp_path)
    path = draw_curves(tmp_path)
    assert path == tmp_path / "curves.png" and imread(path).shape[0] > 300
    (figure,) = figures
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(panels) == [
        "held-out pass rate",
        "reward (mean)",
        "supervised loss",
        "policy loss",
        "gradient norm (before clipping)",
    ]
    assert [text.get_text() for text in panels["reward (mean)"].texts] == ["sft", "grpo"]
    held_out = panels["held-out pass rate"].lines[0]
    assert (np.asarray(held_out.get_xdata()).tolist(), np.asarray(held_out.get_ydata()).tolist()) == (
        [0, 6],
        [0.1, 0.4],
    )
    assert [
        np.asarray(line.get_xdata()).tolist() for line in panels["gradient norm (before clipping)"].lines
    ] == [
        [1, 2, 3],
        [4, 5, 6],
    ]


def test_two_stages_of_one_name_are_two_bands(tmp_path: Path, figures: list[Figure]):
    writer = MetricsWriter(tmp_path)
    for step in range(4):
        writer.write(StepReport(step=step, stage="grpo", metrics={"reward/mean": 0.5}), step % 2)
    writer.close()
    draw_curves(tmp_path)
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.texts] == ["grpo", "grpo"]
    assert axes.get_xlim() == (-0.5, 3.5)


def test_a_long_curve_is_smoothed_around_gaps(tmp_path: Path, figures: list[Figure]):
    writer = MetricsWriter(tmp_path)
    for step in range(100):
        value = math.nan if step == 50 else float(step % 2)
        writer.write(StepReport(step=step, stage="grpo", metrics={"reward/mean": value}), step)
    writer.close()
    draw_curves(tmp_path)
    raw, smoothed = figures[0].axes[0].lines
    assert np.isnan(np.asarray(raw.get_ydata())[50])
    assert np.all(np.abs(np.asarray(smoothed.get_ydata()) - 0.5) <= 0.3)  # of 0 and 1 in turn


def test_a_run_without_metrics_is_a_user_error(tmp_path: Path):
    with pytest.raises(UserError, match="holds no metrics"):
        draw_curves(tmp_path)
