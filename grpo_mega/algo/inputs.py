"""What a policy loss is given, checked and laid out in rows.

# T packed tokens, B sequences, R rows of W valid tokens
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grpo_mega.algo.rows import Rows, rows_of


@dataclass(frozen=True, slots=True)
class LossInputs:
    """A packed micro-batch; None: not given, or not read by this loss."""

    trainer_T: torch.Tensor
    sampler_T: torch.Tensor
    advantages: torch.Tensor  # B or T
    cu_seqlens: torch.Tensor
    reference_T: torch.Tensor | None = None
    entropy_T: torch.Tensor | None = None
    sq_prob_T: torch.Tensor | None = None
    response_mask_T: torch.Tensor | None = None
    proximal_T: torch.Tensor | None = None
    segments_T: torch.Tensor | None = None
    uids: tuple[str, ...] | None = None


def row_inputs(inputs: LossInputs, *, reject: bool) -> tuple[Rows, dict[str, torch.Tensor]]:
    """Rows of every given per-token value by name. float64 stays, all else is computed in float32.

    `reject`: a value that is not finite is an error.
    """
    trainer_T = inputs.trainer_T
    mask_T = inputs.response_mask_T
    mask_T = torch.ones_like(trainer_T, dtype=torch.bool) if mask_T is None else mask_T.bool()
    rows = rows_of(inputs.cu_seqlens, mask_T)
    dtype = torch.float64 if trainer_T.dtype == torch.float64 else torch.float32
    per_token = {
        "trainer": trainer_T,
        "sampler": inputs.sampler_T,
        "reference": inputs.reference_T,
        "entropy": inputs.entropy_T,
        "sq_prob": inputs.sq_prob_T,
        "proximal": inputs.proximal_T,
    }
    given = {
        name: rows.of_tokens(values.to(dtype)) for name, values in per_token.items() if values is not None
    }
    given["advantage"] = _advantages(inputs, rows).to(dtype)
    if reject:
        _reject_what_is_not_finite(given, rows, inputs.uids)
    if inputs.segments_T is not None:
        given["segment"] = rows.of_tokens(inputs.segments_T)
    return rows, given


def _advantages(inputs: LossInputs, rows: Rows) -> torch.Tensor:
    advantages = inputs.advantages
    if advantages.shape == inputs.trainer_T.shape and advantages.shape[0] != inputs.cu_seqlens.shape[0] - 1:
        return rows.of_tokens(advantages)
    # The padding is a sequence too, of no valid token and without an advantage.
    missing = rows.sequences - advantages.shape[0]
    assert missing >= 0, (advantages.shape, rows.sequences)
    return rows.spread(torch.cat([advantages, advantages.new_zeros(missing)])).expand_as(rows.index_RW)


def _reject_what_is_not_finite(
    given: dict[str, torch.Tensor], rows: Rows, uids: tuple[str, ...] | None
) -> None:
    """A single nan would make every weight nan at the next step, with nothing to tell where it came from."""
    # tokens that are not valid are 0 here, and a sum over anything that is not finite is not finite
    sums = torch.stack([values.detach().sum(dtype=torch.float64) for values in given.values()])
    if bool(sums.isfinite().all()):
        return
    for name, values_RW in given.items():
        wrong_RW = ~values_RW.detach().isfinite() & rows.valid_RW
        if bool(wrong_RW.any()):
            place = tuple(int(index) for index in wrong_RW.nonzero()[0])
            sample, token = int(rows.sequence_R[place[0]]), int(rows.position_RW[place])
            named = f" ({uids[sample]})" if uids is not None and sample < len(uids) else ""
            value = float(values_RW.detach()[place])
            raise ValueError(
                f"{name} is {value} at response token {token} of sample {sample}{named}, "
                f"packed position {int(rows.index_RW[place])}: "
                f"{int(wrong_RW.sum())} such tokens"
            )
