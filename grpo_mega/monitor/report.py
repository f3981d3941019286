"""curves.png: how a run went, in one picture drawn from its metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

from grpo_mega.errors import UserError
from grpo_mega.monitor.console import HELD_OUT_METRIC
from grpo_mega.monitor.jsonl import METRICS_FILE, MetricsRecord, read_metrics

CURVES_FILE = "curves.png"

_COLUMNS = 2
_PANEL_INCHES = (6.2, 2.9)
_STAGE_COLOURS = ("#dbe7f4", "#f6e6d2", "#e0efdc", "#ecdff0")
_LINE_COLOURS = ("#1f5a94", "#b3541e", "#3c7a3c")
_MARKED_UP_TO = 40  # points: more would run into each other
_SMOOTHED_FROM = 60  # points: fewer are readable as they are
_SMOOTHING_SHARE = 0.04  # of all points: the window of the moving average


@dataclass(frozen=True)
class _Panel:
    title: str
    metrics: tuple[str, ...]
    is_share: bool = False  # between 0 and 1


_PANELS = (
    _Panel("held-out pass rate", (HELD_OUT_METRIC,), is_share=True),
    _Panel("reward (mean)", ("reward/mean",)),
    _Panel("supervised loss", ("sft/loss",)),
    _Panel("policy loss", ("actor/loss",)),
    _Panel("KL penalty", ("actor/kl_penalty",)),
    _Panel("entropy (nats per token)", ("sft/entropy", "actor/entropy")),
    _Panel("gradient norm (before clipping)", ("actor/grad_norm",)),
    _Panel("tokens per second", ("perf/tokens_per_second",)),
)


@dataclass(frozen=True)
class _Stage:
    """Consecutive records of one stage, and what it is called."""

    name: str
    records: list[MetricsRecord]

    @property
    def first(self) -> int:
        return self.records[0].step

    @property
    def last(self) -> int:
        return max(record.step for record in self.records)


@dataclass(frozen=True)
class _Curve:
    """One metric over one stage: stages measure different things, and a line across them would lie."""

    metric: str
    steps: list[int]
    values: list[float]


def draw_curves(run_dir: Path) -> Path:
    """Draw what the run has measured so far; returns the picture's path."""
    records = read_metrics(run_dir / METRICS_FILE)
    stages = _stages_of(records)
    panels = [(panel, curves) for panel in _PANELS if (curves := _curves_of(panel, stages))]
    if not panels:
        raise UserError(
            f"{run_dir} holds no metrics to draw",
            where=str(run_dir / METRICS_FILE),
            remedy="give the directory of a run that has made at least one step",
        )
    # Without pyplot: it would look for a display and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / _COLUMNS)
    columns = min(_COLUMNS, len(panels))
    figure = Figure(figsize=(_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(run_dir.resolve().name, fontsize=13, fontweight="bold")
    for position, (panel, curves) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, position)
        _draw_panel(axes, panel, curves)
        _shade_stages(axes, stages)
    target = run_dir / CURVES_FILE
    figure.savefig(target, dpi=110)
    return target


def _stages_of(records: Sequence[MetricsRecord]) -> list[_Stage]:
    """Two stages of one name are told apart by stage_step starting again."""
    stages: list[_Stage] = []
    for record in records:
        before = stages[-1].records[-1] if stages else None
        if before is None or record.stage != before.stage or record.stage_step < before.stage_step:
            stages.append(_Stage(record.stage, []))
        stages[-1].records.append(record)
    return stages


def _curves_of(panel: _Panel, stages: Sequence[_Stage]) -> list[_Curve]:
    # Held-out problems are the same in every stage: there the line does go on.
    parts = [[record for stage in stages for record in stage.records]] if panel.is_share else None
    curves = []
    for metric in panel.metrics:
        for records in parts or [stage.records for stage in stages]:
            points = [(record.step, record.metrics[metric]) for record in records if metric in record.metrics]
            if any(math.isfinite(value) for _, value in points):
                curves.append(_Curve(metric, [step for step, _ in points], [value for _, value in points]))
    return curves


def _draw_panel(axes: Any, panel: _Panel, curves: Sequence[_Curve]) -> None:
    drawn: set[str] = set()
    for curve in curves:
        colour = _LINE_COLOURS[panel.metrics.index(curve.metric) % len(_LINE_COLOURS)]
        count = len(curve.values)
        values = _smooth(curve.values) if count >= _SMOOTHED_FROM else curve.values
        if values is not curve.values:
            axes.plot(curve.steps, curve.values, color=colour, linewidth=0.8, alpha=0.3)
        marker = "o" if count <= _MARKED_UP_TO else None
        label = None if curve.metric in drawn else curve.metric
        axes.plot(
            curve.steps, values, color=colour, linewidth=1.7, marker=marker, markersize=3.5, label=label
        )
        drawn.add(curve.metric)
    axes.set_title(panel.title, fontsize=10, loc="left", pad=16)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="white", linewidth=1.0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if panel.is_share:
        axes.set_ylim(-0.03, 1.03)
    if len(drawn) > 1:
        axes.legend(fontsize=8, frameon=False)


def _shade_stages(axes: Any, stages: Sequence[_Stage]) -> None:
    """Backgrounds that meet halfway between stages, each with its name above."""
    edges = [stages[0].first - 0.5]
    edges += [(left.last + right.first) / 2 for left, right in pairwise(stages)]
    edges.append(stages[-1].last + 0.5)
    for stage, left, right, colour in zip(stages, edges, edges[1:], cycle(_STAGE_COLOURS), strict=False):
        axes.axvspan(left, right, color=colour, linewidth=0, zorder=0)
        axes.annotate(
            stage.name,
            ((left + right) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color="#555555",
        )
    axes.set_xlim(edges[0], edges[-1])


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average over the finite neighbours."""
    reach = max(1, round(len(values) * _SMOOTHING_SHARE / 2))
    smoothed = []
    for place in range(len(values)):
        near = [v for v in values[max(0, place - reach) : place + reach + 1] if math.isfinite(v)]
        smoothed.append(sum(near) / len(near) if near else math.nan)
    return smoothed
