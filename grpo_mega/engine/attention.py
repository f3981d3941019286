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
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig


@dataclass
class PackedSequences(PackedSeqParams):
    """Where the sequences of a packed micro-batch lie, prepared once and used by every layer.

    Sequences are grouped into buckets whose longest is at most twice their shortest, so that each bucket is
    one dense attention call whose padding is less than half of its tokens. Megatron carries this object to
    the core attention (and into recomputation), and leaves the tensors alone as `qkv_format` is not "thd".

    Under context parallelism this rank has the queries [first, first + count) and, gathered, all keys. Only
    the sequence that began on an earlier rank then has fewer queries than keys: it is the straddling one.
    """

    first: int = 0
    bucket_rows_BS: list[torch.Tensor] = field(default_factory=list)  # of keys; queries stand `first` earlier
    straddling: tuple[int, int] | None = None  # its first key and the end of its queries and keys
    restore_T: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: torch.Tensor, first: int = 0, count: int | None = None
    ) -> PackedSequences:
        boundaries = cu_seqlens.to("cpu", torch.int64)
        count = int(boundaries[-1]) if count is None else count
        starts, ends = boundaries[:-1], boundaries[1:].clamp(max=first + count)
        lengths = (ends - starts).where(starts >= first, 0).clamp(min=0)  # of what begins here
        restore_T = torch.empty(count, dtype=torch.int64)
        rows, offset = [], 0
        bucket_of = torch.ceil(torch.log2(lengths.clamp(min=1).double())).to(torch.int64)
        for bucket in bucket_of[lengths > 0].unique().tolist():
            chosen = ((bucket_of == bucket) & (lengths > 0)).nonzero()[:, 0]
            column_S = torch.arange(int(lengths[chosen].max()))
            real_BS = column_S[None] < lengths[chosen][:, None]
            # Padding repeats the sequence's first token: behind every real token, so causally invisible to
            # all of them.
            rows_BS = starts[chosen][:, None] + torch.where(real_BS, column_S[None], 0)
            rows.append(rows_BS.to(cu_seqlens.device))
            flat_BS = offset + torch.arange(rows_BS.numel()).view_as(rows_BS)
            restore_T[rows_BS[real_BS] - first] = flat_BS[real_BS]
            offset += rows_BS.numel()
        straddling = None
        for index in ((starts < first) & (ends > first)).nonzero()[:, 0].tolist():
            straddling = int(starts[index]), int(ends[index])
            restore_T[: straddling[1] - first] = offset + torch.arange(straddling[1] - first)
        longest = int(boundaries.diff().max()) if boundaries.numel() > 1 else 0
        return cls(
            qkv_format="sbhd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            first=first,
            bucket_rows_BS=rows,
            straddling=straddling,
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
        pg_collection: Any = None,
        **_: Any,
    ):
        super().__init__()
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert dropout == 0.0, "grpo_mega trains without dropout: the sampler has none"
        self.scale = softmax_scale
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

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
        sequences, tokens = packed_seq_params, query.shape[0]
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        if self.cp_group is not None:  # backward: each rank's part of the sum over ranks
            key = gather_from_sequence_parallel_region(key, group=self.cp_group)
            value = gather_from_sequence_parallel_region(value, group=self.cp_group)
        outputs = []
        for rows_BS in sequences.bucket_rows_BS:
            q_BSND, k_BSKD, v_BSKD = (
                x.index_select(0, rows.flatten()).unflatten(0, rows.shape)
                for x, rows in ((query, rows_BS - sequences.first), (key, rows_BS), (value, rows_BS))
            )
            outputs.append(self._attend(q_BSND, k_BSKD, v_BSKD, None))
        if sequences.straddling is not None:
            start, end = sequences.straddling
            here = torch.arange(sequences.first, end, device=query.device)
            visible = torch.arange(start, end, device=query.device)[None] <= here[:, None]
            mine = slice(0, end - sequences.first)
            outputs.append(
                self._attend(query[None, mine], key[None, start:end], value[None, start:end], visible)
            )
        packed = torch.cat(outputs).index_select(0, sequences.restore_T)
        return packed.view(tokens, 1, -1)

    def _attend(
        self,
        q_BSND: torch.Tensor,
        k_BSKD: torch.Tensor,
        v_BSKD: torch.Tensor,
        visible: torch.Tensor | None,
    ) -> torch.Tensor:
        """[B x S, N x D]; causal unless told which keys each query sees."""
        out_BNSD = F.scaled_dot_product_attention(
            q_BSND.transpose(1, 2),
            k_BSKD.transpose(1, 2),
            v_BSKD.transpose(1, 2),
            attn_mask=visible,
            is_causal=visible is None,
            scale=self.scale,
            enable_gqa=q_BSND.shape[2] != k_BSKD.shape[2],
        )
        return out_BNSD.transpose(1, 2).flatten(0, 1).flatten(1)


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
