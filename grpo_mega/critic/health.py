"""Is the critic well? Bands of its metrics, and a remedy for each way of leaving them.

Every rank holds the same object and feeds it the same metrics, so that all decide alike without asking. With
autopilot a remedy is applied when its symptom begins and undone when the metric is back in its band; without,
it is only said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from grpo_mega.monitor.health import Band, Finding, outside
from grpo_mega.recipe.critic_block import CriticHealth

WATCHED = (
    "critic/d_acc",
    "critic/score_diff",
    "critic/grad_norm",
    "critic/identical_gap",
    "critic/teacher_wins",
    "critic/score_length_corr",
)
"""What is remembered of each step."""

BANDS = (
    Band(
        "critic/d_acc",
        0.65,
        0.85,
        "too sure a critic rewards noise, too unsure a one rewards nothing",
        "aim at 0.70 to 0.80 with critic.temperature",
    ),
    Band(
        "critic/score_diff",
        1.0,
        5.0,
        "the reward's scale follows it",
        "look at critic.batch_norm and critic.score_reg",
    ),
    Band(
        "critic/grad_norm",
        1.0,
        5.0,
        "the critic stands still, or jumps",
        "change critic.lr or critic.grad_clip",
    ),
    Band(
        "critic/identical_gap",
        0.0,
        0.5,
        "the same text is scored differently: something other than the answer is",
        "compare token ids in logs/critic_scoring_details",
    ),
    Band(
        "critic/teacher_wins",
        0.0,
        0.8,
        "a student that hardly ever wins learns from differences among its failures alone",
        "warm the policy up longer, or raise critic.temperature",
    ),
)
"""Over a whole window."""
LENGTH_BAND = Band(
    "critic/score_length_corr",
    -1.0,
    1.0,
    "the score goes by length: the policy will learn length",
    "compare the lengths of the two sides with tools/analyze_data_quality.py; critic.length_mix off",
)
"""As wide as `critic.health.length_corr` says."""


@dataclass(frozen=True, slots=True)
class Remedies:
    """What is done differently; null: as the recipe says."""

    temperature: float | None = None
    lr_at_most: float | None = None
    lr_factor: float = 1.0
    grad_clip: float | None = None
    batch_norm: bool | None = None

    def lr(self, planned: float) -> float:
        raised = planned * self.lr_factor
        return raised if self.lr_at_most is None else min(raised, self.lr_at_most)

    def with_other(self, other: Remedies) -> Remedies:
        """Both; where both speak of one number, the other wins."""
        own = {name: value for name, value in asdict(other).items() if value != getattr(NOTHING, name)}
        return replace(self, **own)

    def __str__(self) -> str:
        parts = {
            "temperature": self.temperature,
            "lr <=": self.lr_at_most,
            "lr x": self.lr_factor if self.lr_factor != 1.0 else None,
            "grad_clip": self.grad_clip,
            "batch_norm": self.batch_norm,
        }
        return ", ".join(f"{name} {value}" for name, value in parts.items() if value is not None) or "nothing"


NOTHING = Remedies()


@dataclass(frozen=True, slots=True)
class Symptom:
    """Begins beyond `begins`, in the direction away from `ends`, and is over on that side of `ends`, the edge
    of the metric's band."""

    name: str
    metric: str
    begins: float
    ends: float
    matters: str
    advice: str
    remedies: Remedies = NOTHING

    def holds(self, value: float, *, was_on: bool) -> bool:
        bound = self.ends if was_on else self.begins
        return value > bound if self.begins > self.ends else value < bound


SYMPTOMS = (
    Symptom(
        "too sure",
        "critic/d_acc",
        begins=0.90,
        ends=0.85,
        matters="a critic that is always right gives a flat reward, or rewards one surface feature",
        advice="temperature to 7; run tools/analyze_data_quality.py on the data",
        remedies=Remedies(temperature=7.0),
    ),
    Symptom(
        "unsure",
        "critic/d_acc",
        begins=0.60,
        ends=0.65,
        matters="the reward is close to chance",
        advice="temperature to 3, batch norm off; check that teacher and student answers differ",
        remedies=Remedies(temperature=3.0, batch_norm=False),
    ),
    Symptom(
        "steep",
        "critic/grad_norm",
        begins=10.0,
        ends=5.0,
        matters="a few pairs rule the critic's update",
        advice="lr to at most 5e-6, clip 1.0; look for outliers in logs/critic_scoring_details",
        remedies=Remedies(lr_at_most=5e-6, grad_clip=1.0),
    ),
)
FLAT = "flat"
FLAT_RANGE, FLAT_BELOW, WEAK_GRADIENT = 0.05, 1.0, 0.5
"""score_diff is flat when it moves by less than this over a window, below its band; with a gradient weaker
than that the learning rate is too small."""
FASTER = Remedies(lr_factor=2.0)


