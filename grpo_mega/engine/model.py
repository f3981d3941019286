"""A Hugging Face model as a Megatron model: its shape from the config, its layers from the local or
Transformer Engine spec; and the policy, which is one.

# T packed tokens of a micro-batch (T / tp under sequence parallelism), H hidden, V vocabulary shard
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from grpo_mega.engine.attention import PackedCausalAttention, PackedSequences, RMSNorm
from grpo_mega.engine.device import device, transformer_engine_available
from grpo_mega.engine.parallel import Layout, holds_stage
from grpo_mega.errors import UserError
from grpo_mega.kernels.implementation import Implementation
from grpo_mega.kernels.logprob import linear_logprob
from grpo_mega.recipe.blocks import ModelBlock
from grpo_mega.types import PackedBatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PackedModel(GPTModel):
    """One pipeline chunk of a transformer over packed sequences; what its last stage returns is its
    subclass's."""

    predicts_tokens = True  # false: the last stage has a head of its own, not the vocabulary's

    def __init__(self, *args: Any, inv_freq: torch.Tensor, thd: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rope_inv_freq = inv_freq
        self.thd = thd

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """[T, 1, H] of this rank's tokens."""
        here = self.slice_of_this_rank(batch)
        embedded = None
        if self.pre_process:
            embedded = self.embedding(
                input_ids=batch.tokens_T[None, here], position_ids=batch.positions_T[None, here]
            )
        return self.decoder(
            hidden_states=embedded,
            attention_mask=None,
            rotary_pos_emb=self._rotary(batch, here),
            packed_seq_params=self._sequences(batch, here),
        )

    def slice_of_this_rank(self, batch: PackedBatch) -> slice:
        """Context parallelism cuts the packed tokens, wherever sequences begin or end."""
        size = batch.tokens_T.shape[0] // self.config.context_parallel_size
        rank = self.pg_collection.cp.rank() if self.config.context_parallel_size > 1 else 0
        return slice(rank * size, (rank + 1) * size)

    def gathered_over_cp(self, outputs_T: torch.Tensor) -> torch.Tensor:
        """A few numbers a token, [T of this rank, ...]: every rank gets them all and computes the whole loss,
        of whose gradient it then keeps its own tokens' part."""
        if self.config.context_parallel_size == 1:
            return outputs_T
        return gather_from_sequence_parallel_region(
            outputs_T.contiguous(), tensor_parallel_output_grad=False, group=self.pg_collection.cp
        )

    def _rotary(self, batch: PackedBatch, here: slice) -> torch.Tensor:
        """Angles: for every token its own (local attention), or for every position (Transformer Engine's thd
        kernels)."""
        inv_freq = self.rope_inv_freq = self.rope_inv_freq.to(batch.positions_T.device)
        positions = (
            torch.arange(batch.max_seqlen, device=inv_freq.device) if self.thd else batch.positions_T[here]
        )
        angles = positions.float()[:, None] * inv_freq[None]
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]

    def _sequences(self, batch: PackedBatch, here: slice) -> PackedSeqParams:
        if not self.thd:
            return PackedSequences.from_cu_seqlens(batch.cu_seqlens, here.start, here.stop - here.start)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
        )


