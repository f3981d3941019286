"""The recipe: its blocks, and the laws that hold between them. No torch here, so that editors, `plan` and
`--dry-run` are instant.

Validators are named for the law they hold. `recipes/recipe.schema.json` is generated from this.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from grpo_mega.block import Block, NotNegative
from grpo_mega.recipe.blocks import (
    AdvantageBlock,
    DataBlock,
    LossBlock,
    ModelBlock,
    ParallelBlock,
    RunBlock,
    TrainBlock,
)
from grpo_mega.recipe.critic_block import CriticBlock
from grpo_mega.recipe.curriculum_block import CurriculumBlock, check_curriculum, check_curriculum_hears
from grpo_mega.recipe.reward_blocks import RewardItem, RuleReward
from grpo_mega.recipe.rollout_block import RolloutBlock
from grpo_mega.recipe.run_blocks import CheckpointBlock, EvalBlock, GuardBlock, TrackerName, WandbBlock
from grpo_mega.recipe.stage_blocks import GrpoStage, Stage


class Recipe(Block):
    """One run."""

    run: RunBlock = RunBlock()
    seed: NotNegative = 0
    model: ModelBlock
    parallel: ParallelBlock = ParallelBlock()
    data: DataBlock = DataBlock()
    stages: tuple[Stage, ...] = Field(default=(Stage(grpo=GrpoStage()),), min_length=1)
    rollout: RolloutBlock = RolloutBlock()
    reward: tuple[RewardItem, ...] = (RewardItem(rule=RuleReward()),)
    advantage: AdvantageBlock = AdvantageBlock()
    loss: LossBlock = LossBlock()
    critic: CriticBlock = CriticBlock()
    train: TrainBlock = TrainBlock()
    eval: EvalBlock = EvalBlock()
    curriculum: CurriculumBlock = CurriculumBlock()
    checkpoint: CheckpointBlock = CheckpointBlock()
    guard: GuardBlock = GuardBlock()
    tracker: tuple[TrackerName, ...] = ("jsonl",)
    """metrics.jsonl is written whatever is named; none names nothing else."""
    wandb: WandbBlock = WandbBlock()

    @model_validator(mode="after")
    def a_value_model_reads_one_turn(self) -> Recipe:
        if self.rollout.generate is not None and self.critic.kind == "value":
            raise ValueError(
                "rollout.generate masks what the policy was told, and critic.kind value gives each token an "
                "advantage: take one of them"
            )
        return self

    @model_validator(mode="after")
    def updates_divide_groups(self) -> Recipe:
        if self.rollout.prompts_per_step % self.train.updates_per_batch:
            raise ValueError(
                f"train.updates_per_batch ({self.train.updates_per_batch}) must divide "
                f"rollout.prompts_per_step ({self.rollout.prompts_per_step}): groups stay whole"
            )
        return self

    @model_validator(mode="after")
    def generated_tasks_are_named(self) -> Recipe:
        generated = self.data.source in ("procedural", "reasoning_gym")
        if generated and self.data.task is None:
            raise ValueError(f"data.source {self.data.source} needs data.task")
        if not generated and not isinstance(self.data.train, Path):
            raise ValueError(f"data.source {self.data.source} needs data.train, the path of a file")
        return self

    @model_validator(mode="after")
    def heads_divide_over_tp(self) -> Recipe:
        scratch, tp = self.model.scratch, self.parallel.tp
        if scratch is not None and (scratch.heads % tp or scratch.kv_heads % tp):
            raise ValueError(
                f"model.scratch.heads ({scratch.heads}) and kv_heads ({scratch.kv_heads}) "
                f"must be multiples of parallel.tp ({tp})"
            )
        return self

    @model_validator(mode="after")
    def layers_divide_over_stages(self) -> Recipe:
        scratch, parts = self.model.scratch, self.parallel.pp * self.parallel.vpp
        if scratch is not None and scratch.layers % parts:
            raise ValueError(f"parallel.pp x vpp {parts} must divide model.scratch.layers {scratch.layers}")
        return self

    @model_validator(mode="after")
    def context_parallelism_is_local_attentions(self) -> Recipe:
        if self.parallel.cp > 1 and self.model.attention == "transformer_engine":
            raise ValueError(
                f"parallel.cp ({self.parallel.cp}) is computed by the local attention: "
                "model.attention must be local or auto"
            )
        return self

    @model_validator(mode="after")
    def dr_grpo_is_normalised_by_a_constant(self) -> Recipe:
        if self.advantage.estimator == "dr_grpo" and self.loss.aggregate != "seq-mean-token-sum-norm":
            raise ValueError(
                "advantage.estimator dr_grpo divides by a constant length: set loss.aggregate to "
                "seq-mean-token-sum-norm, or take grpo with advantage.normalize_std false"
            )
        return self

    @model_validator(mode="after")
    def stages_with_a_critic_have_one(self) -> Recipe:
        needs = next((stage.kind for stage in self.stages if stage.has_critic), None)
        kind = self.critic.kind
        if needs and kind != "discriminator":
            raise ValueError(f"stage {needs} trains a discriminator: set critic.kind (it is {kind}) to it")
        if kind == "discriminator" and not needs:
            raise ValueError("critic.kind discriminator has no stage to learn in: add warmup or adversarial")
        return self

    @model_validator(mode="after")
    def gae_takes_its_values_from_a_value_model(self) -> Recipe:
        kind, estimator = self.critic.kind, self.advantage.estimator
        if estimator == "gae" and kind != "value":
            raise ValueError(
                f"advantage.estimator gae is made of a value model's values: set critic.kind (it is {kind}) "
                "to value"
            )
        if kind == "value" and estimator != "gae":
            raise ValueError(
                f"critic.kind value gives advantages by advantage.estimator gae alone (it is {estimator}): "
                "set it to gae, or critic.kind to none"
            )
        if kind == "value" and not any(stage.grpo for stage in self.stages):
            raise ValueError("critic.kind value has no stage to learn in: add a grpo stage")
        return self

    @model_validator(mode="after")
    def an_adversarial_stage_rewards_by_its_critic(self) -> Recipe:
        adversarial = any(stage.adversarial for stage in self.stages)
        count = sum(item.discriminator is not None for item in self.reward)
        if adversarial and count != 1:
            raise ValueError(
                "an adversarial stage takes its reward from the critic: name `discriminator: {}` once "
                f"under reward (it is there {count} times)"
            )
        if count and not adversarial:
            raise ValueError(
                "reward discriminator scores samples of adversarial stages only: add one, or remove it"
            )
        return self

    @model_validator(mode="after")
    def an_overlong_buffer_fits_a_response(self) -> Recipe:
        longest = self.rollout.max_new_tokens
        for item in self.reward:
            if item.overlong is not None and item.overlong.buffer > longest:
                raise ValueError(
                    f"reward overlong: buffer ({item.overlong.buffer}) must not be longer than a response, "
                    f"rollout.max_new_tokens ({longest})"
                )
        return self

    @model_validator(mode="after")
    def dynamic_sampling_knows_what_teaches_nothing(self) -> Recipe:
        if self.rollout.dynamic_sampling is None:
            return self
        if any(stage.adversarial for stage in self.stages):
            raise ValueError(
                "rollout.dynamic_sampling drops groups whose rewards are all equal, and a critic's scores "
                "never are: remove it from a recipe with an adversarial stage"
            )
        estimator = self.advantage.estimator
        alone = estimator == "reinforce_plus_plus" and not self.advantage.group_baseline
        if alone or estimator == "gae":
            raise ValueError(
                "rollout.dynamic_sampling drops groups whose rewards are all equal, and advantage.estimator "
                f"{estimator} learns from those too: take one that compares the samples of a group"
            )
        return self

    @model_validator(mode="after")
    def a_curriculum_hears_of_its_own_problems(self) -> Recipe:
        check_curriculum(self.curriculum, self.data)
        check_curriculum_hears(self.curriculum, self.eval.every)
        return self

    @model_validator(mode="after")
    def grpo_needs_samples_that_differ(self) -> Recipe:
        if not any(stage.samples_groups for stage in self.stages):
            return self
        if self.rollout.temperature == 0:
            raise ValueError(
                "rollout.temperature 0 gives every sample of a group the same text: "
                "a grpo stage needs it above 0"
            )
        if self.rollout.group_size < 2 and self.advantage.estimator != "gae":
            raise ValueError(
                f"rollout.group_size ({self.rollout.group_size}) must be at least 2: "
                "an advantage is relative to the other samples of its group"
            )
        return self
