"""Core attention and norm of the local (no Transformer Engine) layer spec, on torch's own kernels.

# T packed tokens, N query heads, K key/value heads, D head size, B sequences of one bucket, S their padded
# length
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig


@dataclass
class PackedSequences(PackedSeqParams):
    """Where the sequences of a packed micro-batch lie, prepared once and used by every layer.

    Sequences are grouped into buckets whose longest is at most twice their shortest, so that each bucket is
    one dense attention call that wastes less than half of its work. Megatron carries this object to the core
    attention (and into recomputation), and leaves the tensors alone because `qkv_format` is not "thd".
    """

    bucket_rows_BS: list[torch.Tensor] = field(default_factory=list)
    restore_T: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: torch.Tensor) -> PackedSequences:
        starts = cu_seqlens[:-1].to("cpu", torch.int64)
        lengths = cu_seqlens[1:].to("cpu", torch.int64) - starts
        bucket_of = torch.ceil(torch.log2(lengths.clamp(min=1).double())).to(torch.int64)
        total = int(cu_seqlens[-1])
        restore_T = torch.empty(total, dtype=torch.int64)
        rows, offset = [], 0
        for bucket in bucket_of[lengths > 0].unique().tolist():
            chosen = ((bucket_of == bucket) & (lengths > 0)).nonzero()[:, 0]
            column_S = torch.arange(int(lengths[chosen].max()))
            real_BS = column_S[None] < lengths[chosen][:, None]
            # Padding repeats the sequence's first token: behind every real token, so causally invisible to
            # all of them.
            rows_BS = starts[chosen][:, None] + torch.where(real_BS, column_S[None], 0)
            rows.append(rows_BS.to(cu_seqlens.device))
            flat_BS = offset + torch.arange(rows_BS.numel()).view_as(rows_BS)
            restore_T[rows_BS[real_BS]] = flat_BS[real_BS]
            offset += rows_BS.numel()
        longest = int(lengths.max()) if lengths.numel() else 0
        return cls(
            qkv_format="sbhd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            bucket_rows_BS=rows,
            restore_T=restore_T.to(cu_seqlens.device),
        )


class PackedCausalAttention(torch.nn.Module):
    """Causal attention within each sequence of a packed batch."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ):
        super().__init__()
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert dropout == 0.0, "grpo_mega trains without dropout: the sampler has none"
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,  # T, 1, N, D
        key: torch.Tensor,  # T, 1, K, D
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> torch.Tensor:
        assert packed_seq_params is not None and attention_mask is None and attention_bias is None
        tokens = query.shape[0]
        outputs = []
        for rows_BS in packed_seq_params.bucket_rows_BS:
            q, k, v = (
                x[:, 0].index_select(0, rows_BS.flatten()).unflatten(0, rows_BS.shape)
                for x in (query, key, value)
            )
            out_BNSD = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                is_causal=True,
                scale=self.scale,
                enable_gqa=q.shape[2] != k.shape[2],
            )
            outputs.append(out_BNSD.transpose(1, 2).reshape(rows_BS.numel(), -1))
        packed = torch.cat(outputs).index_select(0, packed_seq_params.restore_T)
        return packed.view(tokens, 1, -1)


class RMSNorm(torch.nn.Module):
    """Root mean square norm whose weight takes part in the sequence-parallel gradient reduction (the norm
    that ships with Megatron's local spec refuses sequence parallelism). Statistics in float32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normalized = F.rms_norm(x.float(), (x.shape[-1],), None, self.eps)
        return self.weight * normalized.to(x.dtype)
