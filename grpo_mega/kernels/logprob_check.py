"""`linear_logprob` as a run will compute it, against dense float64: before the first step.

# T tokens, H hidden, V vocabulary columns with their padding
"""

from __future__ import annotations

import torch

from grpo_mega.errors import UserError
from grpo_mega.kernels.implementation import Implementation
from grpo_mega.kernels.logprob import linear_logprob

ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference, relative to the largest magnitude. Logits are float32 whatever the format of their
factors; gradients are rounded to it."""
TOKENS, HIDDEN, VOCAB, PADDED, TILE = 24, 32, 1000, 1024, 384


def check_linear_logprob(implementation: Implementation, device: torch.device, dtype: torch.dtype) -> float:
    """The worst error; refuses to go on with a wrong one. Tails of tiles and padding are in it: peers lost
    runs to log-probabilities above 0 there."""
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=generator).to(device, dtype)
    weight_VH = torch.randn(PADDED, HIDDEN, generator=generator).to(device, dtype)
    target_T = torch.randint(VOCAB, (TOKENS,), generator=generator).to(device)
    target_T[0] = VOCAB - 1
    above_2T = torch.randn(2, TOKENS, generator=generator).to(device)
    found = _tiled(hidden_TH, weight_VH, target_T, above_2T, implementation)
    wanted = _dense(hidden_TH, weight_VH, target_T, above_2T)
    errors = {name: _distance(found[name], wanted[name]) for name in wanted}
    worst = max(errors, key=lambda name: errors[name])
    highest = float(found["log-probability"].max())
    if errors[worst] > ALLOWED[dtype] or highest > 0:
        raise UserError(
            f"log-probabilities are wrong: the {worst} is off by {errors[worst]:.1e}, "
            f"and the highest log-probability is {highest:.1e}",
            where="train.kernels",
            law=f"{implementation} equals float64 to {ALLOWED[dtype]:g} (relative to the largest magnitude), "
            "and no log-probability is above 0",
            remedy="set train.kernels: eager, and report the versions of torch and triton with this message",
        )
    return errors[worst]


def _tiled(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_T: torch.Tensor,
    above_2T: torch.Tensor,
    implementation: Implementation,
) -> dict[str, torch.Tensor]:
    leaves = [hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()]
    values = linear_logprob(
        leaves[0], leaves[1], target_T, 0.8, real_vocab=VOCAB, implementation=implementation, tile=TILE
    )
    gradients = torch.autograd.grad(values[:2], leaves, list(above_2T))
    return _named([*(value.detach() for value in values), *gradients])


def _dense(
    hidden_TH: torch.Tensor, weight_VH: torch.Tensor, target_T: torch.Tensor, above_2T: torch.Tensor
) -> dict[str, torch.Tensor]:
    leaves = [hidden_TH.double().requires_grad_(), weight_VH.double().requires_grad_()]
    logp_TV = (leaves[0] @ leaves[1].t() / 0.8)[:, :VOCAB].log_softmax(1)
    logprob_T = logp_TV.gather(1, target_T[:, None])[:, 0]
    entropy_T = -(logp_TV.exp() * logp_TV).sum(1)
    gradients = torch.autograd.grad([logprob_T, entropy_T], leaves, list(above_2T.double()))
    squared_T = logp_TV.detach().exp().square().sum(1)
    return _named([logprob_T.detach(), entropy_T.detach(), squared_T, *gradients])


def _named(values: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    names = (
        "log-probability",
        "entropy",
        "sum of squared probabilities",
        "hidden gradient",
        "weight gradient",
    )
    return dict(zip(names, values, strict=True))


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Infinite for what is not a number, which would compare as no error."""
    difference = (found.double() - wanted).abs().nan_to_num(nan=torch.inf)
    return float(difference.max() / wanted.abs().max())
