"""The numerical guard: it looks at every step's numbers, says what is wrong, and under autopilot does
something.

Every rank holds the same guard and feeds it the same reduced metrics, so that all decide alike without
asking.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from grpo_mega.recipe.run_blocks import GuardBlock, GuardTier

DRIFTS = ("guard/drift_behaviour", "guard/drift_reference", "guard/drift_probe")
"""The drift D of a step is the worst of these."""
RESUME_ADVICE = "resume from the last checkpoint with train.lr=1e-7 loss.kl.coef=2.0, or lower than both were"


@dataclass(frozen=True, slots=True)
class Band:
    """Where a number normally lies."""

    metric: str
    low: float
    high: float
    matters: str
    change: str


BANDS = (
    Band("actor/loss", -10, 10, "a few tokens rule the update", "lower train.lr, raise loss.kl.coef"),
    Band("actor/policy_loss", -1, 1, "ratios are far from 1", "lower train.lr or train.updates_per_batch"),
    Band(
        "actor/kl_penalty", -1, 1, "the policy leaves its reference", "raise loss.kl.coef or lower train.lr"
    ),
    Band(
        "actor/mean_ratio", 0.5, 2, "samples no longer come from this policy", "fewer train.updates_per_batch"
    ),
)
NORMALISED_BANDS = (
    Band("reward/mean", 0, 1, "a reward left the range it is defined on", "check the reward's own metrics"),
    Band("reward/std", 0, 0.5, "a reward left the range it is defined on", "check the reward's own metrics"),
)
"""Only where every reward lies between 0 and 1."""
FLAT_GROUPS = Band(
    "group/zero_std_fraction",
    0,
    0.95,
    "nearly every group earned the same: nothing is learned",
    "easier or harder problems (a curriculum), a higher rollout.temperature, or a larger rollout.group_size",
)


@dataclass(frozen=True, slots=True)
class Caps:
    """What the guard has taken into its hands; null: nothing."""

    lr: float | None = None
    kl_coef: float | None = None
    clip: float | None = None

    def tightened(self, tier: GuardTier) -> Caps:
        """Each number at least as strict as the tier's."""
        return Caps(
            lr=_stricter(min, self.lr, tier.lr),
            kl_coef=_stricter(max, self.kl_coef, tier.kl_coef),
            clip=_stricter(min, self.clip, tier.clip),
        )

    def __str__(self) -> str:
        parts = (("lr <=", self.lr), ("kl_coef >=", self.kl_coef), ("clip <=", self.clip))
        return ", ".join(f"{name} {value:g}" for name, value in parts if value is not None) or "nothing"


def _stricter(choose: Any, own: float | None, other: float | None) -> float | None:
    known = [value for value in (own, other) if value is not None]
    return choose(known) if known else None


@dataclass(frozen=True, slots=True)
class GuardState:
    """What a resumed run must know."""

    drifts: tuple[float, ...] = ()  # of the last steps, the newest last
    tier: int = 0  # the highest reached so far; 0: none
    skipped: int = 0  # updates in a row that were not finite
    interventions: int = 0
    alarms: Mapping[str, int] = field(default_factory=dict[str, int])  # name -> the step it began
    length_corrs: tuple[float, ...] = ()  # of reward and length, of the last steps that had one
    caps: Caps = Caps()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "drifts": [str(value) for value in self.drifts]}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> GuardState:
        drifts = tuple(float(value) for value in fields["drifts"])
        corrs = tuple(fields.get("length_corrs", ()))  # older checkpoints have none
        known = {"drifts": drifts, "length_corrs": corrs, "caps": Caps(**fields["caps"])}
        return cls(**{**fields, **known})


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to tell: what, since when, why it matters, what to change."""

    name: str
    what: str
    since: int
    matters: str
    change: str

    def block(self) -> str:
        lines = (f"since:   step {self.since}", f"matters: {self.matters}", f"change:  {self.change}")
        return "\n  ".join([f"guard: {self.what}", *lines])


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from one step."""

    findings: tuple[Finding, ...] = ()  # that are new
    intervention: str | None = None
    stop: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])


