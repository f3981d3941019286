"""Models from nothing: a random Hugging Face directory, so that everything after it has one way to load a
model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from grpo_mega.engine.model import DTYPES
from grpo_mega.recipe.blocks import ScratchModel


def scratch_config(block: ScratchModel, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    extra: dict[str, object] = {}
    if block.family.startswith("qwen3"):
        extra["head_dim"] = block.hidden // block.heads  # otherwise that of the family's large models
    if block.family == "qwen3_moe":
        extra |= {
            "num_experts": block.experts,
            "num_experts_per_tok": block.experts_per_token,
            "moe_intermediate_size": block.ffn,
            "norm_topk_prob": True,
        }
    return AutoConfig.for_model(
        block.family,
        hidden_size=block.hidden,
        num_hidden_layers=block.layers,
        num_attention_heads=block.heads,
        num_key_value_heads=block.kv_heads,
        intermediate_size=block.ffn,
        vocab_size=len(tokenizer),
        max_position_embeddings=block.max_positions,
        tie_word_embeddings=block.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": block.rope_theta},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **extra,
    )


def write_scratch_model(
    block: ScratchModel, tokenizer: PreTrainedTokenizerBase, dtype: str, seed: int, directory: Path
) -> None:
    """The same weights for the same seed, whatever the layout that loads them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(scratch_config(block, tokenizer), dtype=DTYPES[dtype])
    logging.disable_progress_bar()  # one file of a small model, from one rank
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
