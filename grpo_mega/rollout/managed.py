"""The servers of a recipe, made ready to start: by a run that owns them, or by `grpo-mega serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from grpo_mega.ports import LOOPBACK
from grpo_mega.recipe.rollout_block import SglangBlock
from grpo_mega.rollout.server import ServerPool, ServerSpec, deterministic_flags, server_python


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a server must know of the model, and how its tokens are shown."""

    hf: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    dtype: str
    on_gpu: bool


def describe_model(hf: PretrainedConfig, dtype: str, folder: Path) -> Path:
    """A folder with the model's configuration: a server starts from it, without weights. It names no end of
    sequence, so that samples end at the stop tokens that were asked for and nowhere else."""
    folder.mkdir(parents=True, exist_ok=True)
    config = type(hf).from_dict(hf.to_dict())
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = dtype
    config.eos_token_id = None
    config.save_pretrained(folder)
    GenerationConfig().save_pretrained(folder)
    return folder


def server_pool(
    block: SglangBlock,
    hf: PretrainedConfig,
    dtype: str,
    folder: Path,
    *,
    on_gpu: bool,
    seed: int,
    host: str = LOOPBACK,
) -> ServerPool:
    """Not started yet; logs and the model's configuration go into `folder`."""
    spec = ServerSpec(
        python=server_python(block.python),
        model=describe_model(hf, dtype, folder / "model"),
        dtype=dtype,
        folder=folder,
        on_gpu=on_gpu,
        host=host,
        tp=block.tp,
        saves_memory=block.colocate,
        seed=seed,
        startup_seconds=block.startup_seconds,
        extra_args=(*deterministic_flags(block, on_gpu=on_gpu), *block.extra_args),
    )
    return ServerPool(spec, block.servers, block.max_restarts)
