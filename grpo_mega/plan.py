"""What a recipe will do to a set of ranks, before any of them starts: places, batch, parameters, memory.

Pure: no torch, no processes, nothing but arithmetic. `plan_text.render_plan` prints it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from grpo_mega.errors import UserError
from grpo_mega.model_shape import ModelShape
from grpo_mega.plan_memory import Stage, critic_stage, longest_sequence, padded_vocab, policy_stage
from grpo_mega.recipe.schema import Recipe

__all__ = [
    "ModelShape",
    "Plan",
    "RankPlace",
    "check_layout",
    "check_world_size",
    "make_plan",
]


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where one rank stands, in Megatron's order: tensor fastest, then context, data, pipeline.

    Example (tp 2, dp 2, pp 2): rank 6 is RankPlace(rank=6, tp=0, cp=0, dp=1, pp=1, ep=0)
    """

    rank: int
    tp: int
    cp: int
    dp: int
    pp: int
    ep: int  # which share of the experts it holds: the fastest part of dp x cp


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything `render_plan` shows. Without a model shape, `stages` is empty and `parameters` None; without
    a critic, `critic_shape` is None and `critic_stages` empty."""

    recipe: Recipe
    shape: ModelShape | None
    ranks: tuple[RankPlace, ...]
    prompts_per_dp_rank: tuple[int, ...]
    parameters: int | None
    stages: tuple[Stage, ...]
    critic_shape: ModelShape | None
    critic_stages: tuple[Stage, ...]
    notes: tuple[str, ...]

    @property
    def samples_per_dp_rank(self) -> tuple[int, ...]:
        return tuple(prompts * self.recipe.rollout.group_size for prompts in self.prompts_per_dp_rank)

    @property
    def samples_per_step(self) -> int:
        return sum(self.samples_per_dp_rank)


def make_plan(recipe: Recipe, *, shape: ModelShape | None, critic_shape: ModelShape | None = None) -> Plan:
    """The plan of a run; a layout that breaks a law is a UserError. Without a shape, sizes are left out.
    `critic_shape`: of critic.hf; a critic without one has the policy's."""
    critic_shape = None if recipe.critic.kind == "none" else critic_shape or shape
    for each in (shape, critic_shape):
        if each is not None:
            check_layout(recipe, each)
    stages = range(recipe.parallel.pp)
    return Plan(
        recipe=recipe,
        shape=shape,
        ranks=tuple(place_of(recipe, rank) for rank in range(recipe.parallel.world_size)),
        prompts_per_dp_rank=_shares(recipe.rollout.prompts_per_step, recipe.parallel.dp),
        parameters=None if shape is None else shape.parameters,
        stages=() if shape is None else tuple(policy_stage(recipe, shape, index) for index in stages),
        critic_shape=critic_shape,
        critic_stages=()
        if critic_shape is None
        else tuple(critic_stage(recipe, critic_shape, index) for index in stages),
        notes=tuple(_notes(recipe)),
    )


def place_of(recipe: Recipe, rank: int) -> RankPlace:
    parallel = recipe.parallel
    rest, tp = divmod(rank, parallel.tp)
    pp, replica = divmod(rest, parallel.cp * parallel.dp)
    dp, cp = divmod(replica, parallel.cp)
    return RankPlace(rank=rank, tp=tp, cp=cp, dp=dp, pp=pp, ep=replica % parallel.ep)


def check_world_size(recipe: Recipe, world_size: int) -> None:
    """The processes that were started are as many as the layout has places."""
    parallel = recipe.parallel
    if parallel.world_size == world_size:
        return
    product = f"tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {parallel.dp}"
    model_ranks = parallel.world_size // parallel.dp
    if world_size % model_ranks == 0:
        remedy = f"set parallel.dp={world_size // model_ranks}, or start {parallel.world_size} processes"
    else:
        remedy = f"start {parallel.world_size} processes, or a multiple of {model_ranks} with its parallel.dp"
    raise UserError(
        f"{world_size} processes were started for a layout of {parallel.world_size}",
        where="parallel.tp, parallel.pp, parallel.cp, parallel.dp",
        law=f"{product} = {parallel.world_size} must equal the number of processes (ep is part of dp)",
        remedy=remedy,
    )


def check_layout(recipe: Recipe, shape: ModelShape) -> None:
    """Every law that a layout and a model must hold together; the first broken one is raised."""
    parallel = recipe.parallel
    if parallel.ep > 1 and not shape.experts:
        raise UserError(
            f"parallel.ep = {parallel.ep} with a {shape.family} model, which has no experts",
            where="parallel.ep",
            law="expert parallelism distributes experts",
            remedy="set parallel.ep to 1",
        )
    for name, size, key, parts in _divisions(recipe, shape):
        if size % parts:
            divisors = ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)
            raise UserError(
                f"{name} = {size} cannot be split into {parts} equal parts",
                where=f"{key} = {parts}",
                law=f"{key} must divide {name}",
                remedy=f"change {key} to one of {divisors}",
            )


def _divisions(recipe: Recipe, shape: ModelShape) -> Iterator[tuple[str, int, str, int]]:
    """(what is divided, its size, the key that divides it, into how many)."""
    parallel = recipe.parallel
    yield "the number of attention heads", shape.heads, "parallel.tp", parallel.tp
    yield "the number of key-value heads", shape.kv_heads, "parallel.tp", parallel.tp
    if shape.experts:
        yield "the width of an expert (moe_ffn)", shape.moe_ffn, "parallel.tp", parallel.tp
        yield "the number of experts", shape.experts, "parallel.ep", parallel.ep
    else:
        yield "the feed-forward width (ffn)", shape.ffn, "parallel.tp", parallel.tp
    padded = padded_vocab(recipe, shape)
    yield "the padded vocabulary (a multiple of model.vocab_multiple)", padded, "parallel.tp", parallel.tp
    yield "the number of layers", shape.layers, "parallel.pp x parallel.vpp", parallel.pp * parallel.vpp


def _shares(count: int, parts: int) -> tuple[int, ...]:
    """`count` things dealt to `parts` as evenly as possible, the first ones getting the rest."""
    return tuple(count // parts + (index < count % parts) for index in range(parts))


def _notes(recipe: Recipe) -> Iterator[str]:
    prompts, dp = recipe.rollout.prompts_per_step, recipe.parallel.dp
    per_update = prompts // recipe.train.updates_per_batch * recipe.rollout.group_size
    if prompts < dp:
        yield (
            f"{dp - prompts} of {dp} data-parallel ranks have no prompt to sample: "
            f"raise rollout.prompts_per_step ({prompts}) to parallel.dp ({dp}) or more"
        )
    elif prompts % dp:
        yield (
            f"rollout.prompts_per_step ({prompts}) is no multiple of parallel.dp ({dp}): "
            f"some ranks sample {math.ceil(prompts / dp)} prompts while others wait after {prompts // dp}"
        )
    if per_update < dp:
        yield (
            f"each update has {per_update} samples for {dp} data-parallel ranks: some train on padding only; "
            "lower train.updates_per_batch or parallel.dp"
        )
    longest, budget = longest_sequence(recipe), recipe.train.micro_batch_tokens
    if longest > budget:
        yield (
            f"the longest sequence (data.max_prompt_tokens + rollout.max_new_tokens = {longest}) exceeds "
            f"train.micro_batch_tokens ({budget}): such a sequence is a micro-batch of its own"
        )
