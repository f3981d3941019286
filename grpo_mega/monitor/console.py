"""What a person watching a run sees: a live bar on a terminal, plain lines in a pipe. Rank 0 only."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import rich.console
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.spinner import Spinner
from rich.text import Text

if TYPE_CHECKING:  # types.py imports torch, which a message does not need
    from grpo_mega.types import StepReport

HELD_OUT_METRIC = "eval_avg_test_pass_rate"
RECENT_STEPS = 20
"""Rate and time left come from this many recent steps: the first steps of a run say little about the rest."""
SECONDS_BETWEEN_LINES = 2.0
"""In a pipe, where a line for each fast step would drown everything else."""

_HEADLINES: dict[str, tuple[str, ...]] = {
    "loss": ("actor/loss", "sft/loss"),
    "reward": ("reward/mean",),
    "pass": ("reward/pass_rate",),
    "KL": ("actor/kl_penalty",),
    "clip": ("actor/clip_fraction",),
    "held-out": (HELD_OUT_METRIC,),
    "tok/s": ("perf/tokens_per_second",),
}


def print_error(text: str) -> None:
    """On stderr: `error:` in red on a terminal, plain in a pipe."""
    console = rich.console.Console(stderr=True)
    console.print(Text("error: ", style="bold red") + Text(text), soft_wrap=True)


def print_plain(text: str) -> None:
    """On stderr, exactly as it is."""
    print(text, file=sys.stderr, flush=True)


class Console:
    """The one place a run prints from.

    with console.phase("loading model"): ...
    with console.stage("grpo", total=100, start=0):
        console.step(report)            # after every step
        console.evaluation(report)      # after every evaluation
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        output: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`quiet` leaves out progress and phases; evaluations and messages stay."""
        self._output = output or rich.console.Console()
        self._clock = clock
        self._progress_wanted = not quiet
        self._silent = False
        self._stage: _Stage | None = None
        self._held_out: dict[str, float] = {}
        self._alarms: list[str] = []

    @classmethod
    def silent(cls) -> Console:
        """For ranks other than 0."""
        console = cls(quiet=True)
        console._silent = True
        return console

    @contextmanager
    def stage(self, name: str, total: int, start: int = 0) -> Iterator[None]:
        """`total` steps, of which `start` were done before (a resumed run)."""
        assert self._stage is None, "stages follow each other"
        live = self._progress_wanted and self._output.is_terminal
        self._stage = _Stage(name, total, start, self._clock, self._output if live else None)
        try:
            with self._stage:
                yield
        finally:
            self._stage = None

    def step(self, report: StepReport) -> None:
        assert self._stage is not None, "a step belongs to a stage"
        alarms = f" | alarm: {', '.join(self._alarms)}" if self._alarms else ""
        line = self._stage.advance(headlines({**self._held_out, **report.metrics}) + alarms)
        if line is not None and self._progress_wanted:
            self._print(line)

    def alarms(self, names: Sequence[str]) -> None:
        """What is wrong now, shown with every step until it is over."""
        self._alarms = list(names)

    def evaluation(self, report: StepReport) -> None:
        value = report.metrics.get(HELD_OUT_METRIC)
        if value is not None:
            self._held_out = {HELD_OUT_METRIC: value}
        extra = {name: number for name, number in report.metrics.items() if name.startswith("pass@")}
        shown = headlines(self._held_out) + "".join(
            f" | {name} {number:.3f}" for name, number in extra.items()
        )
        self._print(f"{report.stage} step {report.step}: evaluation | {shown or 'no held-out problems'}")

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Something without steps: a spinner on a terminal; in a pipe a line before, and one after when it
        took long."""
        if not self._progress_wanted:
            yield
            return
        began = self._clock()
        if self._stage is not None and self._stage.is_live:
            with self._stage.busy(text):
                yield
        elif self._output.is_terminal:
            with self._output.status(text):
                yield
        else:
            self._print(f"{text} ...")
            yield
        seconds = self._clock() - began
        if not self._output.is_terminal and seconds >= SECONDS_BETWEEN_LINES:
            self._print(f"{text}: done in {format_seconds(seconds)}")

    def say(self, text: str) -> None:
        self._print(text)

    def detail(self, text: str) -> None:
        """A line of every step: for logs to be searched; on a terminal it would drown the bar."""
        if self._progress_wanted and not self._output.is_terminal:
            self._print(text)

    def _print(self, text: str) -> None:
        if not self._silent:
            self._output.print(Text(text), soft_wrap=True)


class _Stage:
    """Progress of one stage: a bar when `output` is a terminal, else lines that the caller prints."""

    def __init__(
        self,
        name: str,
        total: int,
        start: int,
        clock: Callable[[], float],
        output: rich.console.Console | None,
    ):
        self._name, self._total, self._done, self._clock = name, total, start, clock
        self._step_times = deque([clock()], maxlen=RECENT_STEPS + 1)
        self._last_line_at: float | None = None
        self._details = Text("")
        self._busy: Spinner | None = None
        self._progress, self._task, self._live = None, TaskID(0), None
        if output is not None:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[pace]}"),
                console=output,
            )
            self._task = self._progress.add_task(name, total=total, completed=start, pace="")
            self._live = Live(get_renderable=self._picture, console=output, refresh_per_second=4)

    @property
    def is_live(self) -> bool:
        return self._live is not None

    def __enter__(self) -> None:
        if self._live is not None:
            self._live.start(refresh=True)

    def __exit__(self, *failure: object) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self, details: str) -> str | None:
        """Count one step; the line to print, if it is time for one."""
        self._done += 1
        self._step_times.append(self._clock())
        pace = self._pace()
        if self._progress is not None:
            self._details = Text("  " + details, style="dim", no_wrap=True, overflow="ellipsis")
            self._progress.update(self._task, completed=self._done, pace=pace)
            return None
        now = self._step_times[-1]
        due = self._last_line_at is None or now - self._last_line_at >= SECONDS_BETWEEN_LINES
        if not due and self._done < self._total:
            return None
        self._last_line_at = now
        return " | ".join(
            part for part in (f"{self._name} {self._done}/{self._total}", pace, details) if part
        )

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        self._busy = Spinner("dots", Text(text))
        try:
            yield
        finally:
            self._busy = None

    def _pace(self) -> str:
        seconds = (self._step_times[-1] - self._step_times[0]) / (len(self._step_times) - 1)
        rate = f"{1 / seconds:.1f} steps/s" if 0 < seconds < 1 else f"{seconds:.1f} s/step"
        return f"{rate} | {format_seconds(seconds * max(self._total - self._done, 0))} left"

    def _picture(self) -> Group:
        assert self._progress is not None
        return Group(*(part for part in (self._progress, self._details, self._busy) if part))


def headlines(metrics: Mapping[str, float]) -> str:
    """Example: "loss 0.1234 | reward 0.510 | held-out 0.480 | tok/s 5.2k" (those there are)."""
    shown = []
    for label, names in _HEADLINES.items():
        value = next((metrics[name] for name in names if name in metrics), None)
        if value is not None:
            shown.append(f"{label} {_format_number(label, value)}")
    return " | ".join(shown)


def _format_number(label: str, value: float) -> str:
    if label == "tok/s":
        return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"
    return f"{value:.4f}" if label == "loss" else f"{value:.3f}"


def format_seconds(seconds: float) -> str:
    """Example: 3.2 s, 4:05, 1:02:03"""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
