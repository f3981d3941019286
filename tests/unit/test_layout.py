"""Megatron <-> Hugging Face: tiny matrices by hand, and round trips that keep every bit.

# G groups of queries with one key and one value, Q queries of a group, D head size, H hidden
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mega.sync.layout import Heads, Rule, from_hf, globally_named, rule_for, shard, to_hf, unshard

LAYER = "decoder.layers.3."
QKV = LAYER + "self_attention.linear_qkv.weight"
GATE_UP = LAYER + "mlp.linear_fc1.weight"
# Each parameter of the local and the Transformer Engine spec, and the Hugging Face tensors that make it.
HF_NAMES = {
    "embedding.word_embeddings.weight": ["model.embed_tokens.weight"],
    "decoder.final_layernorm.weight": ["model.norm.weight"],
    "output_layer.weight": ["lm_head.weight"],
    LAYER + "input_layernorm.weight": ["model.layers.3.input_layernorm.weight"],
    LAYER + "self_attention.linear_qkv.layer_norm_weight": ["model.layers.3.input_layernorm.weight"],
    QKV: [f"model.layers.3.self_attn.{part}_proj.weight" for part in "qkv"],
    LAYER + "self_attention.linear_qkv.bias": [
        f"model.layers.3.self_attn.{part}_proj.bias" for part in "qkv"
    ],
    LAYER + "self_attention.linear_proj.weight": ["model.layers.3.self_attn.o_proj.weight"],
    LAYER + "self_attention.q_layernorm.weight": ["model.layers.3.self_attn.q_norm.weight"],
    LAYER + "self_attention.k_layernorm.weight": ["model.layers.3.self_attn.k_norm.weight"],
    LAYER + "pre_mlp_layernorm.weight": ["model.layers.3.post_attention_layernorm.weight"],
    LAYER + "mlp.linear_fc1.layer_norm_weight": ["model.layers.3.post_attention_layernorm.weight"],
    GATE_UP: ["model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.up_proj.weight"],
    LAYER + "mlp.linear_fc2.weight": ["model.layers.3.mlp.down_proj.weight"],
    LAYER + "mlp.router.weight": ["model.layers.3.mlp.gate.weight"],
    LAYER + "mlp.experts.local_experts.12.linear_fc1.weight": [
        "model.layers.3.mlp.experts.12.gate_proj.weight",
        "model.layers.3.mlp.experts.12.up_proj.weight",
    ],
    LAYER + "mlp.experts.local_experts.12.linear_fc2.weight": [
        "model.layers.3.mlp.experts.12.down_proj.weight"
    ],
}
NO_HEADS = Heads(heads=1, kv_heads=1, head_dim=1, vocab=1, padded_vocab=1)


@dataclass(frozen=True)
class Shape:
    """A model's sizes, all of which divide over four ranks."""

    groups: int
    queries: int
    head_dim: int
    hidden: int
    ffn: int
    vocab: int
    padded_vocab: int

    @property
    def heads(self) -> Heads:
        return Heads(self.groups * self.queries, self.groups, self.head_dim, self.vocab, self.padded_vocab)

    def tensors(self, hf_names: tuple[str, ...]) -> list[torch.Tensor]:
        """Random Hugging Face tensors of these names; bfloat16 as in a real file."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(self._size(name), generator=generator).bfloat16() for name in hf_names]

    def _size(self, name: str) -> tuple[int, ...]:
        attention = {"q": self.queries * self.groups, "k": self.groups, "v": self.groups}
        part, kind = name.split(".")[-2:]
        if part[:2] in ("q_", "k_", "v_"):
            if part.endswith("_norm"):
                return (self.head_dim,)
            rows = attention[part[0]] * self.head_dim
            return (rows, self.hidden) if kind == "weight" else (rows,)
        return {
            "o_proj": (self.hidden, self.groups * self.queries * self.head_dim),
            "gate_proj": (self.ffn, self.hidden),
            "up_proj": (self.ffn, self.hidden),
            "down_proj": (self.hidden, self.ffn),
            "gate": (8, self.hidden),
            "embed_tokens": (self.vocab, self.hidden),
            "lm_head": (self.vocab, self.hidden),
        }.get(part, (self.hidden,))


def _shape(groups: int, queries: int, head_dim: int, missing: int) -> Shape:
    return Shape(groups, queries, head_dim, hidden=8, ffn=12, vocab=16 - missing, padded_vocab=16)


SHAPES = st.builds(
    _shape, st.sampled_from([4, 8]), st.integers(1, 4), st.sampled_from([1, 2, 6]), st.integers(0, 7)
)


def _column(*rows: int) -> torch.Tensor:
    """A matrix of one column, so that each row is a number."""
    return torch.tensor(rows)[:, None]


@pytest.mark.parametrize("name", HF_NAMES)
def test_every_parameter_has_its_hugging_face_names(name):
    assert list(rule_for(name).hf_names) == HF_NAMES[name]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", HF_NAMES)
@settings(deadline=None, max_examples=10)
@given(shape=SHAPES)
def test_round_trips_keep_every_bit(name, size, shape):
    rule = rule_for(name)
    tensors = shape.tensors(rule.hf_names)
    whole = from_hf(rule, tensors, shape.heads)
    shards = [shard(rule, whole, rank, size) for rank in range(size)]
    assert torch.equal(unshard(rule, shards), whole)
    back = to_hf(rule, unshard(rule, shards), shape.heads)
    assert len(back) == len(tensors)
    assert all(torch.equal(ours, original) for ours, original in zip(back, tensors, strict=True))


@pytest.mark.parametrize(
    ("name", "dimension"),
    [
        ("embedding.word_embeddings.weight", 0),
        ("output_layer.weight", 0),
        (QKV, 0),
        (LAYER + "self_attention.linear_qkv.bias", 0),
        (LAYER + "self_attention.linear_proj.weight", 1),
        (GATE_UP, 0),
        (LAYER + "mlp.linear_fc2.weight", 1),
        (LAYER + "mlp.experts.local_experts.0.linear_fc1.weight", 0),
        (LAYER + "mlp.experts.local_experts.0.linear_fc2.weight", 1),
        (LAYER + "mlp.router.weight", None),
        (LAYER + "input_layernorm.weight", None),
        (LAYER + "self_attention.q_layernorm.weight", None),
        ("decoder.final_layernorm.weight", None),
    ],
)
def test_which_dimension_is_split(name, dimension):
    """Output rows of what widens, input columns of what comes back to the hidden size, else nothing."""
    shape = _shape(groups=4, queries=2, head_dim=2, missing=3)
    rule = rule_for(name)
    whole = from_hf(rule, shape.tensors(rule.hf_names), shape.heads)
    expected = list(whole.shape)
    if dimension is not None:
        expected[dimension] //= 4
    assert list(shard(rule, whole, 2, 4).shape) == expected


def test_queries_keys_and_values_lie_together_by_group():
    # G = 2 groups, Q = 2 queries each, D = 2: rows 10.. are queries (head, place), 50.. keys, 70.. values
    heads = Heads(heads=4, kv_heads=2, head_dim=2, vocab=1, padded_vocab=1)
    tensors = [_column(10, 11, 20, 21, 30, 31, 40, 41), _column(50, 51, 60, 61), _column(70, 71, 80, 81)]
    rule = rule_for(QKV)
    whole = from_hf(rule, tensors, heads)
    first, second = [10, 11, 20, 21, 50, 51, 70, 71], [30, 31, 40, 41, 60, 61, 80, 81]
    assert whole[:, 0].tolist() == first + second
    # each of two ranks holds one whole group
    assert shard(rule, whole, 0, 2)[:, 0].tolist() == first
    assert shard(rule, whole, 1, 2)[:, 0].tolist() == second
    for ours, original in zip(to_hf(rule, whole, heads), tensors, strict=True):
        assert torch.equal(ours, original)


def test_a_rank_holds_its_rows_of_gate_and_of_up():
    # gate 1..4, up 11..14; a plain split would give rank 0 all of the gate
    rule = rule_for(GATE_UP)
    whole = from_hf(rule, [_column(1, 2, 3, 4), _column(11, 12, 13, 14)], NO_HEADS)
    assert whole[:, 0].tolist() == [1, 2, 3, 4, 11, 12, 13, 14]
    shards = [shard(rule, whole, rank, 2) for rank in range(2)]
    assert [part[:, 0].tolist() for part in shards] == [[1, 2, 11, 12], [3, 4, 13, 14]]
    assert torch.equal(unshard(rule, shards), whole)


def test_columns_are_dealt_in_order():
    rule = rule_for(LAYER + "mlp.linear_fc2.weight")
    whole = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert shard(rule, whole, 1, 2).tolist() == [[3, 4], [7, 8]]


def test_the_vocabulary_is_padded_with_zeros_and_cut_again():
    heads = Heads(heads=1, kv_heads=1, head_dim=1, vocab=3, padded_vocab=8)
    rule = rule_for("embedding.word_embeddings.weight")
    whole = from_hf(rule, [torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])], heads)
    assert whole.tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]] + [[0.0, 0.0]] * 5
    whole[3:] = 9.0  # what training leaves in the padding is nobody's
    assert to_hf(rule, whole, heads)[0].tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("decoder.layers.0.mlp.router.weight", "decoder.layers.12.mlp.router.weight"),
        (
            "decoder.layers.10.mlp.experts.local_experts.3.linear_fc1.weight",
            "decoder.layers.22.mlp.experts.local_experts.7.linear_fc1.weight",
        ),
        ("decoder.layers.1.mlp.linear_fc1.weight", "decoder.layers.13.mlp.linear_fc1.weight"),  # not fc5
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
    ],
)
def test_names_count_over_the_whole_model(name, expected):
    assert globally_named(name, first_layer=12, first_expert=4) == expected
    assert globally_named(name, first_layer=0, first_expert=0) == name


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.mlp.linear_fc3.weight",
        "decoder.layers.0.mlp.linear_fc1.weight.extra",
        "decoder.layers.x.input_layernorm.weight",
        "module.embedding.word_embeddings.weight",
        "",
    ],
)
def test_an_unknown_parameter_is_a_bug(name):
    with pytest.raises(AssertionError, match=f"no rule for parameter {name}"):
        rule_for(name)


def test_an_unsplit_parameter_is_whole_on_every_rank():
    rule = Rule(("x",))
    whole = torch.arange(8)
    assert torch.equal(shard(rule, whole, 1, 4), whole)
    assert torch.equal(unshard(rule, [whole] * 4), whole)
