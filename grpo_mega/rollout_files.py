"""What `grpo-mega train` was told to do with its samples, and what it then refuses. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from grpo_mega.errors import UserError
from grpo_mega.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class RolloutFiles:
    """Example: RolloutFiles(dump=Path("rollouts")), RolloutFiles(replay=Path("rollouts"))"""

    dump: Path | None = None  # keep each step's samples here
    replay: Path | None = None  # train on those kept here, and sample nothing
    only: bool = False  # sample, score and keep, and train nothing

    def check(self, recipe: Recipe, *, resume: bool) -> None:
        """All that can be said before a process starts."""
        if self.replay and (self.dump or self.only):
            raise UserError(
                "--replay-rollouts samples nothing",
                where="--dump-rollouts" if self.dump else "--rollout-only",
                law="samples are either made or read",
                remedy="leave one of the two out",
            )
        if self.only and not self.dump:
            raise UserError(
                "--rollout-only would throw its samples away",
                where="--rollout-only",
                law="samples that are not trained on are kept",
                remedy="say where: --dump-rollouts DIR",
            )
        if self.replay and not any(self.replay.glob("stage_*_step_??????")):
            raise UserError(
                f"{self.replay} holds no rollouts",
                where="--replay-rollouts",
                law="a replay reads the folder that --dump-rollouts wrote",
                remedy="correct the path, or run with --dump-rollouts first",
            )
        if self.dump and not resume and any(self.dump.glob("stage_*_step_*")):
            raise UserError(
                f"{self.dump} holds rollouts already",
                where="--dump-rollouts",
                law="the samples of one run lie in one folder",
                remedy="name a new folder, or remove that one; --resume goes on with it",
            )
        self._check_stages(recipe)

    def _check_stages(self, recipe: Recipe) -> None:
        if (self.replay or self.only) and recipe.curriculum.kind != "none":
            raise UserError(
                "a curriculum chooses problems by evaluations, and nothing is evaluated here",
                where="--replay-rollouts" if self.replay else "--rollout-only",
                law="the prompts of a step follow from the recipe and the step alone",
                remedy="set curriculum.kind=none",
            )
        if self.only and any(stage.has_critic for stage in recipe.stages):
            raise UserError(
                "a discriminator is trained, and its score is part of the reward",
                where="--rollout-only",
                law="nothing is trained",
                remedy="remove the warmup and adversarial stages, and the reward discriminator",
            )
        rollout = recipe.rollout
        if (self.dump or self.replay) and (rollout.dynamic_sampling is not None or rollout.max_staleness):
            raise UserError(
                "a step trains on groups of other steps too",
                where="rollout.dynamic_sampling" if rollout.dynamic_sampling else "rollout.max_staleness",
                law="the prompts of a step that is kept follow from the recipe and the step alone",
                remedy="set rollout.dynamic_sampling=null and rollout.max_staleness=0",
            )
        samples = any(stage.samples_groups or stage.has_critic for stage in recipe.stages)
        if (self.dump or self.replay) and not samples:
            raise UserError(
                "no stage of this recipe samples",
                where="stages",
                law="rollouts are those of grpo, warmup and adversarial stages",
                remedy="leave the option out, or add such a stage",
            )
