"""What happened to a run, read from its folder alone: no torch, and whatever lies there, no exception.

    for check in Examination(run).checks(): ...

How a run that is not finished came to its end is told by its files: the guard and a scheduler that wants its
machine back leave an event; a crash leaves nothing but the silence after the last line of metrics.jsonl.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from grpo_mega.checkpoints import (
    BEST,
    LATEST,
    MANIFEST,
    PARTIAL,
    complete_checkpoints,
    faults,
    read_pointer,
    read_state,
)
from grpo_mega.doctor_check import (
    Check,
    Level,
    Progress,
    json_object,
    lines_of,
    read_progress,
    scalar,
    size_of,
    when,
)
from grpo_mega.errors import UserError
from grpo_mega.monitor.health import RESUME_ADVICE
from grpo_mega.monitor.jsonl import EVENTS_FILE, METRICS_FILE
from grpo_mega.monitor.wandb_ledger import BACKUP_FOLDER, STATE_FILE
from grpo_mega.recipe import Recipe, load_recipe

RECIPE_FILE, DIAGNOSIS_FILE, REPLAY_FOLDER = "recipe.yaml", "diagnosis.json", "replay"
WANDB_FOLDERS = (".", "wandb_sync")
WANDB_KEYS = ("last_wire_step", "run_id", "project")
TOKEN_KEYS = ("uid", "position", "token_id", "sampler", "trainer")
EVENTS_SHOWN = TOKENS_SHOWN = LINES_SHOWN = 5
QUIET_SECONDS = 120.0
QUIET_STEPS = 10.0
"""A run that wrote nothing for longer than both is not alive: so many seconds, so many of its steps."""

Ending = Literal["finished", "stopped by the guard", "preempted", "perhaps running", "ended early", "no run"]


class Examination:
    """checks() in the order a person asks: what is it, how far did it come, why did it end, what goes on."""

    def __init__(self, run: Path):
        self._run = run
        self._recipe: Recipe | None = None
        self._moved = False
        self._progress = Progress()
        self._events: list[dict[str, Any]] = []
        self._complete: list[Path] = []
        self._sound: list[Path] = []
        self._damaged: list[str] = []
        self.ending: Ending = "no run"
        self.command: str | None = None

    def checks(self) -> Iterator[Check]:
        looks: tuple[tuple[str, Callable[[], Iterator[Check]]], ...] = (
            ("recipe", self._look_at_recipe),
            ("metrics", self._look_at_metrics),
            ("events", self._look_at_events),
            ("end", self._look_at_end),
            ("guard", self._look_at_guard),
            ("diagnosis", self._look_at_diagnosis),
            ("replay", self._look_at_replay),
            ("checkpoints", self._look_at_checkpoints),
            ("pointers", self._look_at_pointers),
            ("leftovers", self._look_at_leftovers),
            ("wandb", self._look_at_wandb),
            ("next", self._look_ahead),
        )
        for name, look in looks:
            try:
                yield from look()
            except UserError as error:
                yield Check("PROBLEM", name, error.what, error.remedy)
            except Exception as error:  # a doctor that falls ill of what it examines helps nobody
                yield Check(
                    "PROBLEM",
                    name,
                    f"cannot be examined: {type(error).__name__}: {error}",
                    f"look at the files in {self._run} and their permissions",
                )

    @property
    def _checkpoints(self) -> Path:
        return self._run / "checkpoints"

    def _look_at_recipe(self) -> Iterator[Check]:
        path = self._run / RECIPE_FILE
        if not path.is_file():
            remedy = "give the run.dir of a run that was started"
            yield Check("PROBLEM", "recipe", f"{self._run} holds no {RECIPE_FILE}", remedy)
            return
        try:
            recipe = load_recipe(path).recipe
        except UserError as error:
            place = f" ({error.where})" if error.where else ""
            remedy = error.remedy or "correct it, or write it again from the recipe the run was started with"
            yield Check("PROBLEM", "recipe", f"{error.what}{place}", remedy)
            return
        self._recipe = recipe
        self._moved = recipe.run.dir.resolve() != self._run.resolve()
        stages = ", ".join(f"{stage.kind} {steps} steps" for stage, steps in self._stages())
        layout = f"{recipe.parallel.world_size} rank(s)"
        facts = {"run": recipe.run.name, "stages": [[s.kind, n] for s, n in self._stages()]}
        moved = f"; it says run.dir {recipe.run.dir}, so the folder was moved" if self._moved else ""
        yield Check("ok", "recipe", f"{recipe.run.name}: {stages}, {layout}{moved}", facts=facts)

    def _stages(self) -> list[tuple[Any, int]]:
        """Each with its steps."""
        if self._recipe is None:
            return []
        cap = self._recipe.train.steps
        return [(s, s.body.steps if cap is None else min(s.body.steps, cap)) for s in self._recipe.stages]

    def _look_at_metrics(self) -> Iterator[Check]:
        path = self._run / METRICS_FILE
        if not path.is_file():
            yield Check("note", "metrics", f"no {METRICS_FILE}: the run ended before its first step")
            return
        progress = self._progress = read_progress(path)
        if progress.damaged:
            shown = ", ".join(map(str, progress.damaged[:LINES_SHOWN]))
            count = len(progress.damaged)
            yield Check(
                "PROBLEM",
                "metrics",
                f"{METRICS_FILE} has {count} line(s) that are no record of a step: {shown}"
                + (", ..." if count > LINES_SHOWN else ""),
                "remove those lines; the rest of the file stays usable",
                {"damaged_lines": progress.damaged[:1000]},
            )
        if progress.torn:
            text = f"the last line of {METRICS_FILE} is cut short: the run was writing it when it ended"
            yield Check("note", "metrics", f"{text}; --resume removes it", facts={"torn": True})
        if progress.step is None:
            yield Check("note", "metrics", f"{METRICS_FILE} holds no step", facts={"step": None})
            return
        total = sum(steps for _, steps in self._stages())
        of_total = f" of {total}" if total else ""
        place = f"step {progress.step}{of_total} ({progress.stage}, its step {progress.stage_step})"
        facts = {"step": progress.step, "total": total or None, "time": progress.time}
        yield Check("ok", "metrics", f"last: {place}, {when(progress.time)}", facts=facts)

    def _look_at_events(self) -> Iterator[Check]:
        path = self._run / EVENTS_FILE
        if not path.is_file():
            return
        damaged = []
        for line, fields, whole in lines_of(path):
            if fields is not None and isinstance(fields.get("kind"), str):
                self._events.append(fields)
            elif whole:
                damaged.append(line)
        if damaged:
            shown = ", ".join(map(str, damaged[:LINES_SHOWN]))
            remedy = "remove those lines: --resume reads the file, and stops at them"
            yield Check("PROBLEM", "events", f"{EVENTS_FILE} has lines that are no event: {shown}", remedy)
        for event in self._events[-EVENTS_SHOWN:]:
            facts = {key: scalar(event.get(key)) for key in ("kind", "step", "time", "message")}
            yield Check("ok", "event", _told(event), facts=facts)

    def _look_at_end(self) -> Iterator[Check]:
        self.ending = self._how_it_ended()
        progress, facts = self._progress, {"ending": self.ending}
        match self.ending:
            case "finished":
                yield Check("ok", "end", "finished: every step is done and hf/ holds the model", facts=facts)
            case "stopped by the guard":
                yield Check("PROBLEM", "end", f"the guard stopped it: {self._last('stop')}", facts=facts)
            case "preempted":
                text = f"it saved and left on {self._last('preempted')}, to be started again"
                yield Check("note", "end", text, facts=facts)
            case "perhaps running":
                text = f"not finished; its last line is from {when(progress.time)}: it may be running"
                yield Check("note", "end", text, facts=facts)
            case "ended early":
                missing = "" if self._steps_left() else "; every step is done, and hf/ is not whole"
                text = f"not finished, and no event says why: it was killed, or crashed{missing}"
                yield Check("note", "end", text, facts=facts)
            case "no run":
                yield Check("note", "end", "no step was done", facts=facts)

    def _how_it_ended(self) -> Ending:
        kinds = [event["kind"] for event in self._events]
        began = max((i for i, kind in enumerate(kinds) if kind in ("resume", "stage")), default=-1)
        since = kinds[began + 1 :]
        if "stop" in since:
            return "stopped by the guard"
        if "preempted" in since:
            return "preempted"
        exported = (self._run / "hf" / "config.json").is_file() and any(
            (self._run / "hf").glob("*.safetensors")
        )
        if exported and self._recipe is not None and not self._steps_left():
            return "finished"
        if self._progress.step is None:
            return "no run"
        quiet = max(QUIET_SECONDS, QUIET_STEPS * self._progress.step_seconds)
        return "perhaps running" if 0 <= time.time() - self._progress.time < quiet else "ended early"

    def _steps_left(self) -> bool:
        return (self._progress.step or 0) < sum(steps for _, steps in self._stages())

    def _last(self, kind: str) -> str:
        return next(str(e.get("message")) for e in reversed(self._events) if e["kind"] == kind)

    def _look_at_guard(self) -> Iterator[Check]:
        alarms = [event for event in self._events if event["kind"] == "alarm"]
        count = self._progress.alarms
        if count or alarms:
            # an alarm that goes off leaves no event: the newest ones are those that may still be on
            newest = alarms[-count:] if count else alarms[-1:]
            text = "; ".join(
                f"{e.get('message')} (since step {e.get('since', e.get('step'))})" for e in newest
            )
            changes = ", ".join(dict.fromkeys(str(e["change"]) for e in newest if e.get("change")))
            on = (
                f"{count} on at the last step"
                if count
                else f"none on at the last step, {len(alarms)} before it"
            )
            facts = {"on": count, "raised": len(alarms)}
            yield Check("note", "alarms", f"{on}: {text}", changes if count and changes else None, facts)
        done = [event for event in self._events if event["kind"] == "intervention"]
        if done:
            text = "; ".join(f"step {e.get('step')}: {e.get('message')}" for e in done[-EVENTS_SHOWN:])
            yield Check(
                "note", "autopilot", f"{len(done)} intervention(s): {text}", facts={"count": len(done)}
            )

    def _look_at_diagnosis(self) -> Iterator[Check]:
        path = self._run / DIAGNOSIS_FILE
        if not path.is_file():
            return
        found = json_object(path)
        if found is None:
            yield Check("note", "diagnosis", f"{DIAGNOSIS_FILE} cannot be read", "look at it in an editor")
            return
        stopped = self.ending == "stopped by the guard"
        why = f"step {found.get('step')}: {found.get('why')}" + ("" if stopped else " (of an earlier start)")
        facts = {key: scalar(found.get(key)) for key in ("step", "why", "advice")}
        yield Check("note", "diagnosis", why, str(found.get("advice") or RESUME_ADVICE), facts)
        tokens = found.get("tokens")
        for token in tokens[:TOKENS_SHOWN] if isinstance(tokens, list) else []:
            if isinstance(token, dict):
                facts = {key: scalar(token.get(key)) for key in TOKEN_KEYS}
                yield Check("note", "diagnosis", _suspect(token), facts=facts)

    def _look_at_replay(self) -> Iterator[Check]:
        folder = self._run / REPLAY_FOLDER
        files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
        if files:
            names = ", ".join(path.name for path in files[:LINES_SHOWN]) + (", ..." if len(files) > 5 else "")
            text = f"{len(files)} batch file(s) of updates that were skipped ({size_of(files)}): {names}"
            facts = {"files": [path.name for path in files]}
            yield Check("note", "replay", text, f"torch.load reads them from {folder}", facts)

    def _look_at_checkpoints(self) -> Iterator[Check]:
        self._complete = complete = complete_checkpoints(self._checkpoints)
        reference = self._checkpoints / "reference"
        for folder in [*complete, *([reference] if (reference / MANIFEST).is_file() else [])]:
            found = faults(folder)
            state = ""
            if folder is not reference and not found:
                try:
                    saved = read_state(folder)
                    state = f", stage {saved.stage_index + 1}, its step {saved.stage_step}"
                    state += "" if saved.pass_rate is None else f", held-out pass rate {saved.pass_rate:.3f}"
                except UserError as error:
                    found = [error.what]
            facts = {"folder": folder.name, "faults": found}
            if found:
                self._damaged += found
                remedy = "restore the files from a copy; --resume passes over a damaged checkpoint"
                for fault in found:
                    yield Check("PROBLEM", "checkpoint", fault, remedy, facts)
            else:
                self._sound += [] if folder is reference else [folder]
                size = size_of(path for path in folder.iterdir() if path.is_file())
                yield Check("ok", "checkpoint", f"{folder.name} is whole ({size}{state})", facts=facts)
        if not complete:
            level: Level = "note" if self.ending in ("no run", "perhaps running") else "PROBLEM"
            remedy = "--resume starts the run again from its beginning" if level == "PROBLEM" else None
            yield Check(level, "checkpoints", "none is complete", remedy)

    def _look_at_pointers(self) -> Iterator[Check]:
        names = {folder.name for folder in self._complete}
        for pointer in (LATEST, BEST):
            path = self._checkpoints / pointer
            if not path.exists():
                continue
            named = read_pointer(self._checkpoints, pointer)
            facts = {"pointer": pointer, "names": named}
            if named in names:
                yield Check("ok", pointer, f"is {named}", facts=facts)
                continue
            what = "names no checkpoint" if named is None else f"names {named}, which is not complete"
            then = "the newest checkpoint is taken" if pointer == LATEST else "a later one takes its place"
            yield Check("PROBLEM", pointer, f"{pointer} {what}", f"remove {path}: {then}", facts)

    def _look_at_leftovers(self) -> Iterator[Check]:
        folder = self._checkpoints
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        whole = {path.name for path in self._complete} | {LATEST, BEST, "reference"}
        left = [path for path in inside if path.name not in whole]
        left += sorted(path for path in self._run.iterdir() if path.name.endswith(".draft"))
        for path in left:
            why = {
                PARTIAL: "a checkpoint that was being written",
                ".old": "a checkpoint that was being replaced",
                ".new": "a pointer that was being written",
                ".draft": "a file that was being written",
            }.get(path.suffix, "no complete checkpoint")
            if self.ending == "perhaps running":
                yield Check("note", "leftover", f"{path.name}: {why}")
            else:
                yield Check("note", "leftover", f"{path.name}: {why}; nothing reads it", "it may be removed")

    def _look_at_wandb(self) -> Iterator[Check]:
        for folder in (self._run / name for name in WANDB_FOLDERS):
            state, backups = folder / STATE_FILE, folder / BACKUP_FOLDER
            if not (state.is_file() or backups.is_dir()):
                continue
            owed = sorted(backups.glob("step_*.json")) if backups.is_dir() else []
            bad = [path.name for path in owed if json_object(path) is None]
            found = json_object(state) if state.is_file() else {}
            if found is None or bad:
                what = f"cannot be read: {STATE_FILE if found is None else ', '.join(bad[:LINES_SHOWN])}"
                remedy = "restore or remove it: until then a resumed run logs nothing to wandb"
                yield Check("PROBLEM", "wandb", what, remedy, {"damaged": bad})
                continue
            steps = f"last wire step {found.get('last_wire_step')}, run {found.get('run_id')}"
            facts = {"pending": len(owed)} | {key: scalar(found.get(key)) for key in WANDB_KEYS}
            if owed:
                text = f"{len(owed)} record(s) not yet delivered ({steps})"
                yield Check("note", "wandb", text, "they are sent when the run is resumed", facts)
            else:
                yield Check("ok", "wandb", f"every record is delivered ({steps})", facts=facts)

    def _look_ahead(self) -> Iterator[Check]:
        if self.ending == "finished":
            text = f"nothing is left to do; measure it: grpo-mega eval {_quoted(self._run)}"
            yield Check("ok", "next", text)
            return
        if not (self._run / RECIPE_FILE).is_file():
            return
        words = ["grpo-mega", "train", _quoted(self._run / RECIPE_FILE), "--resume"]
        words += [f"run.dir={_quoted(self._run)}"] if self._moved else []
        if self.ending == "stopped by the guard":
            words += _settings(RESUME_ADVICE)
        self.command = " ".join(words)
        facts = {"command": self.command}
        if self._recipe is None:
            yield Check("note", "next", f"correct {RECIPE_FILE}, then: {self.command}", facts=facts)
        elif self._damaged and not self._sound:
            whole = self.command.replace(" --resume", " --overwrite")
            remedy = f"restore one from a copy, then {self.command}; or lose the run: {whole}"
            yield Check("PROBLEM", "next", "no sound checkpoint is left to go on from", remedy, facts)
        else:
            start = self._sound[-1].name if self._sound else "its beginning"
            first = "once it has ended, " if self.ending == "perhaps running" else ""
            advice = f" ({RESUME_ADVICE})" if self.ending == "stopped by the guard" else ""
            yield Check("note", "next", f"{first}goes on from {start}: {self.command}{advice}", facts=facts)


def _told(event: Mapping[str, Any]) -> str:
    return f"step {event.get('step')}: {event['kind']}: {event.get('message')}, {when(event.get('time'))}"


def _suspect(token: Mapping[str, Any]) -> str:
    place = f"sample {token.get('uid')}, response token {token.get('position')} (id {token.get('token_id')})"
    return f"{place}: log-prob {token.get('sampler')} when sampled, {token.get('trainer')} now"


def _settings(advice: str) -> list[str]:
    """The key=value words of an advice."""
    return re.findall(r"[a-z_]+(?:\.[a-z_]+)+=[0-9][0-9.e+-]*[0-9]", advice)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
