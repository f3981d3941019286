"""The policy loss as a run will compute it, against the slow float64 loops: before the first step, and for
`check-loss`.

# T packed tokens
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from grpo_mega.algo.objective import PolicyLoss
from grpo_mega.algo.reference import reference_policy_loss
from grpo_mega.certify import LENGTHS, Trial, Verdict, packed, trial
from grpo_mega.errors import UserError
from grpo_mega.kernels.implementation import Implementation
from grpo_mega.recipe.blocks import LossBlock

ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest difference from float64, relative to the largest magnitude."""


def against_the_oracle(
    config: LossBlock,
    implementation: Implementation,
    dtype: torch.dtype,
    device: torch.device,
    norm_length: int = 100,
) -> Verdict:
    """Value, per-token loss and gradients on a small random batch. bfloat16 rounds the inputs, for both
    sides."""
    batch = _rounded(trial(dtype=torch.float32), dtype)
    given: dict[str, Any] = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in packed(batch, batch.denominators, padding=5).items()
    }
    trainer_T = given.pop("trainer_logprobs_T").to(dtype).requires_grad_()
    entropy_T = given.pop("entropy_T").to(dtype).requires_grad_()
    loss = PolicyLoss(config, default_norm_length=norm_length, implementation=implementation)
    output = loss(trainer_logprobs_T=trainer_T, entropy_T=entropy_T, **given)
    output.loss.backward()
    on_cpu: dict[str, Any] = {
        name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in given.items()
    }
    expected = reference_policy_loss(
        config,
        trainer_logprobs_T=trainer_T.detach().cpu(),
        entropy_T=entropy_T.detach().cpu(),
        norm_length=norm_length,
        **on_cpu,
    )
    pairs = {
        "loss": (output.loss, torch.tensor(expected.loss)),
        "loss of a token": (output.per_token, expected.per_token_T),
        "gradient of the log-probabilities": (trainer_T.grad, expected.grad_trainer_T),
        "gradient of the entropies": (entropy_T.grad, expected.grad_entropy_T),
    }
    errors = {name: _distance(found, wanted) for name, (found, wanted) in pairs.items() if found is not None}
    worst = max(errors, key=lambda name: errors[name])
    law = f"{loss.implementation} agrees with float64 loops ({str(dtype).removeprefix('torch.')})"
    return Verdict(law, errors[worst], ALLOWED[dtype], worst)


def _rounded(batch: Trial, dtype: torch.dtype) -> Trial:
    """What the policy computes, through the dtype under test: the oracle then sees the very same numbers."""
    trainer = tuple(values.to(dtype).float() for values in batch.trainer)
    return replace(
        batch, trainer=trainer, entropy=tuple(values.to(dtype).float() for values in batch.entropy)
    )


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.detach().double().cpu(), wanted.double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))


def check_policy_loss(
    config: LossBlock, implementation: Implementation, device: torch.device, norm_length: int
) -> str:
    """Refuse to start with a loss that computes something else; what to print otherwise."""
    verdict = against_the_oracle(config, implementation, torch.float32, device, norm_length)
    if not verdict.holds:
        raise UserError(
            f"the policy loss is off by {verdict.worst:.1e} in the {verdict.detail}",
            where="train.kernels",
            law=f"{verdict.law}, to {verdict.allowed:g} on a batch of {len(LENGTHS)} sequences",
            remedy="set train.kernels: eager, and report the versions of torch and triton with this message",
        )
    missing = PolicyLoss(config, default_norm_length=norm_length, implementation=implementation).not_in_triton
    reason = f" (the Triton kernels do not know {missing})" if missing else ""
    return f"policy loss: {verdict.law}, within {verdict.worst:.0e}{reason}"
