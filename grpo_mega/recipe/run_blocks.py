"""The blocks of a recipe about the run itself: evaluation, checkpoints, trackers, the guard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, create_model, model_validator

from grpo_mega.block import Block, NotNegative, Positive

TrackerName = Literal["jsonl", "tensorboard", "wandb", "none"]


class EvalBlock(Block):
    every: NotNegative = 25
    """Steps between evaluations; 0 = only at the end of each stage."""
    samples: NotNegative = 256
    """Held-out problems used; 0 = all."""
    at_start: bool = True
    pass_at: tuple[Positive, ...] = (1,)
    """pass@k for these k; max(k) samples of each problem are drawn."""
    temperature: float = Field(default=1.0, ge=0.0)
    """1: what a sampler sees; 0: greedy."""
    table_rows: NotNegative = 8
    """Samples shown in the trackers' table at each evaluation."""


if TYPE_CHECKING:
    _Async = Block
else:
    # `async` is what users call it, and a word of Python, which a class body cannot hold.
    _written = "Written by another process while training goes on."
    _Async = create_model(
        "_Async", __base__=Block, **{"async": (bool, Field(default=True, description=_written))}
    )


class CheckpointBlock(_Async):
    every: NotNegative = 50
    """Steps between checkpoints; 0 = only at the end of each stage."""
    keep: Positive = 3
    """The newest this many stay on disk."""
    keep_best: bool = True
    """The one with the highest held-out pass rate stays as well."""

    @property
    def background(self) -> bool:
        return bool(getattr(self, "async"))


class WandbBlock(Block):
    """Of tracker wandb. WANDB_PROJECT, WANDB_RUN_ID, WANDB_DIR and WANDB_MODE count where they are set."""

    project: str = "grpo_mega"
    resume: Literal["auto", "resume", "new"] = "auto"
    """What a resumed run writes to. auto: a new W&B run, grouped with the one it goes on from; resume: the
    same one; new: one that is linked to nothing."""


class GuardTier(Block):
    """What is done when the drift exceeds `above`; null leaves a number as it is."""

    above: float = Field(gt=0)
    lr: float | None = Field(default=None, gt=0)
    """The learning rate is at most this."""
    kl_coef: float | None = Field(default=None, ge=0)
    """loss.kl.coef is at least this."""
    clip: float | None = Field(default=None, gt=0, lt=1)
    """Both sides of the clip are at most this."""


GUARD_TIERS = (
    GuardTier(above=5.0, lr=1e-6, kl_coef=0.5),
    GuardTier(above=10.0, lr=5e-7, kl_coef=1.0, clip=0.1),
)


class GuardBlock(Block):
    """Watches the drift D: the 99.9th percentile of |log-prob now - log-prob when sampled| (and against the
    reference, where there is one; the worse counts)."""

    autopilot: bool = False
    """true: the guard acts; false: it only says what it would do."""
    level: Literal["token", "sequence"] = "token"
    """sequence: |sum over the sequence|, for trajectories of fixed length."""
    tiers: tuple[GuardTier, ...] = GUARD_TIERS
    """From mild to severe; D is smoothed over smooth_steps."""
    stop_above: float | None = Field(default=20.0, gt=0)
    """Beyond it the run stops, at once, with a diagnosis, autopilot or not; null = never."""
    smooth_steps: Positive = 3
    probe_tokens: NotNegative = 4096
    """Tokens of each rank's samples whose log-probs are computed once more after the update: what one update
    changed shows here first. 0 = off."""
    nonfinite_limit: Positive = 3
    """Updates in a row skipped for a loss or gradient that is not finite; then the run stops."""
    length_corr: float | None = Field(default=0.7, gt=0, le=1)
    """Alarm when the correlation of reward and response length stays beyond this, in one direction, for
    length_window steps: the reward may be one for length. null = never."""
    length_window: Positive = 20
    hang_minutes: float = Field(default=30.0, ge=0)
    """A rank that finishes no step, evaluation or checkpoint for so long leaves its stack in logs/stacks and
    ends with exit code 85: start me again. 0 = never."""

    @model_validator(mode="after")
    def tiers_rise_to_the_stop(self) -> GuardBlock:
        bounds = [tier.above for tier in self.tiers]
        bounds += [self.stop_above] if self.stop_above is not None else []
        if bounds != sorted(set(bounds)):
            raise ValueError(
                f"guard.tiers and guard.stop_above must rise, from the mildest on: they are {bounds}"
            )
        return self