class PolicyModel(PackedModel):
    """Its last stage returns three numbers for each token instead of logits, so that nothing is ever as wide
    as the vocabulary."""

    def __init__(self, *args: Any, real_vocab: int, kernels: Implementation, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.real_vocab = real_vocab
        self.kernels: Implementation = kernels

    def forward(self, batch: PackedBatch, temperature: float) -> torch.Tensor:
        """Hidden states [T, 1, H], or on the last stage [3, T] float32: log-probability of `targets_T`,
        entropy, sum of squared probabilities; 0 where the next token is none of a response's."""
        hidden = self.hidden_states(batch)
        if not self.post_process:
            return hidden
        here = self.slice_of_this_rank(batch)
        tied = self.share_embeddings_and_output_weights
        outputs = torch.stack(
            linear_logprob(
                hidden[:, 0],
                self.shared_embedding_or_output_weight() if tied else self.output_layer.weight,
                batch.targets_T[here],
                temperature,
                self.pg_collection.tp,
                real_vocab=self.real_vocab,
                needed_T=_predicts_a_response(batch)[here],
                sequence_parallel=self.config.sequence_parallel,
                implementation=self.kernels,
            )
        )
        return self.gathered_over_cp(outputs.t()).t()


def _predicts_a_response(batch: PackedBatch) -> torch.Tensor:
    """Positions whose next token is one of a response: no other's log-probability is ever looked at."""
    return torch.roll(batch.response_mask_T, -1)


def check_supported(hf: PretrainedConfig) -> None:
    """Refuse what would load and then compute something else."""
    unsupported = {
        "hidden_act": getattr(hf, "hidden_act", "silu") != "silu",
        "use_sliding_window": bool(getattr(hf, "use_sliding_window", False)),
        "mlp_only_layers": bool(getattr(hf, "mlp_only_layers", None)),
        "decoder_sparse_step": getattr(hf, "decoder_sparse_step", 1) != 1,
        "attention_dropout": getattr(hf, "attention_dropout", 0.0) != 0.0,
    }
    for key, broken in unsupported.items():
        if broken:
            raise UserError(
                f"the model's {key} is {getattr(hf, key)!r}, which is not supported",
                where=f"model.hf (config.json: {key})",
                law="the trainer computes exactly what transformers computes, or refuses",
                remedy="use a qwen2, qwen3, llama or qwen3_moe model without this feature",
            )


def transformer_config(hf: PretrainedConfig, block: ModelBlock, layout: Layout) -> TransformerConfig:
    """Megatron's description of a Hugging Face model. Dropout is 0: the sampler has none."""
    heads = hf.num_attention_heads
    family = hf.model_type
    bf16 = block.dtype == "bfloat16"
    local = not uses_transformer_engine(block, layout)
    interleaved = layout.vpp_size > 1
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=getattr(hf, "head_dim", None) or hf.hidden_size // heads,
        ffn_hidden_size=hf.intermediate_size,
        layernorm_epsilon=hf.rms_norm_eps,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=family == "qwen2" or bool(getattr(hf, "attention_bias", False)),
        qk_layernorm=family in ("qwen3", "qwen3_moe"),
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=DTYPES[block.dtype],
        pipeline_dtype=DTYPES[block.dtype],
        bf16=bf16,
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        virtual_pipeline_model_parallel_size=layout.vpp_size if interleaved else None,
        context_parallel_size=layout.cp_size,
        expert_model_parallel_size=layout.ep_size,
        sequence_parallel=layout.sequence_parallel,
        # Batched point-to-point calls corrupt gradients silently under interleaving at pp = 2.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # gradients are SUMMED over data parallel: our denominators are global already
        calculate_per_token_loss=True,
        # the weights are loaded afterwards; initialising on the host needs no seeded kernels
        use_cpu_initialization=True,
        perform_initialization=False,  # see mark_tensor_parallel
        masked_softmax_fusion=not local,
        bias_dropout_fusion=not local,
        apply_rope_fusion=not local,
        gradient_accumulation_fusion=False,
        **_recompute(block),
        **_mixture_of_experts(hf),
    )


def _recompute(block: ModelBlock) -> dict[str, Any]:
    if block.recompute == "none":
        return {}
    if block.recompute == "selective":
        return {"recompute_granularity": "selective"}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _mixture_of_experts(hf: PretrainedConfig) -> dict[str, Any]:
    if hf.model_type != "qwen3_moe":
        return {}
    return {
        "num_moe_experts": hf.num_experts,
        "moe_ffn_hidden_size": hf.moe_intermediate_size,
        "moe_router_topk": hf.num_experts_per_tok,
        "moe_router_pre_softmax": not hf.norm_topk_prob,
        # rewards alone shape the routing: no auxiliary loss
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_aux_loss_coeff": 0.0,
    }


