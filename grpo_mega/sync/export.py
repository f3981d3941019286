"""A Hugging Face directory written from the weight stream: loadable by transformers and by servers as it
is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SHARD_BYTES = 4 * 1024**3


def write_hf_directory(
    tensors: Iterable[tuple[str, torch.Tensor]],
    hf: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    write: bool,
) -> None:
    """Config, tokenizer, generation config and safetensors shards. All ranks iterate (the stream is a
    collective); one writes. The directory appears under its name only when it is complete."""
    draft = directory.with_name(directory.name + ".writing")
    writer = _ShardWriter(draft) if write else None
    dtype = None
    for name, tensor in tensors:
        dtype = tensor.dtype
        if writer:
            writer.add(name, tensor)
    if not writer:
        return
    writer.finish()
    config = type(hf).from_dict(hf.to_dict())
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hf.model_type]]
    config.dtype = dtype
    config.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(draft)
    shutil.rmtree(directory, ignore_errors=True)
    draft.rename(directory)


class _ShardWriter:
    """Holds at most one shard of tensors."""

    def __init__(self, directory: Path):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        self._directory = directory
        self._held: dict[str, torch.Tensor] = {}
        self._held_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > SHARD_BYTES:
            self._flush()
        self._held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._held_bytes += size
        self._total_bytes += size

    def _flush(self) -> None:
        save_file(self._held, self._directory / f"shard-{len(self._shards) + 1}", metadata={"format": "pt"})
        self._shards.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    def finish(self) -> None:
        """Names that tell the number of shards can only be given at the end."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            (self._directory / "shard-1").rename(self._directory / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            (self._directory / f"shard-{number}").rename(self._directory / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
