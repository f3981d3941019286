"""The process that the tests' ranks are forked from. It has imported what they need, once, and ends with the
one that started it."""

from __future__ import annotations

import gc
import importlib

from grpo_mega.lifetime import die_with_parent

NEEDED = (
    "grpo_mega.cli",
    "grpo_mega.train",
    "grpo_mega.engine.checkpoint",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "torch.distributed.launcher.api",
    "transformers.generation",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.llama.modeling_llama",
    "tests.tiny",
    "tests.critic",
    "wandb.sdk.launch",  # which wandb.init looks into
)

die_with_parent()
for name in NEEDED:
    importlib.import_module(name)
# What is there now stays: neither a rank's own collections nor its search for old engines look at it again.
gc.freeze()
