"""Log-probability and entropy of a target token from logits whose vocabulary is split over tensor-parallel
ranks.

# T tokens, V columns of this rank's vocabulary shard
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def vocab_parallel_logprob(
    logits_TV: torch.Tensor,
    target_T: torch.Tensor,
    temperature: float,
    real_vocab: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(z)[target] and -sum p log p in float32, with z = logits / temperature.

    Columns at or beyond `real_vocab` are padding and have probability 0. Rank r holds columns [r V, (r + 1)
    V). Only the logits' storage is as large as the vocabulary: it is overwritten by the probabilities that
    the backward pass needs.

    Example: logits (0, ln 3), target 1, temperature 1 -> log-probability ln .75, entropy .75 ln(4/3) + .25 ln
    4.
    """
    return _VocabParallelLogprob.apply(logits_TV, target_T, temperature, real_vocab, group)


class _VocabParallelLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: torch.Tensor,
        target_T: torch.Tensor,
        temperature: float,
        real_vocab: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = logits_TV.shape[1]
        first = (dist.get_rank(group) if group is not None else 0) * width
        scaled_TV = logits_TV.float() / temperature
        real = max(0, min(width, real_vocab - first))
        scaled_TV[:, real:] = -torch.inf

        max_T = _reduce(scaled_TV.amax(1), dist.ReduceOp.MAX, group)
        scaled_TV -= max_T[:, None]
        column_T = target_T - first
        here_T = (column_T >= 0) & (column_T < width)
        column_T = column_T.clamp(0, width - 1)
        target_logit_T = scaled_TV.gather(1, column_T[:, None])[:, 0].where(here_T, 0.0)
        exp_TV = scaled_TV.exp()
        # -inf * 0 at the padding would be nan, where the limit of x e^x is 0
        weighted_T = (exp_TV * scaled_TV.nan_to_num(neginf=0.0)).sum(1)
        target_logit_T, sumexp_T, weighted_T = _reduce(
            torch.stack([target_logit_T, exp_TV.sum(1), weighted_T]), dist.ReduceOp.SUM, group
        )
        logsumexp_T = sumexp_T.log()
        entropy_T = logsumexp_T - weighted_T / sumexp_T
        ctx.save_for_backward(scaled_TV, logsumexp_T, entropy_T, column_T, here_T)
        ctx.temperature, ctx.dtype = temperature, logits_TV.dtype
        return target_logit_T - logsumexp_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """d logp = onehot - p;  d H = -p (log p + H)."""
        grad_logprob_T, grad_entropy_T = grads
        scaled_TV, logsumexp_T, entropy_T, column_T, here_T = ctx.saved_tensors
        logp_TV = scaled_TV - logsumexp_T[:, None]
        probability_TV = logp_TV.exp()
        inside_TV = logp_TV.nan_to_num_(neginf=0.0).add_(entropy_T[:, None]).mul_(grad_entropy_T[:, None])
        grad_TV = inside_TV.add_(grad_logprob_T[:, None]).mul_(probability_TV).neg_()
        grad_TV.scatter_add_(1, column_T[:, None], (grad_logprob_T * here_T)[:, None])
        return (grad_TV / ctx.temperature).to(ctx.dtype), None, None, None, None


def _reduce(
    tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> torch.Tensor:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, operation, group)
    return tensor
