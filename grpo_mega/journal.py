"""What a run tells and keeps: console, trackers, events. Rank 0 speaks; on the others every call does
nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grpo_mega.critic.health import CriticVerdict
from grpo_mega.evaluation import Evaluation
from grpo_mega.monitor import histogram
from grpo_mega.monitor.console import Console
from grpo_mega.monitor.health import Finding
from grpo_mega.monitor.jsonl import EventsWriter
from grpo_mega.monitor.trackers import Trackers, open_trackers
from grpo_mega.parts import Parts
from grpo_mega.types import StepReport

DRAWN = {
    "reward/distribution": "reward",
    "actor/log_ratio_p99": "log_ratio",
    "guard/drift_probe": "log_ratio_after_update",
}
"""Which bin counts are drawn, and as what."""
SAMPLE_COLUMNS = ("uid", "prompt", "response", "answer", "reward", "pass_rate")


class Journal:
    """journal.step(report, stage_step); journal.evaluation(...); journal.event(...); journal.close()"""

    def __init__(self, parts: Parts, *, resumed_from: int | None):
        recipe = parts.recipe
        self._console: Console = parts.console
        self._events = EventsWriter(parts.run_dir) if parts.is_lead else None
        self._trackers: Trackers | None = None
        if parts.is_lead:
            self._trackers = open_trackers(
                recipe.tracker,
                parts.run_dir,
                resume_step=0 if resumed_from is None else resumed_from + 1,
                project=recipe.wandb.project,
                run_name=recipe.run.name,
                wandb_policy=recipe.wandb.resume,
                say=parts.console.say,
            )
            self._trackers.start(recipe.model_dump(mode="json"), resumed_from_step=resumed_from)

    def say(self, text: str) -> None:
        self._console.say(text)

    def step(self, report: StepReport, stage_step: int, lines: list[str]) -> None:
        """`lines`: of each step, for logs to be searched."""
        self._console.step(report)
        for line in lines:
            self._console.detail(line)
        if self._trackers:
            self._trackers.write(report, stage_step)

    def histograms(self, step: int, counts: Mapping[str, Sequence[float]]) -> None:
        if self._trackers and counts:
            shown = {DRAWN[name]: histogram.by_octave(bins) for name, bins in counts.items() if name in DRAWN}
            self._trackers.histograms(step, shown)

    def evaluation(self, report: StepReport, stage_step: int, evaluation: Evaluation) -> None:
        self._console.evaluation(report)
        if self._trackers:
            self._trackers.write(report, stage_step)
            if evaluation.samples:
                rows = [[getattr(sample, name) for name in SAMPLE_COLUMNS] for sample in evaluation.samples]
                self._trackers.table("samples", SAMPLE_COLUMNS, rows, report.step)

    def alarm(self, step: int, finding: Finding) -> None:
        self._console.say(finding.block())
        self.event("alarm", step, finding.what, since=finding.since, change=finding.change)

    def critic_verdict(self, step: int, verdict: CriticVerdict) -> None:
        """`step` counts the critic's updates."""
        for finding in verdict.findings:
            self._console.say(finding.block().replace("guard:", "critic:", 1))
            self.event("critic alarm", step, finding.what, since=finding.since, change=finding.change)
        for line in (*verdict.applied, *verdict.undone):
            self._console.say(f"critic: autopilot at its step {step}: {line}")
            self.event("critic intervention", step, line)

    def alarms(self, names: Sequence[str]) -> None:
        self._console.alarms(names)

    def event(self, kind: str, step: int, message: str, **fields: Any) -> None:
        if self._events:
            self._events.write(kind, step, message, **fields)

    def close(self) -> None:
        if self._trackers:
            self._trackers.finish()
        if self._events:
            self._events.close()
