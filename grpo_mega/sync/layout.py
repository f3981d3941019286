"""Megatron <-> Hugging Face: names, merging and sharding of every parameter. Pure: no process group is
touched here.

A Megatron parameter is named globally (layer and expert numbers count over the whole model, not over one
rank), and its rule says which Hugging Face tensors make it and how it is split over tensor-parallel ranks.
Covers qwen2, qwen3, llama and qwen3_moe, in the local and the Transformer Engine spec.

# H hidden, Q query heads of one key/value group, D head size
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Merge = Literal["copy", "qkv", "gate_up", "vocab"]
Split = Literal["none", "rows", "columns"]  # rows: the output dimension (0); columns: the input dimension (1)


@dataclass(frozen=True, slots=True)
class Heads:
    """What the interleaved query-key-value matrix needs to know, and the true size of the padded
    vocabulary."""

    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    padded_vocab: int


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron parameter.

    Example: decoder.layers.3.mlp.linear_fc1.weight = gate_up of
    model.layers.3.mlp.{gate_proj,up_proj}.weight, split by rows
    """

    hf_names: tuple[str, ...]
    merge: Merge = "copy"
    split: Split = "none"


_ATTENTION = "model.layers.{layer}.self_attn"
_MLP = "model.layers.{layer}.mlp"
_INPUT_NORM = ("model.layers.{layer}.input_layernorm.weight",)
_POST_NORM = ("model.layers.{layer}.post_attention_layernorm.weight",)


def _qkv(kind: str) -> Rule:
    return Rule(tuple(f"{_ATTENTION}.{p}_proj.{kind}" for p in "qkv"), "qkv", "rows")


def _gate_up(prefix: str) -> Rule:
    return Rule((f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"), "gate_up", "rows")


# Inside decoder.layers.<layer>. ; <expert> counts over all experts.
_LAYER_RULES: Mapping[str, Rule] = {
    "input_layernorm.weight": Rule(_INPUT_NORM),
    # Transformer Engine fuses a norm with the matrix behind it
    "self_attention.linear_qkv.layer_norm_weight": Rule(_INPUT_NORM),
    "self_attention.linear_qkv.weight": _qkv("weight"),
    "self_attention.linear_qkv.bias": _qkv("bias"),
    "self_attention.linear_proj.weight": Rule((f"{_ATTENTION}.o_proj.weight",), split="columns"),
    "self_attention.q_layernorm.weight": Rule((f"{_ATTENTION}.q_norm.weight",)),
    "self_attention.k_layernorm.weight": Rule((f"{_ATTENTION}.k_norm.weight",)),
    "pre_mlp_layernorm.weight": Rule(_POST_NORM),
    "mlp.linear_fc1.layer_norm_weight": Rule(_POST_NORM),
    "mlp.linear_fc1.weight": _gate_up(_MLP),
    "mlp.linear_fc2.weight": Rule((f"{_MLP}.down_proj.weight",), split="columns"),
    "mlp.router.weight": Rule((f"{_MLP}.gate.weight",)),
    "mlp.experts.local_experts.{expert}.linear_fc1.weight": _gate_up(f"{_MLP}.experts.{{expert}}"),
    "mlp.experts.local_experts.{expert}.linear_fc2.weight": Rule(
        (f"{_MLP}.experts.{{expert}}.down_proj.weight",), split="columns"
    ),
}
_OUTER_RULES: Mapping[str, Rule] = {
    "embedding.word_embeddings.weight": Rule(("model.embed_tokens.weight",), "vocab", "rows"),
    "decoder.final_layernorm.weight": Rule(("model.norm.weight",)),
    "output_layer.weight": Rule(("lm_head.weight",), "vocab", "rows"),
}
_LAYER_NAME = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<rest>.+)")
_EXPERT_NAME = re.compile(r"(?<=local_experts\.)\d+")


def rule_for(name: str) -> Rule:
    """The rule of a globally named Megatron parameter; an unknown name is a bug in this table, not a user's
    mistake."""
    if name in _OUTER_RULES:
        return _OUTER_RULES[name]
    match = _LAYER_NAME.fullmatch(name)
    assert match, f"no rule for parameter {name}"
    expert = _EXPERT_NAME.search(match["rest"])
    rule = _LAYER_RULES.get(_EXPERT_NAME.sub("{expert}", match["rest"]))
    assert rule, f"no rule for parameter {name}"
    places = {"layer": match["layer"], "expert": expert.group() if expert else ""}
    return Rule(tuple(hf.format(**places) for hf in rule.hf_names), rule.merge, rule.split)


def globally_named(name: str, first_layer: int, first_expert: int) -> str:
    """Number the layers and experts of one rank's chunk as the whole model does.

    Example: globally_named("decoder.layers.0.mlp.router.weight", first_layer=12, first_expert=0)
             == "decoder.layers.12.mlp.router.weight"
    """
    match = _LAYER_NAME.fullmatch(name)
    if not match:
        return name
    rest = _EXPERT_NAME.sub(lambda expert: str(int(expert.group()) + first_expert), match["rest"])
    return f"decoder.layers.{int(match['layer']) + first_layer}.{rest}"


def from_hf(rule: Rule, tensors: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
    """The whole Megatron tensor from its Hugging Face parts."""
    if rule.merge == "copy":
        return tensors[0]
    if rule.merge == "gate_up":
        return torch.cat(list(tensors))
    if rule.merge == "vocab":
        padding = heads.padded_vocab - tensors[0].shape[0]
        return torch.nn.functional.pad(tensors[0], (0, 0, 0, padding))
    # each group: its queries, its key, its value
    grouped = [t.unflatten(0, (heads.kv_heads, -1)) for t in tensors]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def to_hf(rule: Rule, tensor: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, ...]:
    """The Hugging Face parts of a whole Megatron tensor; the inverse of `from_hf`."""
    if rule.merge == "copy":
        return (tensor,)
    if rule.merge == "gate_up":
        return tensor.chunk(2)
    if rule.merge == "vocab":
        return (tensor[: heads.vocab],)
    queries = heads.heads // heads.kv_heads * heads.head_dim
    parts = tensor.unflatten(0, (heads.kv_heads, -1)).split([queries, heads.head_dim, heads.head_dim], dim=1)
    return tuple(part.flatten(0, 1) for part in parts)


def shard(rule: Rule, tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What tensor-parallel rank `rank` of `size` holds of a whole Megatron tensor."""
    if rule.split == "none" or size == 1:
        return tensor
    if rule.split == "columns":
        return tensor.chunk(size, dim=1)[rank]
    if rule.merge == "gate_up":  # each rank holds its rows of the gate, then its rows of the up projection
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(size)[rank]


def unshard(rule: Rule, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """The whole Megatron tensor from every tensor-parallel rank's part; the inverse of `shard`."""
    if rule.split == "none" or len(shards) == 1:
        return shards[0]
    if rule.split == "columns":
        return torch.cat(list(shards), dim=1)
    if rule.merge == "gate_up":
        halves = [part.chunk(2) for part in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(list(shards))
