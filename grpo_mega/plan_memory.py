"""What one rank holds of the policy and of its critic, in bytes: arithmetic on a recipe and a model's shape.

Pure: no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo_mega.model_shape import ModelShape
from grpo_mega.recipe.schema import Recipe

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
GRADIENT_BYTES = 4
"""Gradients are accumulated and reduced in float32."""
ADAM_BYTES = 8
"""Two float32 moments."""
MAIN_PARAMETER_BYTES = 4
"""A float32 copy of the weights, where these are bfloat16."""
LOGIT_BYTES = 4
"""Log-probabilities are computed in float32."""
LOGIT_TILE = 8192
"""Columns of the vocabulary whose logits are there at a time: the widest tile of kernels/logprob.py."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one rank, without the allocator's own. A critic has no reference, sampler and logits."""

    weights: int
    gradients: int
    optimizer: int
    reference: int  # the frozen model of the KL penalty
    sampler: int  # the local rollout engine: its whole model, keys and values of one batch at full length
    logits: int  # of one micro-batch and one tile of the vocabulary
    activations: int  # what one micro-batch keeps for its backward pass, at least: see `activation_bytes`

    @property
    def lasting(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.reference + self.sampler

    @property
    def passing(self) -> int:
        """Only while a micro-batch is on its way."""
        return self.logits + self.activations

    @property
    def total(self) -> int:
        return self.lasting + self.passing

    def beside(self, other: Memory) -> int:
        """Of two models in one process, which learn one after the other."""
        return self.lasting + other.lasting + max(self.passing, other.passing)


@dataclass(frozen=True, slots=True)
class Stage:
    """What each rank of a pipeline stage holds. `chunks` are its layers, one range for each virtual stage."""

    chunks: tuple[range, ...]
    parameters: int
    memory: Memory


def padded_vocab(recipe: Recipe, shape: ModelShape) -> int:
    multiple = recipe.model.vocab_multiple
    return math.ceil(shape.vocab / multiple) * multiple


def longest_sequence(recipe: Recipe) -> int:
    return recipe.data.max_prompt_tokens + recipe.rollout.max_new_tokens


def policy_stage(recipe: Recipe, shape: ModelShape, index: int) -> Stage:
    first, last = index == 0, index == recipe.parallel.pp - 1
    tables = int(first) + int(last)
    if shape.tie_embeddings and first and last:
        tables = 1  # one table serves both ends only where both ends are on one rank
    ends = tables * _table(recipe, shape) + int(last) * shape.hidden
    held_reference = recipe.loss.kl.coef > 0 and recipe.loss.kl.reference_on == "device"
    columns = min(padded_vocab(recipe, shape) // recipe.parallel.tp, LOGIT_TILE)
    logits = micro_batch_tokens(recipe) * columns * LOGIT_BYTES
    return _stage(
        recipe,
        shape,
        index,
        ends=ends,
        has_reference=held_reference,
        sampler=_local_sampler_bytes(recipe, shape) if recipe.rollout.engine == "local" else 0,
        logits=logits if last else 0,
    )


def critic_stage(recipe: Recipe, shape: ModelShape, index: int) -> Stage:
    """One number for each token in place of the vocabulary: a row of weights and a bias on the last stage,
    the embedding on the first alone."""
    first, last = index == 0, index == recipe.parallel.pp - 1
    norm_and_head = shape.hidden + shape.hidden + 1
    ends = int(first) * _table(recipe, shape) + int(last) * norm_and_head
    return _stage(recipe, shape, index, ends=ends)


def critic_parameters(shape: ModelShape) -> int:
    """All of them, the vocabulary not padded."""
    tables = 1 if shape.tie_embeddings else 2
    return shape.parameters - (tables - 1) * shape.embedding_parameters + shape.hidden + 1


def micro_batch_tokens(recipe: Recipe) -> int:
    return max(recipe.train.micro_batch_tokens, longest_sequence(recipe))


def activation_bytes(recipe: Recipe, shape: ModelShape, layers: int) -> int:
    """What matrices, norms and attention of so many layers need of one micro-batch for their gradients. Real
    kernels keep copies of their own beside it.

    Of each token and layer, with h hidden, q and k the widths of queries and keys, f the feed-forward width:
    4 h (both norms, before and after), (q + 2 k) + q (attention and what comes out of it) and 3 f (gate, up,
    their product), or for each of a token's experts h + 3 f. Matrices are split over tp, norms only under
    sequence parallelism, tokens over cp. Full recomputation keeps the layer's input alone.
    """
    parallel = recipe.parallel
    norms_over = parallel.tp if parallel.sequence_parallel else 1
    if recipe.model.recompute == "full":
        numbers = shape.hidden / norms_over
    else:
        query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        numbers = 4 * shape.hidden / norms_over + (2 * query + 2 * key) / parallel.tp
        if shape.experts:
            numbers += shape.experts_per_token * (shape.hidden / norms_over + 3 * shape.moe_ffn / parallel.tp)
        else:
            numbers += 3 * shape.ffn / parallel.tp
    tokens = math.ceil(micro_batch_tokens(recipe) / parallel.cp)
    return math.ceil(layers * tokens * numbers) * DTYPE_BYTES[recipe.model.dtype]


def _table(recipe: Recipe, shape: ModelShape) -> int:
    return padded_vocab(recipe, shape) // recipe.parallel.tp * shape.hidden


def _stage(
    recipe: Recipe,
    shape: ModelShape,
    index: int,
    *,
    ends: int,
    has_reference: bool = False,
    sampler: int = 0,
    logits: int = 0,
) -> Stage:
    """`ends`: parameters that are of no layer."""
    parallel, size = recipe.parallel, DTYPE_BYTES[recipe.model.dtype]
    per_chunk = shape.layers // (parallel.pp * parallel.vpp)
    starts = [(chunk * parallel.pp + index) * per_chunk for chunk in range(parallel.vpp)]
    layers = per_chunk * parallel.vpp
    dense = layers * shape.dense_layer_parameters(parallel.tp) + ends
    experts = layers * shape.expert_layer_parameters(parallel.tp, parallel.ep)
    parameters = dense + experts
    # The distributed optimizer shards what it keeps over the ranks that hold the same parameters.
    replicas = parallel.dp * parallel.cp
    owned = math.ceil(dense / replicas) + math.ceil(experts / (replicas // parallel.ep))
    main = MAIN_PARAMETER_BYTES if recipe.model.dtype == "bfloat16" else 0
    return Stage(
        chunks=tuple(range(start, start + per_chunk) for start in starts),
        parameters=parameters,
        memory=Memory(
            weights=parameters * size,
            gradients=parameters * GRADIENT_BYTES,
            optimizer=owned * (ADAM_BYTES + main),
            reference=parameters * size if has_reference else 0,
            sampler=sampler,
            logits=logits,
            activations=activation_bytes(recipe, shape, layers),
        ),
    )


def _local_sampler_bytes(recipe: Recipe, shape: ModelShape) -> int:
    size, rollout = DTYPE_BYTES[recipe.model.dtype], recipe.rollout
    tokens = rollout.prompts_per_batch * rollout.group_size * longest_sequence(recipe)
    keys_and_values = 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens
    return (shape.parameters + keys_and_values) * size
