"""Rows of any benchmark as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import rich.console
import rich.table
import torch


def table(rows: Sequence[Any], title: str) -> None:
    """A column for each field of the rows."""
    shown = rich.table.Table(title=title)
    for field in fields(rows[0]):
        shown.add_column(field.name.replace("_", " "), justify="left" if field.type == "str" else "right")
    for row in rows:
        shown.add_row(*(_cell(value) for value in asdict(row).values()))
    rich.console.Console().print(shown)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(rows: Sequence[Any], title: str, directory: Path) -> list[Path]:
    """TITLE.json with the rows and where they were measured, TITLE.png with the times as bars."""
    directory.mkdir(parents=True, exist_ok=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }
    data = directory / f"{title}.json"
    data.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    picture = directory / f"{title}.png"
    _draw(rows, title, picture)
    return [data, picture]


def _draw(rows: Sequence[Any], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [row.variant for row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(rows) + 1.5))
    axes.barh(names, [row.total_ms for row in rows], color="#4477aa")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds, forward and backward")
    axes.set_title(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
