"""The numbers that fix a transformer's size, read from a recipe or a config.json, and what follows from them.

Counts are for the Qwen2, Qwen3, Llama and Qwen3-MoE shapes: grouped-query attention, gated feed-forward,
RMSNorm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

from grpo_mega.errors import UserError
from grpo_mega.recipe.blocks import ScratchModel

Family: TypeAlias = Literal["qwen2", "qwen3", "llama", "qwen3_moe"]
FAMILIES: tuple[str, ...] = get_args(Family)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One model's size.

    Example: ModelShape(family="qwen2", layers=24, hidden=896, heads=14, kv_heads=2, head_dim=64, ffn=4864,
        vocab=151936, tie_embeddings=True, rope_theta=1e6, max_positions=32768) is Qwen2.5-0.5B: 494,032,768
        parameters
    """

    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # inner width of a dense feed-forward layer; a model of experts has none of these
    vocab: int  # without padding
    tie_embeddings: bool
    rope_theta: float
    max_positions: int
    experts: int = 0  # in each layer; 0 = dense
    experts_per_token: int = 0
    moe_ffn: int = 0  # inner width of one expert

    @classmethod
    def from_scratch(cls, block: ScratchModel, vocab: int) -> ModelShape:
        moe = block.family == "qwen3_moe"
        return cls(
            family=block.family,
            layers=block.layers,
            hidden=block.hidden,
            heads=block.heads,
            kv_heads=block.kv_heads,
            head_dim=block.hidden // block.heads,
            ffn=block.ffn,
            vocab=vocab,
            tie_embeddings=block.tie_embeddings,
            rope_theta=block.rope_theta,
            max_positions=block.max_positions,
            experts=block.experts if moe else 0,
            experts_per_token=block.experts_per_token if moe else 0,
            moe_ffn=block.ffn if moe else 0,
        )

    @classmethod
    def from_hf_directory(cls, directory: str | Path) -> ModelShape:
        """From `config.json`, without importing transformers."""
        config = _HfConfig.read(Path(directory))
        family = config.family()
        moe = family == "qwen3_moe"
        heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
        rope = cast(Mapping[str, Any], config.values.get("rope_parameters") or {})
        theta = rope.get("rope_theta") or config.values.get("rope_theta") or 10000.0
        return cls(
            family=family,
            layers=config.integer("num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=config.integer("num_key_value_heads", default=heads),
            head_dim=config.integer("head_dim", default=hidden // heads),
            ffn=config.integer("intermediate_size"),
            vocab=config.integer("vocab_size"),
            tie_embeddings=bool(config.values.get("tie_word_embeddings", False)),
            rope_theta=float(theta),
            max_positions=config.integer("max_position_embeddings", default=32768),
            # transformers 5 writes the second name, model cards carry the first.
            experts=config.integer("num_experts", "num_local_experts") if moe else 0,
            experts_per_token=config.integer("num_experts_per_tok") if moe else 0,
            moe_ffn=config.integer("moe_intermediate_size") if moe else 0,
        )

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All of them, the vocabulary not padded: what the model card says."""
        tables = self.embedding_parameters * (1 if self.tie_embeddings else 2)
        return (
            self.layers * (self.dense_layer_parameters() + self.expert_layer_parameters())
            + self.hidden
            + tables
        )

    def dense_layer_parameters(self, tp: int = 1) -> int:
        """One rank's part of a layer without its experts: matrices over tp, norms and router everywhere."""
        query, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        split = 2 * self.hidden * (query + key_value)  # q and o; k and v
        whole = 2 * self.hidden  # the two norms
        if self.family == "qwen2":
            split += query + 2 * key_value  # biases of q, k, v
        if self.family in ("qwen3", "qwen3_moe"):
            whole += 2 * self.head_dim  # norms of q and k
        if self.experts:
            whole += self.hidden * self.experts  # router
        else:
            split += 3 * self.hidden * self.ffn  # gate, up, down
        return split // tp + whole

    def expert_layer_parameters(self, tp: int = 1, ep: int = 1) -> int:
        """One rank's part of one layer's experts: whole experts over ep, each one's matrices over tp."""
        return self.experts // ep * 3 * self.hidden * self.moe_ffn // tp


@dataclass(frozen=True, slots=True)
class _HfConfig:
    """A config.json whose missing numbers are named with their file."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path) -> _HfConfig:
        path = directory / "config.json"
        if not path.is_file():
            missing = path if directory.is_dir() else directory
            raise UserError(
                f"there is no {missing}",
                where=f"model.hf = {directory}",
                law="model.hf is a Hugging Face model directory with config.json, weights and tokenizer",
                remedy="correct model.hf (a relative path starts at the working directory) or download it",
            )
        try:
            values: object = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}", where="model.hf") from None
        if not isinstance(values, dict):
            raise UserError(f"{path} holds no JSON object", where="model.hf")
        return cls(path, cast(dict[str, Any], values))

    def family(self) -> Family:
        kind = self.values.get("model_type")
        if kind not in FAMILIES:
            raise UserError(
                f"model_type {kind!r} is not supported",
                where=f"{self.path} (model.hf)",
                law=f"a model is of one of the types {', '.join(FAMILIES)}",
                remedy="choose a model of one of these types",
            )
        if self.values.get("mlp_only_layers") or self.values.get("decoder_sparse_step", 1) != 1:
            raise UserError(
                "some layers of this model have experts and some have not",
                where=f"{self.path} (mlp_only_layers, decoder_sparse_step)",
                law="every layer of a qwen3_moe model has experts",
                remedy="choose a model whose layers are all alike",
            )
        return cast(Family, kind)

    def integer(self, key: str, other_name: str | None = None, default: int | None = None) -> int:
        names = [name for name in (key, other_name) if name is not None and self.values.get(name) is not None]
        value = self.values[names[0]] if names else default
        if not isinstance(value, int) or value < 1:
            raise UserError(
                f"{key} = {value!r} is not a positive whole number",
                where=f"{self.path} (model.hf)",
                law=f"config.json states {key}",
                remedy="restore the model's own config.json",
            )
        return value


def local_model_directory(name: str) -> str:
    """A directory as it is; the name of a model in the local Hugging Face cache as its directory there."""
    if Path(name).exists():
        return name
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path that is no name either
        return name
    return str(Path(cached).parent) if isinstance(cached, str) else name
