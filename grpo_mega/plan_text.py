"""A plan as text: layout, batch, and where a model's shape is known, layers, parameters and memory."""

from __future__ import annotations

from grpo_mega.model_shape import ModelShape
from grpo_mega.plan import Plan
from grpo_mega.plan_memory import Stage, critic_parameters, longest_sequence


def render_plan(plan: Plan) -> str:
    """The plan as text: layout, batch, and where a shape is known, layers, parameters and memory."""
    sections = [_render_layout(plan), _render_batch(plan)]
    if plan.shape is not None:
        sections.append(_render_stages(plan, plan.shape))
    if plan.critic_shape is not None:
        sections.append(_render_critic(plan, plan.critic_shape))
    if plan.notes:
        sections.append(["notes", *(f"  - {note}" for note in plan.notes)])
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


_MAX_GRID_ROWS = 32
_CRITIC_COLUMNS = ("weights", "gradients", "optimizer", "activations", "total")
_POLICY_COLUMNS = (*_CRITIC_COLUMNS[:3], "reference", "sampler", "logits", *_CRITIC_COLUMNS[3:])


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
    rows = [["pp", "layers", "parameters", *_POLICY_COLUMNS]]
    rows += [_row(index, stage, _POLICY_COLUMNS) for index, stage in enumerate(plan.stages)]
    return [
        f"model: {shape.family}, {plan.parameters:,} parameters, {shape.layers} layers; each rank holds",
        *_table(rows),
        "  (activations are those of one micro-batch, at least; the allocator's own is not in the total)",
    ]


def _render_critic(plan: Plan, shape: ModelShape) -> list[str]:
    """The last column: both models in one process, of which one learns at a time."""
    last = ["with the policy"] if plan.stages else []
    rows = [["pp", "layers", "parameters", *_CRITIC_COLUMNS, *last]]
    for index, stage in enumerate(plan.critic_stages):
        both = [human_bytes(stage.memory.beside(policy.memory)) for policy in plan.stages[index : index + 1]]
        rows.append([*_row(index, stage, _CRITIC_COLUMNS), *both])
    parameters, kind = critic_parameters(shape), plan.recipe.critic.kind
    return [
        f"critic ({kind}): {shape.family}, {parameters:,} parameters, {shape.layers} layers; each rank holds",
        *_table(rows),
    ]


def _row(index: int, stage: Stage, columns: tuple[str, ...]) -> list[str]:
    layers = ", ".join(f"{chunk.start}-{chunk.stop - 1}" for chunk in stage.chunks)
    sizes = [human_bytes(getattr(stage.memory, name)) for name in columns]
    return [str(index), layers, f"{stage.parameters:,}", *sizes]


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