@dataclass(frozen=True, slots=True)
class HealthState:
    """What a resumed run must know."""

    windows: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    active: Mapping[str, int] = field(default_factory=dict[str, int])  # symptom or metric -> since which step
    applied: Mapping[str, Remedies] = field(default_factory=dict[str, Remedies])  # by symptom
    interventions: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> HealthState:
        return cls(
            windows={name: tuple(values) for name, values in fields["windows"].items()},
            active=dict(fields["active"]),
            applied={name: Remedies(**given) for name, given in fields["applied"].items()},
            interventions=int(fields["interventions"]),
        )


@dataclass(frozen=True, slots=True)
class CriticVerdict:
    """What follows from one step."""

    findings: tuple[Finding, ...] = ()  # that are new
    applied: tuple[str, ...] = ()  # remedies that begin now, one line each
    undone: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])


class CriticHealthMonitor:
    """verdict = monitor.observe(step, metrics); then `monitor.remedies` are those of the next update, and
    `monitor.state` goes into checkpoints."""

    def __init__(self, block: CriticHealth, state: HealthState | None = None):
        self._block = block
        self.state = state or HealthState()

    @property
    def remedies(self) -> Remedies:
        """All that are applied, together; in the order in which their symptoms began."""
        total = NOTHING
        for remedies in self.state.applied.values():
            total = total.with_other(remedies)
        return total

    def observe(self, step: int, metrics: Mapping[str, float]) -> CriticVerdict:
        """The metrics of a critic update, as every rank has them."""
        before = self.state
        windows = {
            name: (*before.windows.get(name, ()), *((metrics[name],) if name in metrics else ()))[
                -self._block.window :
            ]
            for name in WATCHED
        }
        full = {name: values for name, values in windows.items() if len(values) == self._block.window}
        means = {name: sum(values) / len(values) for name, values in full.items()}
        found = [*self._symptoms(full, means), *self._outside(means)]
        active = {finding.name: before.active.get(finding.name, step) for finding, _ in found}
        new = tuple(replace(finding, since=step) for finding, _ in found if finding.name not in before.active)
        given = {finding.name: remedies for finding, remedies in found if remedies != NOTHING}
        applied = dict(before.applied)
        undone = tuple(name for name in applied if name not in active)
        for name in undone:
            del applied[name]
        begun = [name for name in given if self._block.autopilot and name not in applied]
        applied |= {name: given[name] for name in begun}
        self.state = HealthState(windows, active, applied, before.interventions + len(begun))
        return CriticVerdict(
            findings=new,
            applied=tuple(f"{name}: {given[name]}" for name in begun),
            undone=tuple(f"{name}: {before.applied[name]} is undone" for name in undone),
            metrics={
                "critic_health/alarms": float(len(active)),
                "critic_health/interventions": float(self.state.interventions),
            },
        )

    def _symptoms(
        self, full: Mapping[str, tuple[float, ...]], means: Mapping[str, float]
    ) -> list[tuple[Finding, Remedies]]:
        """Of windows that are full, and their means."""
        found = [
            (self._finding(symptom.name, symptom.metric, means[symptom.metric], symptom), symptom.remedies)
            for symptom in SYMPTOMS
            if symptom.metric in means
            and symptom.holds(means[symptom.metric], was_on=symptom.name in self.state.active)
        ]
        differences = full.get("critic/score_diff")
        if differences and self._is_flat(differences, means["critic/score_diff"]):
            weak = means.get("critic/grad_norm", WEAK_GRADIENT) < WEAK_GRADIENT
            remedies = self.state.applied.get(FLAT, FASTER if weak else NOTHING)
            found.append((self._flat(means["critic/score_diff"], weak=weak), remedies))
        return found

    def _is_flat(self, differences: tuple[float, ...], mean: float) -> bool:
        """Once flat, until the difference is in its band."""
        if mean >= FLAT_BELOW:
            return False
        return FLAT in self.state.active or max(differences) - min(differences) < FLAT_RANGE

    def _finding(self, name: str, metric: str, mean: float, symptom: Symptom) -> Finding:
        what = f"{metric} is {mean:.3g} over {self._block.window} steps"
        done = " (done)" if self._block.autopilot and symptom.remedies != NOTHING else ""
        return Finding(name, what, 0, symptom.matters, f"{symptom.advice}{done}")

    def _flat(self, mean: float, *, weak: bool) -> Finding:
        what = f"critic/score_diff stays at {mean:.3g} over {self._block.window} steps"
        advice = "check that critic.batch_norm is as it should be"
        if weak:
            done = " (done)" if self._block.autopilot else ""
            advice += f"; the gradient is weak: raise the critic's lr, by {FASTER.lr_factor:g}{done}"
        return Finding(FLAT, what, 0, "the critic learns nothing from its pairs", advice)

    def _outside(self, means: Mapping[str, float]) -> list[tuple[Finding, Remedies]]:
        bound = self._block.length_corr
        bands = (*BANDS, replace(LENGTH_BAND, low=-bound, high=bound))
        found = (outside(band, means, step=0) for band in bands)
        return [(finding, NOTHING) for finding in found if finding is not None]
