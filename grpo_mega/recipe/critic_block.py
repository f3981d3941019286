"""The critic of a recipe: a discriminator that tells a teacher's answers from the policy's, or the value
model of PPO."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from grpo_mega.block import Block, NotNegative, Positive

PresetName = Literal["gad", "warmup_2026_01", "before_fix"]

PRESETS: Mapping[PresetName, Mapping[str, Any]] = MappingProxyType(
    {
        # The plain Bradley-Terry loss softplus(-(T - S)).
        "gad": {"temperature": 1.0, "batch_norm": False, "score_reg": {"weight": 0.0}},
        # What the defaults are; written down, so that a recipe of it stays itself when they move.
        "warmup_2026_01": {
            "temperature": 5.0,
            "adaptive_temperature": "off",
            "batch_norm": True,
            "margin": 0.0,
            "score_reg": {"threshold": 3.0, "weight": 0.01},
            "label_smoothing": 0.0,
            "score": "last",
            "length_mix": False,
        },
        # To reproduce old curves: a moving temperature, hardly any regularisation, and no batch norm: with it
        # differences stay in their band under these settings too (docs/benchmarks.md).
        "before_fix": {
            "temperature": 2.0,
            "adaptive_temperature": "ema",
            "batch_norm": False,
            "score_reg": {"threshold": 5.0, "weight": 0.001},
        },
    }
)


def _as_pair(given: Any) -> Any:
    """A preset is laid under the keys before they are typed: a file's list is a list then, and no tuple."""
    return tuple(cast("list[Any]", given)) if isinstance(given, list) else given


Bounds = Annotated[tuple[float, float], BeforeValidator(_as_pair)]


class ScoreRange(Block):
    """Where the scores of each side may lie; null: within +-threshold."""

    teacher: Bounds | None = None
    student: Bounds | None = None

    @model_validator(mode="after")
    def ranges_go_upwards(self) -> ScoreRange:
        for side, bounds in (("teacher", self.teacher), ("student", self.student)):
            if bounds is not None and bounds[0] >= bounds[1]:
                raise ValueError(f"{side} is [low, high]: {bounds[0]:g} is not below {bounds[1]:g}")
        return self


class ScoreReg(Block):
    """Draws scores back: weight * (mean of squares beyond the range over teachers + the same over students).
    Only the difference of two scores earns anything, and nothing else would hold their size."""

    threshold: float = Field(default=3.0, gt=0)
    """Scores, as the value head gives them, beyond +- this are drawn back."""
    weight: float = Field(default=0.01, ge=0)
    range: ScoreRange = ScoreRange()
    """Another range of one side or both."""


class AdaptiveRule(Block):
    """adaptive_temperature: tau = clamp(offset + slope * d, low, high)."""

    offset: float = 1.0
    slope: float = Field(default=0.6, ge=0)
    low: float = Field(default=1.0, gt=0)
    high: float = Field(default=7.0, gt=0)
    decay: float = Field(default=0.9, ge=0, lt=1)
    """ema: d = decay * d + (1 - decay) * mean |difference| of the batch; the first batch's mean starts it."""

    @model_validator(mode="after")
    def low_is_below_high(self) -> AdaptiveRule:
        if self.low > self.high:
            raise ValueError(f"low ({self.low:g}) is above high ({self.high:g})")
        return self


class CriticAudit(Block):
    """The same metrics on a set of pairs that never changes, as critic_audit/*."""

    pairs: NotNegative = 64
    """Pairs of the set, drawn once; 0 = no audit."""
    every: Positive = 10
    """Steps between audits."""


class CriticHealth(Block):
    """Bands of the critic's metrics; outside them a remedy is offered, or applied."""

    autopilot: bool = False
    """true: remedies are applied, and undone when the metric is back in its band; false: only said."""
    window: Positive = 10
    """Steps whose mean is looked at."""
    length_corr: float = Field(default=0.7, gt=0, le=1)
    """Band of the correlation between score and length, to both sides of 0."""


