"""What a recipe will do to a set of ranks, before any of them starts: places, batch, parameters, memory.

Pure: no torch, no processes, nothing but arithmetic. `render_plan` prints it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from grpo_mega.errors import UserError
from grpo_mega.model_shape import ModelShape
from grpo_mega.recipe.schema import Recipe

__all__ = [
    "Memory",
    "ModelShape",
    "Plan",
    "RankPlace",
    "Stage",
    "check_layout",
    "check_world_size",
    "make_plan",
    "render_plan",
]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
GRADIENT_BYTES = 4
"""Gradients are accumulated and reduced in float32."""
ADAM_BYTES = 8
"""Two float32 moments."""
MAIN_PARAMETER_BYTES = 4
"""A float32 copy of the weights, where these are bfloat16."""
LOGIT_BYTES = 4
"""Log-probabilities are computed in float32."""


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
class Memory:
    """Bytes on one rank, without activations and the allocator's own."""

    weights: int
    gradients: int
    optimizer: int
    reference: int  # the frozen model of the KL penalty
    sampler: int  # the local rollout engine: its whole model, keys and values of one batch at full length
    logits: int  # of one micro-batch

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.reference + self.sampler + self.logits


@dataclass(frozen=True, slots=True)
class Stage:
    """What each rank of a pipeline stage holds. `chunks` are its layers, one range for each virtual stage."""

    chunks: tuple[range, ...]
    parameters: int
    memory: Memory


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything `render_plan` shows. Without a model shape, `stages` is empty and `parameters` None."""

    recipe: Recipe
    shape: ModelShape | None
    ranks: tuple[RankPlace, ...]
    prompts_per_dp_rank: tuple[int, ...]
    parameters: int | None
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]

    @property
    def samples_per_dp_rank(self) -> tuple[int, ...]:
        return tuple(prompts * self.recipe.rollout.group_size for prompts in self.prompts_per_dp_rank)

    @property
    def samples_per_step(self) -> int:
        return sum(self.samples_per_dp_rank)


def make_plan(recipe: Recipe, *, shape: ModelShape | None) -> Plan:
    """The plan of a run; a layout that breaks a law is a UserError. Without a shape, sizes are left out."""
    if shape is not None:
        check_layout(recipe, shape)
    pp = recipe.parallel.pp
    return Plan(
        recipe=recipe,
        shape=shape,
        ranks=tuple(place_of(recipe, rank) for rank in range(recipe.parallel.world_size)),
        prompts_per_dp_rank=_shares(recipe.rollout.prompts_per_step, recipe.parallel.dp),
        parameters=None if shape is None else shape.parameters,
        stages=() if shape is None else tuple(_stage(recipe, shape, index) for index in range(pp)),
        notes=tuple(_notes(recipe)),
    )


def place_of(recipe: Recipe, rank: int) -> RankPlace:
    parallel = recipe.parallel
    rest, tp = divmod(rank, parallel.tp)
    pp, replica = divmod(rest, parallel.cp * parallel.dp)
    dp, cp = divmod(replica, parallel.cp)
    return RankPlace(rank=rank, tp=tp, cp=cp, dp=dp, pp=pp, ep=replica % parallel.ep)


def padded_vocab(recipe: Recipe, shape: ModelShape) -> int:
    multiple = recipe.model.vocab_multiple
    return math.ceil(shape.vocab / multiple) * multiple


def longest_sequence(recipe: Recipe) -> int:
    return recipe.data.max_prompt_tokens + recipe.rollout.max_new_tokens


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


def _stage(recipe: Recipe, shape: ModelShape, index: int) -> Stage:
    parallel = recipe.parallel
    per_chunk = shape.layers // (parallel.pp * parallel.vpp)
    starts = [(chunk * parallel.pp + index) * per_chunk for chunk in range(parallel.vpp)]
    layers = per_chunk * parallel.vpp
    first, last = index == 0, index == parallel.pp - 1
    table = padded_vocab(recipe, shape) // parallel.tp * shape.hidden
    tables = int(first) + int(last)
    if shape.tie_embeddings and first and last:
        tables = 1  # one table serves both ends only where both ends are on one rank
    dense = layers * shape.dense_layer_parameters(parallel.tp) + tables * table + int(last) * shape.hidden
    experts = layers * shape.expert_layer_parameters(parallel.tp, parallel.ep)
    return Stage(
        chunks=tuple(range(start, start + per_chunk) for start in starts),
        parameters=dense + experts,
        memory=_memory(recipe, shape, dense=dense, experts=experts, last=last),
    )


def _memory(recipe: Recipe, shape: ModelShape, *, dense: int, experts: int, last: bool) -> Memory:
    parallel, size = recipe.parallel, DTYPE_BYTES[recipe.model.dtype]
    parameters = dense + experts
    # The distributed optimizer shards what it keeps over the ranks that hold the same parameters.
    replicas = parallel.dp * parallel.cp
    owned = math.ceil(dense / replicas) + math.ceil(experts / (replicas // parallel.ep))
    main = MAIN_PARAMETER_BYTES if recipe.model.dtype == "bfloat16" else 0
    held_reference = recipe.loss.kl.coef > 0 and recipe.loss.kl.reference_on == "device"
    tokens = max(recipe.train.micro_batch_tokens, longest_sequence(recipe))
    return Memory(
        weights=parameters * size,
        gradients=parameters * GRADIENT_BYTES,
        optimizer=owned * (ADAM_BYTES + main),
        reference=parameters * size if held_reference else 0,
        sampler=_local_sampler_bytes(recipe, shape) if recipe.rollout.engine == "local" else 0,
        logits=tokens * padded_vocab(recipe, shape) // parallel.tp * LOGIT_BYTES if last else 0,
    )


def _local_sampler_bytes(recipe: Recipe, shape: ModelShape) -> int:
    size, rollout = DTYPE_BYTES[recipe.model.dtype], recipe.rollout
    tokens = rollout.prompts_per_batch * rollout.group_size * longest_sequence(recipe)
    keys_and_values = 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens
    return (shape.parameters + keys_and_values) * size


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


def render_plan(plan: Plan) -> str:
    """The plan as text: layout, batch, and where a shape is known, layers, parameters and memory."""
    sections = [_render_layout(plan), _render_batch(plan)]
    if plan.shape is not None:
        sections.append(_render_stages(plan, plan.shape))
    if plan.notes:
        sections.append(["notes", *(f"  - {note}" for note in plan.notes)])
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


_MAX_GRID_ROWS = 32


def _render_layout(plan: Plan) -> list[str]:
    parallel = plan.recipe.parallel
    sizes = " x ".join(f"{name} {getattr(parallel, name)}" for name in ("tp", "cp", "dp", "pp"))
    rows = [["ranks", "tp", "cp", "dp", "ep", "pp"]]
    for start in plan.ranks[:: parallel.tp][:_MAX_GRID_ROWS]:
        last = start.rank + parallel.tp - 1
        ranks = str(start.rank) if parallel.tp == 1 else f"{start.rank}-{last}"
        tp = "0" if parallel.tp == 1 else f"0-{parallel.tp - 1}"
        rows.append([ranks, tp, *(str(part) for part in (start.cp, start.dp, start.ep, start.pp))])
    left_out = len(plan.ranks) // parallel.tp - (len(rows) - 1)
    more = [f"  ... and {left_out} more rows in the same order"] if left_out else []
    return [f"layout: {len(plan.ranks)} ranks = {sizes}", *_table(rows), *more]


def _render_batch(plan: Plan) -> list[str]:
    recipe = plan.recipe
    prompts, samples = plan.prompts_per_dp_rank, plan.samples_per_dp_rank
    updates = recipe.train.updates_per_batch
    return [
        f"batch: {recipe.rollout.prompts_per_step} prompts x {recipe.rollout.group_size} samples"
        f" = {plan.samples_per_step} samples a step, {updates} update{'s' * (updates > 1)} on them",
        f"  each data-parallel rank: {_span(prompts)} prompts, {_span(samples)} samples",
        f"  micro-batches of at most {recipe.train.micro_batch_tokens:,} tokens,"
        f" sequences of at most {longest_sequence(recipe):,}",
    ]


def _render_stages(plan: Plan, shape: ModelShape) -> list[str]:
    memory_names = ("weights", "gradients", "optimizer", "reference", "sampler", "logits", "total")
    rows = [["pp", "layers", "parameters", *memory_names]]
    for index, stage in enumerate(plan.stages):
        layers = ", ".join(f"{chunk.start}-{chunk.stop - 1}" for chunk in stage.chunks)
        sizes = [human_bytes(getattr(stage.memory, name)) for name in memory_names]
        rows.append([str(index), layers, f"{stage.parameters:,}", *sizes])
    return [
        f"model: {shape.family}, {plan.parameters:,} parameters, {shape.layers} layers; each rank holds",
        *_table(rows),
        "  (activations and the allocator's own are not in the total)",
    ]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows
    ]


def _span(values: tuple[int, ...]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def human_bytes(count: int) -> str:
    """Example: human_bytes(3_221_225_472) == "3.0 GiB"."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
