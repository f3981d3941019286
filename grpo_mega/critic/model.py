"""The value model: the policy's transformer with one number for each token in place of the vocabulary.

# T packed tokens of a micro-batch (T / tp under sequence parallelism, T / cp under context parallelism),
# H hidden
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from transformers import PretrainedConfig

from grpo_mega.engine.model import PackedModel, assemble_chunks
from grpo_mega.engine.parallel import Layout
from grpo_mega.recipe.blocks import ModelBlock
from grpo_mega.types import PackedBatch


class ValueHead(torch.nn.Module):
    """v_T = hidden_TH w + b, in float32. The same on every tensor-parallel rank.

    Without sequence parallelism each of them sees all tokens and computes the same gradient; with it each
    sees its own, and Megatron adds up the gradients of parameters that say so.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        dtype = config.params_dtype
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
        for parameter in (self.weight, self.bias):
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010 -- Megatron's own

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_TH.float(), self.weight.float(), self.bias.float())[:, 0]


class ValueModel(PackedModel):
    """Its last stage returns values_T, float32, of whole sequences, on every rank of that stage.

    The head takes the output layer's place and its name, under which Megatron's checkpoints look for one. No
    weight of the last stage is as wide as the vocabulary, for tied models neither: the embedding is the first
    stage's alone.
    """

    predicts_tokens = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, share_embeddings_and_output_weights=False, **kwargs)
        if self.post_process:
            self.output_layer: Any = ValueHead(self.config)  # the vocabulary's matrix was never written to

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        hidden = self.hidden_states(batch)
        if not self.post_process:
            return hidden
        values_T = self.output_layer(hidden[:, 0])
        if self.config.sequence_parallel:
            # Every rank computes the whole loss; its gradient keeps the rank's own tokens.
            values_T = gather_from_sequence_parallel_region(
                values_T, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return self.gathered_over_cp(values_T)


def build_value_chunks(
    hf: PretrainedConfig, block: ModelBlock, layout: Layout
) -> tuple[TransformerConfig, list[torch.nn.Module]]:
    """The critic's pipeline chunks on this rank, with uninitialised weights."""
    return assemble_chunks(hf, block, layout, ValueModel)


def fill_head(head: ValueHead, seed: int, std: float) -> None:
    """Normal numbers that depend on the seed alone, so that every layout starts from the same head."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(head.weight.shape, generator=generator, dtype=torch.float32) * std
    with torch.no_grad():
        head.weight.copy_(numbers)
        head.bias.zero_()