class Guard:
    """verdict = guard.observe(step, metrics); then `guard.caps` holds, and `guard.state` goes into
    checkpoints."""

    def __init__(self, block: GuardBlock, *, normalised_rewards: bool, state: GuardState | None = None):
        self._block = block
        self._bands = (*BANDS, FLAT_GROUPS, *(NORMALISED_BANDS if normalised_rewards else ()))
        self._stop_above = math.inf if block.stop_above is None else block.stop_above
        self.state = state or GuardState()

    @property
    def caps(self) -> Caps:
        return self.state.caps

    def observe(self, step: int, metrics: Mapping[str, float]) -> Verdict:
        """The metrics of a policy step, as every rank has them."""
        block, before = self._block, self.state
        now = max((_size(metrics[name]) for name in DRIFTS if name in metrics), default=0.0)
        drifts = (*before.drifts, now)[-block.smooth_steps :]
        mean = sum(drifts) / len(drifts)
        drift = max(now, mean) if now > self._stop_above else mean  # one such step is enough
        tier = sum(drift > tier.above for tier in block.tiers)
        skipped = before.skipped + 1 if metrics.get("actor/update_skipped") else 0
        stop = self._stop(step, drift, skipped)

        findings = [finding for band in self._bands if (finding := outside(band, metrics, step))]
        corrs = before.length_corrs
        if "reward/length_corr" in metrics:
            corrs = (*corrs, metrics["reward/length_corr"])[-block.length_window :]
        if (biased := self._by_length(corrs, step)) is not None:
            findings.append(biased)
        if tier or drift > self._stop_above:
            findings.append(self._drifting(drift, tier, step))
        if skipped:
            findings.append(_not_finite(skipped, block.nonfinite_limit, step))
        alarms = {finding.name: before.alarms.get(finding.name, step) for finding in findings}
        new = tuple(
            replace(finding, since=alarms[finding.name])
            for finding in findings
            if finding.name not in before.alarms or (finding.name == "drift" and tier > before.tier)
        )
        caps, intervention = before.caps, None
        if block.autopilot and tier > before.tier:
            for reached in block.tiers[:tier]:
                caps = caps.tightened(reached)
            intervention = f"drift {drift:.2f}: {caps}"
        self.state = GuardState(
            drifts=drifts,
            tier=max(tier, before.tier),
            skipped=skipped,
            interventions=before.interventions + (intervention is not None),
            alarms=alarms,
            length_corrs=corrs,
            caps=caps,
        )
        return Verdict(new, intervention, stop, self._metrics(drift))

    def _stop(self, step: int, drift: float, skipped: int) -> str | None:
        if skipped >= self._block.nonfinite_limit:
            return f"{skipped} updates in a row were not finite, the last at step {step}"
        if drift > self._stop_above:
            return f"the policy's log-probs drifted by {drift:.2f} at step {step}"
        return None

    def _drifting(self, drift: float, tier: int, step: int) -> Finding:
        reached = self._block.tiers[:tier]
        caps = Caps()
        for entry in reached:
            caps = caps.tightened(entry)
        change = f"{caps}" if drift <= self._stop_above else f"stop; {RESUME_ADVICE}"
        bound = max([entry.above for entry in reached], default=self._stop_above)
        return Finding(
            "drift",
            f"log-probs drifted by {drift:.2f} (99.9th percentile), above {bound:g}",
            step,
            "an update moved the policy further than its samples can tell about",
            f"{change}{' (done)' if self._block.autopilot else ''}",
        )

    def _by_length(self, corrs: tuple[float, ...], step: int) -> Finding | None:
        """Whether reward and length went together, or apart, at every step of a whole window."""
        bound, window = self._block.length_corr, self._block.length_window
        if bound is None or len(corrs) < window or not (min(corrs) > bound or max(corrs) < -bound):
            return None
        return Finding(
            "length",
            f"reward and response length correlate by {sum(corrs) / window:+.2f} over {window} steps",
            step,
            "a policy learns length from such a reward, whatever else it is meant for",
            "look at the longest and the shortest samples; add reward format with its length rules",
        )

    def _metrics(self, drift: float) -> dict[str, float]:
        return {
            "guard/drift": drift,
            "guard/tier": float(self.state.tier),
            "guard/alarms": float(len(self.state.alarms)),
            "guard/interventions": float(self.state.interventions),
        }


def _size(value: float) -> float:
    return math.inf if math.isnan(value) else value


def outside(band: Band, metrics: Mapping[str, float], step: int) -> Finding | None:
    value = metrics.get(band.metric)
    if value is None or band.low <= value <= band.high:
        return None
    what = f"{band.metric} is {value:.4g}, outside {band.low:g} to {band.high:g}"
    return Finding(band.metric, what, step, band.matters, band.change)


def _not_finite(skipped: int, limit: int, step: int) -> Finding:
    return Finding(
        "not finite",
        f"loss or gradient is not finite, no weight moved ({skipped} of {limit} in a row stop the run)",
        step,
        "the batch taught nothing; it is kept under replay/",
        "lower train.lr; look at the batch in replay/",
    )
