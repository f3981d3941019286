"""The Megatron policy is the Hugging Face model: log-probs, loss gradient and weights, on every layout up to
four ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo_mega.recipe.blocks import ModelBlock, ParallelBlock, TrainBlock
from grpo_mega.types import PackedBatch, TrainSequence
from tests import tiny
from tests.matrices import covering, covering_rows

LAYOUTS = {
    "one": {},
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2-vpp2": {"pp": 2, "vpp": 2},
    "dp2": {"dp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-pp2-sp-vpp2": {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True},
    "pp4": {"pp": 4},
    "dp2-tp2": {"dp": 2, "tp": 2},
    "cp2": {"cp": 2},
    "cp4": {"cp": 4},
    "cp2-tp2-sp": {"cp": 2, "tp": 2, "sequence_parallel": True},
    "cp2-pp2-vpp2": {"cp": 2, "pp": 2, "vpp": 2},
    "cp2-dp2": {"cp": 2, "dp": 2},
}


def _reference(directory: Path, sequences: list[TrainSequence]):
    """By transformers alone: each sequence's logits and log-probs, and the norm of the gradient of the mean
    response log-likelihood."""
    model = tiny.load_model(directory)
    logits, logprobs, total = {}, {}, torch.zeros(())
    tokens = sum(s.response_length for s in sequences)
    for s in sequences:
        ids = torch.from_numpy(s.token_ids)
        out = model(ids[None]).logits[0]
        lp = torch.log_softmax(out, -1)[:-1].gather(-1, ids[1:, None])[:, 0]
        logits[s.order] = out.detach()
        logprobs[s.order] = lp.detach()
        total = total - lp[s.prompt_length - 1 :].sum() / tokens
    total.backward()
    squares = [float((p.grad.double() ** 2).sum()) for p in model.parameters() if p.grad is not None]
    return logits, logprobs, math.sqrt(sum(squares))


def _negative_log_likelihood(tokens: int):
    from grpo_mega.engine.policy import LossTerms, TokenOutputs

    def loss(outputs: TokenOutputs, batch: PackedBatch) -> LossTerms:
        return LossTerms(-outputs.logprobs_T.where(batch.response_mask_T, 0.0).sum() / tokens, {})

    return loss


def _compute(directory: Path, layout_options: dict, sequences: list[TrainSequence], max_tokens: int):
    """On every rank: log-probs by order (last stage), gradient norm, and the exported tensors."""
    from transformers import AutoConfig

    from grpo_mega.data.packing import pack, plan_batch
    from grpo_mega.engine.device import device
    from grpo_mega.engine.parallel import initialize_layout
    from grpo_mega.engine.policy import PolicyEngine
    from grpo_mega.sync.stream import HfDirectory, heads_of, load_hf, stream_hf

    layout = initialize_layout(ParallelBlock(**layout_options), seed=0)
    hf = AutoConfig.from_pretrained(directory)
    block = ModelBlock(hf=str(directory), dtype="float32", vocab_multiple=8)
    engine = PolicyEngine(hf, block, TrainBlock(), layout)
    load_hf(engine.chunks, layout, heads_of(hf, 8), HfDirectory(directory))
    engine.weights_changed()
    plan = plan_batch(
        {s.order: s.length for s in sequences},
        layout.dp_size,
        max_tokens,
        micro_batch_multiple=layout.micro_batch_multiple,
        length_multiple=layout.length_multiple,
    )
    bins = plan.bins[layout.dp_rank]
    batches = [pack([sequences[order] for order in bin_], plan.padded_length, device()) for bin_ in bins]
    logprobs = {}
    everywhere = [replace(b, response_mask_T=torch.ones_like(b.response_mask_T)) for b in batches]
    for bin_, values in zip(bins, engine.logprobs(everywhere), strict=False):
        start = 0
        for order in bin_:
            logprobs[order] = values[start + 1 : start + sequences[order].length]
            start += sequences[order].length
    logits = _logits(engine, batches, bins, sequences)
    exported = {name: tensor.clone() for name, tensor in stream_hf(engine.chunks, layout, heads_of(hf, 8))}
    tokens = sum(s.response_length for s in sequences)
    _, update = engine.train_step(batches, _negative_log_likelihood(tokens), lr=0.0)
    return logprobs, update.grad_norm, exported, logits


def _logits(engine, batches, bins, sequences) -> dict[int, torch.Tensor]:
    """Whole rows of the vocabulary by order: the last stage's hidden states through its output layer,
    gathered over TP."""
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
    )

    from grpo_mega.engine.model import unwrap

    caught: list[torch.Tensor] = []
    last = unwrap(engine.chunks[-1])
    if not last.post_process:
        engine.logprobs(batches)
        return {}
    hook = last.decoder.register_forward_hook(lambda m, i, out: caught.append(out.detach().clone()))
    engine.logprobs(batches)
    hook.remove()
    weight = last.shared_embedding_or_output_weight() if last.share_embeddings_and_output_weights else None
    with torch.no_grad():
        caught = [last.output_layer(hidden, weight=weight)[0] for hidden in caught]
    logits = {}
    for bin_, shard in zip(bins, caught, strict=True):
        tokens = gather_from_sequence_parallel_region(shard, group=last.pg_collection.cp)
        whole, start = gather_from_tensor_model_parallel_region(tokens)[:, 0, : tiny.VOCAB], 0
        for order in bin_:
            logits[order] = whole[start : start + sequences[order].length]
            start += sequences[order].length
    return logits


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: tiny.save_model(family, root / family) for family in (*tiny.FAMILIES, "qwen3_moe")}


@pytest.mark.parametrize(
    ("family", "layout"),
    covering_rows(
        product(tiny.FAMILIES, LAYOUTS),
        # each layout once, each family on several; tied embeddings where they cross a split or a pipeline
        default={
            ("qwen2", "one"),
            ("qwen2", "tp2-sp"),
            ("qwen2", "dp2-tp2"),
            ("qwen2", "cp2"),
            ("qwen2-tied", "tp2"),
            ("qwen2-tied", "pp2"),
            ("qwen2-tied", "tp2-pp2-sp-vpp2"),
            ("qwen2-tied", "cp2-pp2-vpp2"),
            ("qwen3", "one"),
            ("qwen3", "pp4"),
            ("qwen3", "cp2-tp2-sp"),
            ("qwen3", "dp2"),
            ("llama", "one"),
            ("llama", "tp2-pp2"),
            ("llama", "pp2-vpp2"),
            ("llama", "cp2-dp2"),
            ("llama", "cp4"),
        },
    ),
)
def test_policy_equals_transformers(family, layout, models, ranks):
    _check_parity(family, LAYOUTS[layout], models, ranks)


@pytest.mark.parametrize(
    "options",
    covering(
        [
            {},
            {"dp": 2},
            {"dp": 2, "ep": 2},
            {"pp": 2},
            {"tp": 2, "sequence_parallel": True},
            {"cp": 2, "ep": 2},
        ],
        default=[{"dp": 2, "ep": 2}, {"pp": 2}, {"tp": 2, "sequence_parallel": True}],
    ),
    ids=str,
)
def test_mixture_of_experts_equals_transformers(options, models, ranks):
    _check_parity("qwen3_moe", options, models, ranks)


def _check_parity(family, options, models, ranks):
    sequences = tiny.random_sequences(12)
    expected_logits, expected, expected_norm = _reference(models[family], sequences)
    size = ParallelBlock(**options).world_size
    results = ranks(size).run(_compute, models[family], options, sequences, max_tokens=48)
    seen = {order: lp for logprobs, *_ in results for order, lp in logprobs.items()}
    seen_logits = {order: rows for *_, logits in results for order, rows in logits.items()}
    assert seen.keys() == expected.keys()
    for order, logprobs in expected.items():
        torch.testing.assert_close(seen_logits[order], expected_logits[order], atol=5e-5, rtol=1e-5)
        torch.testing.assert_close(seen[order], logprobs, atol=2e-5, rtol=1e-5)
    weights = load_file(models[family] / "model.safetensors")
    for _, norm, exported, _ in results:
        assert norm == pytest.approx(expected_norm, rel=1e-5)
        assert exported.keys() == weights.keys()
        for name, tensor in exported.items():
            assert torch.equal(tensor, weights[name]), name