def uses_transformer_engine(block: ModelBlock, layout: Layout) -> bool:
    if layout.cp_size > 1:  # a law of the recipe: context parallelism is the local attention's
        return False
    if block.attention == "transformer_engine" and not transformer_engine_available():
        raise UserError(
            "model.attention is transformer_engine, which cannot be used here",
            where="model.attention",
            law="Transformer Engine needs a GPU and its package",
            remedy="pip install 'grpo-mega[gpu]' on a GPU machine, or set model.attention: auto",
        )
    return block.attention != "local" and transformer_engine_available()


def layer_spec(config: TransformerConfig, use_te: bool) -> ModuleSpec:
    if use_te:
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm
        )
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    layer.self_attention.submodules.core_attention = PackedCausalAttention
    if config.qk_layernorm:
        layer.self_attention.submodules.q_layernorm = layer.self_attention.submodules.k_layernorm = RMSNorm
    return spec


def padded_vocab(vocab: int, multiple: int) -> int:
    return -(-vocab // multiple) * multiple


def rope_inv_freq(hf: PretrainedConfig) -> torch.Tensor:
    """Inverse frequencies by transformers' own functions, so that every scaling of theirs (llama3, linear, …)
    agrees."""
    rope = getattr(hf, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind in ROPE_INIT_FUNCTIONS:
        inv_freq, amplitude = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"))
        if amplitude != 1.0:
            raise UserError(
                f"the model's rotary embedding of type {kind} scales amplitudes by {amplitude}",
                where="model.hf (config.json: rope_parameters)",
                law="rotary embeddings with an amplitude (yarn, longrope) are not supported",
                remedy="use a model with rope_type default, linear or llama3",
            )
        return inv_freq
    size = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    theta = rope.get("rope_theta") or getattr(hf, "rope_theta", 10000.0)
    return 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size))


def build_chunks(
    hf: PretrainedConfig, block: ModelBlock, layout: Layout, kernels: Implementation
) -> tuple[TransformerConfig, list[torch.nn.Module]]:
    """The policy's pipeline chunks on this rank."""
    make = partial(
        PolicyModel,
        real_vocab=hf.vocab_size,
        kernels=kernels,
        share_embeddings_and_output_weights=bool(hf.tie_word_embeddings),
    )
    return assemble_chunks(hf, block, layout, make)


def assemble_chunks(
    hf: PretrainedConfig, block: ModelBlock, layout: Layout, make: Callable[..., PackedModel]
) -> tuple[TransformerConfig, list[torch.nn.Module]]:
    """This rank's pipeline chunks (one, or vpp of them), on its device, with uninitialised weights."""
    check_supported(hf)
    config = transformer_config(hf, block, layout)
    use_te = uses_transformer_engine(block, layout)
    inv_freq = rope_inv_freq(hf)
    chunks: list[torch.nn.Module] = []
    for index in range(layout.vpp_size):
        vp_stage = index if layout.vpp_size > 1 else None
        spec: Any = layer_spec(config, use_te)
        if not use_te:  # the block's final norm follows the layers' own
            count = get_num_layers_to_build(config, vp_stage=vp_stage)
            spec = TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=RMSNorm)
        chunk: torch.nn.Module = make(
            config,
            spec,
            padded_vocab(hf.vocab_size, block.vocab_multiple),
            hf.max_position_embeddings,
            pre_process=holds_stage(vp_stage, first=True),
            post_process=holds_stage(vp_stage, first=False),
            position_embedding_type="rope",
            vp_stage=vp_stage,
            inv_freq=inv_freq,
            thd=use_te,
        )
        mark_tensor_parallel(chunk)
        chunk = chunk.to(device())
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    return config, chunks


def mark_tensor_parallel(chunk: torch.nn.Module) -> None:
    """Megatron marks its sharded weights only while it initialises them, which is skipped here (on the host
    it would draw every whole matrix). Unmarked shards would be counted on one tensor-parallel rank only in
    the gradient norm."""
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding) and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, True, 0, 1)
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(module.weight, True, 1, 1)


def unwrap(chunk: torch.nn.Module) -> PackedModel:
    """The model inside Megatron's data-parallel and precision wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module  # type: ignore[assignment]
    assert isinstance(chunk, PackedModel)
    return chunk
