"""The stages of a recipe: what is learnt, one after the other, by the same models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from grpo_mega.block import Block, NotNegative, Positive

Schedule = Literal["constant", "linear", "cosine"]
StageKind = Literal["sft", "seqkd", "grpo", "warmup", "adversarial"]


class Until(Block):
    """Ends a stage early: when a metric has lain in a band for some steps in a row."""

    metric: str
    """Its name in metrics.jsonl, such as critic/d_acc."""
    low: float | None = None
    high: float | None = None
    steps: Positive = 5

    @model_validator(mode="after")
    def a_band_has_an_end(self) -> Until:
        if self.low is None and self.high is None:
            raise ValueError("until needs low, high or both: without them any value ends the stage")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"until.low ({self.low:g}) is above until.high ({self.high:g})")
        return self

    def holds(self, value: float | None) -> bool:
        if value is None:
            return False
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


class StageBody(Block):
    """What every stage has."""

    steps: NotNegative = 100
    lr: float | None = Field(default=None, gt=0)
    """The policy's; null: train.lr."""
    warmup_steps: NotNegative | None = None
    """null: train.warmup_steps."""
    schedule: Schedule | None = None
    """null: train.schedule."""
    until: Until | None = None
    """null: the stage takes all its steps."""


class SftStage(StageBody):
    """Supervised learning of teacher_response: a warm-up, or distillation of a teacher's text (seqkd)."""

    batch_size: Positive = 128
    """Sequences in each update, over all ranks."""


class GrpoStage(StageBody):
    """Rollouts, group advantages, policy updates."""


class WarmupStage(StageBody):
    """The discriminator learns from pairs of a teacher's and the policy's answers."""

    student: Literal["frozen", "sft"] = "frozen"
    """sft: the policy learns the teachers' answers to the same prompts meanwhile."""
    samples: Positive = 1
    """The policy's answers to each prompt; each makes a pair."""


class AdversarialStage(StageBody):
    """GRPO whose reward is, in part or alone, the score of a discriminator that keeps learning."""


class Stage(Block):
    """One entry of `stages`: exactly one kind."""

    sft: SftStage | None = None
    seqkd: SftStage | None = None
    """The same as sft, named for what it is when the text is a teacher's."""
    grpo: GrpoStage | None = None
    warmup: WarmupStage | None = None
    adversarial: AdversarialStage | None = None

    @property
    def kind(self) -> StageKind:
        kinds: tuple[StageKind, ...] = ("sft", "seqkd", "grpo", "warmup", "adversarial")
        return next(kind for kind in kinds if getattr(self, kind) is not None)

    @property
    def body(self) -> SftStage | GrpoStage | WarmupStage | AdversarialStage:
        body = self.sft or self.seqkd or self.grpo or self.warmup or self.adversarial
        assert body is not None
        return body

    @property
    def supervised(self) -> SftStage | None:
        return self.sft or self.seqkd

    @property
    def samples_groups(self) -> bool:
        """Whether the policy learns from its own samples."""
        return self.grpo is not None or self.adversarial is not None

    @property
    def has_critic(self) -> bool:
        return self.warmup is not None or self.adversarial is not None

    @model_validator(mode="after")
    def exactly_one_kind(self) -> Stage:
        given = (self.sft, self.seqkd, self.grpo, self.warmup, self.adversarial)
        if sum(value is not None for value in given) != 1:
            raise ValueError("a stage is exactly one of sft, seqkd, grpo, warmup, adversarial")
        return self
