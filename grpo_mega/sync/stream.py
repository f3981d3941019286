"""Weights on the move: from a Hugging Face directory into this rank's shards, and back out, one tensor at a
time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from grpo_mega.engine.model import PackedModel, padded_vocab, unwrap
from grpo_mega.engine.parallel import Layout
from grpo_mega.errors import UserError
from grpo_mega.sync.layout import Heads, Rule, from_hf, globally_named, rule_for, shard, to_hf, unshard

HfTensors = Callable[[str], torch.Tensor]


def heads_of(hf: object, vocab_multiple: int) -> Heads:
    heads, hidden, vocab = hf.num_attention_heads, hf.hidden_size, hf.vocab_size  # type: ignore[attr-defined]
    return Heads(
        heads=heads,
        kv_heads=hf.num_key_value_heads,  # type: ignore[attr-defined]
        head_dim=getattr(hf, "head_dim", None) or hidden // heads,
        vocab=vocab,
        padded_vocab=padded_vocab(vocab, vocab_multiple),
    )


def local_parameters(chunks: Sequence[torch.nn.Module], layout: Layout) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by global name. Left out: a tied output layer on a later stage, which IS the
    embedding, and a head that is not the vocabulary's."""
    named = {}
    for chunk in chunks:
        model = unwrap(chunk)
        layers = model.decoder.layers
        first_layer = layers[0].layer_number - 1 if len(layers) else 0
        experts = (model.config.num_moe_experts or 0) // layout.ep_size
        for name, parameter in model.named_parameters():
            tied = name == "output_layer.weight" and model.share_embeddings_and_output_weights
            if tied or (name.startswith("output_layer.") and not model.predicts_tokens):
                continue
            named[globally_named(name, first_layer, layout.ep_rank * experts)] = parameter
    return named


def load_hf(chunks: Sequence[torch.nn.Module], layout: Layout, heads: Heads, tensors: HfTensors) -> None:
    """Fill this rank's shards. Reads only the tensors that this rank holds a part of; refuses a model with
    tensors that no rank has a place for. A collective."""
    if isinstance(tensors, HfDirectory):
        _refuse_leftovers(chunks, layout, tensors)
    with torch.no_grad():
        for name, parameter in local_parameters(chunks, layout).items():
            rule = rule_for(name)
            whole = from_hf(rule, [tensors(hf_name) for hf_name in rule.hf_names], heads)
            parameter.copy_(shard(rule, whole, layout.tp_rank, layout.tp_size))
        for chunk in chunks:
            _fill_tied_output(unwrap(chunk), layout, heads, tensors)


def _refuse_leftovers(chunks: Sequence[torch.nn.Module], layout: Layout, directory: HfDirectory) -> None:
    owners = _owners(local_parameters(chunks, layout), layout)
    known = {name for owner in owners for name in rule_for(owner.name).hf_names}
    first = unwrap(chunks[0])
    if first.share_embeddings_and_output_weights or not first.predicts_tokens:
        known.add("lm_head.weight")  # some writers store the tied matrix twice
    leftovers = [n for n in directory.names if n not in known and not n.endswith("rotary_emb.inv_freq")]
    if leftovers:
        shown = ", ".join(sorted(leftovers)[:3]) + (", ..." if len(leftovers) > 3 else "")
        raise UserError(
            f"{len(leftovers)} tensors of the model have no place in the trainer: {shown}",
            where="model.hf",
            law="every weight is trained; one that were left out would change the model silently",
            remedy="use a qwen2, qwen3, llama or qwen3_moe model without extra biases or heads",
        )


def _fill_tied_output(model: PackedModel, layout: Layout, heads: Heads, tensors: HfTensors) -> None:
    """With tied weights and a pipeline the last stage holds a copy of the embedding, kept equal by Megatron's
    gradients."""
    tied = model.share_embeddings_and_output_weights and model.post_process and not model.pre_process
    if tied:
        rule = rule_for("embedding.word_embeddings.weight")
        whole = from_hf(rule, [tensors(rule.hf_names[0])], heads)
        weight = model.output_layer.weight
        assert weight is not None
        weight.copy_(shard(rule, whole, layout.tp_rank, layout.tp_size))


