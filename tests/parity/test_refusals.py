"""What the trainer could load but would not compute as transformers does is refused, in words."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_mega.errors import UserError
from grpo_mega.recipe.blocks import ModelBlock, ParallelBlock, TrainBlock
from tests import tiny


def _load(directory):
    from grpo_mega.engine.parallel import initialize_layout
    from grpo_mega.engine.policy import PolicyEngine
    from grpo_mega.sync.stream import HfDirectory, heads_of, load_hf

    layout = initialize_layout(ParallelBlock(), seed=0)
    hf = AutoConfig.from_pretrained(directory)
    engine = PolicyEngine(hf, ModelBlock(hf="x", dtype="float32"), TrainBlock(), layout)
    try:
        load_hf(engine.chunks, layout, heads_of(hf, 128), HfDirectory(directory))
    except UserError as error:
        return str(error)
    return None


def test_weights_without_a_place_are_named(ranks, tmp_path):
    """A llama with biases: q, k, v would find a home, o and the feed-forward layer none."""
    config = tiny.hf_config("llama")
    config.attention_bias = config.mlp_bias = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (message,) = ranks(1).run(_load, tmp_path)
    assert "16 tensors" in message  # 4 layers x (o, gate, up, down)
    assert "model.layers.0.mlp.down_proj.bias" in message


def test_a_missing_weight_is_named(ranks, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny.save_model("qwen2", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.2.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (message,) = ranks(1).run(_load, tmp_path)
    assert "model.layers.2.mlp.up_proj.weight" in message


@pytest.mark.parametrize("key, value", [("hidden_act", "gelu"), ("use_sliding_window", True)])
def test_other_mathematics_are_refused(key, value):
    from grpo_mega.engine.model import check_supported

    config = tiny.hf_config("qwen2")
    check_supported(config)
    setattr(config, key, value)
    with pytest.raises(UserError, match=key):
        check_supported(config)