class CriticBlock(Block):
    kind: Literal["none", "discriminator", "value"] = "none"
    """discriminator: scores whole answers, learnt from pairs of a teacher's and the policy's; its score is a
    reward. value: the value of every token, for generalised advantages."""
    preset: PresetName | None = None
    """Known settings of the loss; keys given beside it win."""
    init: Literal["policy", "initial"] = "policy"
    """What a critic without `hf` starts from. policy: the policy as its first stage with a critic begins,
    which has learnt what answers look like; initial: the model that the policy started from."""
    hf: str | None = None
    """A model for the critic to start from instead: a Hugging Face directory (or a name in the local cache)
    with the policy's tokenizer."""
    head_std: float = Field(default=0.02, ge=0)
    """Of the normal numbers a fresh value head starts from; its bias is 0."""

    lr: float = Field(default=1e-6, gt=0)
    """Constant; Adam's other numbers are those of train."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of the critic's own optimizer."""
    grad_clip: float = Field(default=0.2, gt=0)
    """Global gradient norm of the critic's update."""
    critic_warmup_steps: NotNegative = 0
    """In exactly this many first steps of an adversarial stage, or under value of a grpo stage, only the
    critic is updated."""

    temperature: float = Field(default=5.0, gt=0)
    """tau of the ranking loss softplus(-(difference - margin) / tau)."""
    adaptive_temperature: Literal["off", "ema", "batch"] = "off"
    """tau follows the mean |difference|: its moving average, or each batch's own."""
    adaptive: AdaptiveRule = AdaptiveRule()
    batch_norm: bool = True
    """Differences are divided by the std of all scores of the step, both sides, all ranks: their mean is then
    at most 2."""
    margin: float = 0.0
    """The difference that counts as no preference."""
    score_reg: ScoreReg = ScoreReg()
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs taken to be the other way round."""
    score: Literal["last", "mean"] = "last"
    """last: the value at the last token that is not the end-of-sequence; mean: over all such tokens."""
    length_mix: bool = False
    """.7 score + .3 score / length, as once used: a bias towards short answers."""
    ranking_weight: float = Field(default=1.0, ge=0)
    """Times the ranking loss."""
    gap_penalty: float = Field(default=0.0, ge=0)
    """Times the mean of what a difference has beyond gap_max."""
    gap_max: float = Field(default=5.0, gt=0)
    """Of the difference as the ranking sees it, normalised under batch_norm."""

    audit: CriticAudit = CriticAudit()
    health: CriticHealth = CriticHealth()
    details_every: NotNegative = 0
    """Steps between files in logs/critic_scoring_details; 0 = none."""
    details_pairs: Positive = 32
    """Pairs shown in each of them."""

    gamma: float = Field(default=1.0, gt=0, le=1)
    """value: discount of a later reward, per token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """value: lambda of the generalised advantage."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """value: a value may move this far from the one before the update; null = any distance."""

    @model_validator(mode="before")
    @classmethod
    def a_preset_gives_what_is_not_given(cls, given: Any) -> Any:
        """Laid under the keys that are written down, before they are typed: `model_fields_set` then holds the
        preset's keys as well, and a dumped block reads back as itself."""
        if not isinstance(given, Mapping):
            return given
        keys = cast("Mapping[str, Any]", given)
        preset = PRESETS.get(keys.get("preset"))  # type: ignore[arg-type]  # its type refuses other names
        return dict(keys) if preset is None else _laid_under(preset, keys)

    @model_validator(mode="after")
    def only_a_discriminator_has_presets(self) -> CriticBlock:
        if self.preset is not None and self.kind != "discriminator":
            raise ValueError(
                f"preset {self.preset} is of a discriminator's loss: set kind to discriminator (it is "
                f"{self.kind}), or remove preset"
            )
        return self

    @model_validator(mode="after")
    def only_a_critic_warms_up(self) -> CriticBlock:
        if self.critic_warmup_steps and self.kind == "none":
            raise ValueError(
                f"critic_warmup_steps ({self.critic_warmup_steps}) needs a critic: set kind, or remove it"
            )
        return self

    @model_validator(mode="after")
    def something_ranks(self) -> CriticBlock:
        if self.kind == "discriminator" and self.ranking_weight == 0 and self.gap_penalty == 0:
            raise ValueError(
                "ranking_weight 0 and gap_penalty 0 leave nothing that prefers a teacher: set one above 0"
            )
        return self

    @model_validator(mode="after")
    def batch_norm_bounds_the_margin(self) -> CriticBlock:
        """All teachers at one score, all students at another: the pooled std is half their distance."""
        if self.kind == "discriminator" and self.batch_norm and self.margin >= MAX_NORMALISED:
            raise ValueError(
                f"margin ({self.margin:g}) must be below {MAX_NORMALISED:g} under batch_norm, where no mean "
                "difference is larger: lower it, or set batch_norm to false"
            )
        return self


MAX_NORMALISED = 2.0
"""The largest mean of normalised differences: all teachers at t, all students at s have std |t - s| / 2."""


def _laid_under(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of both: the upper ones win, block by block."""
    merged = dict(above)
    for key, value in below.items():
        own = above.get(key)
        if key not in above:
            merged[key] = value
        elif isinstance(value, Mapping) and isinstance(own, Mapping):
            merged[key] = _laid_under(cast("Mapping[str, Any]", value), cast("Mapping[str, Any]", own))
    return merged
