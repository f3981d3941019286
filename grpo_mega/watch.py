"""The guard at work in a run: what it finds is said and kept, and what stops the run is explained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpo_mega.drift import describe, keep_for_replay, worst_of_all_ranks, write_diagnosis
from grpo_mega.errors import UserError
from grpo_mega.journal import Journal
from grpo_mega.monitor.health import RESUME_ADVICE, Caps, Guard, GuardState
from grpo_mega.parts import Parts
from grpo_mega.steps import PolicyStep

REPLAYS = 5
"""Skipped updates kept on disk: more of the same teach nothing."""


class Watch:
    """watch.look(step, policy_step) after every policy step: returns the guard's metrics, or stops the
    run."""

    def __init__(self, parts: Parts, journal: Journal, state: Mapping[str, Any] | None):
        self._parts, self._journal = parts, journal
        rewards = parts.recipe.reward
        normalised = all(item.weight >= 0 for item in rewards) and sum(item.weight for item in rewards) <= 1
        known = all(item.name in ("exact", "contains", "regex", "number", "math", "code") for item in rewards)
        self._guard = Guard(
            parts.recipe.guard,
            normalised_rewards=normalised and known,
            state=GuardState.from_json(state) if state else None,
        )

    @property
    def caps(self) -> Caps:
        return self._guard.caps

    @property
    def state(self) -> dict[str, Any]:
        return self._guard.state.to_json()

    def look(self, step: int, made: PolicyStep) -> Mapping[str, float]:
        verdict = self._guard.observe(step, made.metrics)
        if made.skipped is not None and self._guard.state.skipped <= REPLAYS:
            folder = self._parts.run_dir / "replay"
            keep_for_replay(folder, step, self._parts.layout.rank, made.skipped.batches)
        for finding in verdict.findings:
            self._journal.alarm(step, finding)
        self._journal.alarms(list(self._guard.state.alarms))
        if verdict.intervention is not None:
            self._journal.say(f"guard: autopilot at step {step}: {verdict.intervention}")
            self._journal.event("intervention", step, verdict.intervention)
        if verdict.stop is not None:
            self._explain(step, made, verdict.stop)
        return verdict.metrics

    def _explain(self, step: int, made: PolicyStep, why: str) -> None:
        """Stops all ranks: each knows the same."""
        suspects = worst_of_all_ranks(made.suspects)
        tokenizer: Any = self._parts.inputs.tokenizer
        lines = describe(suspects, lambda token: str(tokenizer.decode([token])))
        if self._parts.is_lead:
            path = write_diagnosis(self._parts.run_dir, step, why, suspects, RESUME_ADVICE)
            self._journal.event("stop", step, why, diagnosis=path.name)
        raise UserError(
            f"the guard stopped the run: {why}\n{lines}",
            where=f"{self._parts.run_dir / 'diagnosis.json'}",
            law="a drift above guard.stop_above ends a run, and so do guard.nonfinite_limit updates in a row "
            "that are not finite",
            remedy=RESUME_ADVICE,
        )