@dataclass(frozen=True, slots=True)
class _Owner:
    """Who holds a parameter, and what each tensor-parallel rank's part looks like."""

    name: str
    pp_rank: int
    ep_rank: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def stream_hf(
    chunks: Sequence[torch.nn.Module], layout: Layout, heads: Heads
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every Hugging Face tensor of the model, whole, on every rank, in one fixed order; a collective: all
    ranks iterate.

    At any time one tensor is held whole, never the model.
    """
    mine = local_parameters(chunks, layout)
    for owner in _owners(mine, layout):
        rule = rule_for(owner.name)
        holds = owner.pp_rank == layout.pp_rank and owner.ep_rank in (layout.ep_rank, -1)
        part = (
            mine[owner.name].detach()
            if holds
            else torch.empty(owner.shape, dtype=owner.dtype, device=_device(mine))
        )
        whole = unshard(rule, _parts(part, rule, owner, layout))
        yield from zip(rule.hf_names, to_hf(rule, whole, heads), strict=True)


def _device(mine: dict[str, torch.nn.Parameter]) -> torch.device:
    return next(iter(mine.values())).device


def _owners(mine: dict[str, torch.nn.Parameter], layout: Layout) -> list[_Owner]:
    entries = [
        _Owner(
            name,
            layout.pp_rank,
            layout.ep_rank if "local_experts" in name else -1,  # -1: every expert-parallel rank holds it
            tuple(parameter.shape),
            parameter.dtype,
        )
        for name, parameter in mine.items()
    ]
    for group, size in ((layout.ep_group, layout.ep_size), (layout.pp_group, layout.pp_size)):
        if size > 1:
            gathered: list[list[_Owner]] = [[] for _ in range(size)]
            dist.all_gather_object(gathered, entries, group)
            entries = list(dict.fromkeys(entry for part in gathered for entry in part))
    return entries


def _parts(part: torch.Tensor, rule: Rule, owner: _Owner, layout: Layout) -> list[torch.Tensor]:
    """Bring the owner's part to every pipeline and expert rank, then every tensor-parallel rank's part to
    each of them."""
    part = part.contiguous()
    if owner.ep_rank >= 0 and layout.ep_size > 1 and owner.pp_rank == layout.pp_rank:
        dist.broadcast(part, dist.get_global_rank(layout.ep_group, owner.ep_rank), layout.ep_group)
    if layout.pp_size > 1:
        dist.broadcast(part, dist.get_global_rank(layout.pp_group, owner.pp_rank), layout.pp_group)
    if rule.split == "none" or layout.tp_size == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(layout.tp_size)]
    dist.all_gather(parts, part, layout.tp_group)
    return parts


class HfDirectory:
    """The tensors of a Hugging Face model directory (safetensors), read one at a time and never all held."""

    def __init__(self, directory: Path):
        self._directory = directory
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (directory / "model.safetensors").is_file():
            with safe_open(directory / "model.safetensors", "pt") as file:
                self._file_of = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise UserError(
                f"{directory} holds no weights",
                where="model.hf",
                law="a model directory has model.safetensors, or model.safetensors.index.json and its parts",
                remedy="write the model with save_pretrained of transformers, or correct the path",
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._file_of)

    def __call__(self, name: str) -> torch.Tensor:
        if name not in self._file_of:
            raise UserError(
                f"{self._directory} has no tensor {name}",
                where="model.hf",
                law="config.json and the weights describe the same model",
                remedy="check that the directory is complete",
            )
        with safe_open(self._directory / self._file_of[name], "pt") as file:
            return file.get_tensor(name)
