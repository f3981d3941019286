"""Launch 3 of 3 of the policy loss: what a token's log-probability does to the ratios of other tokens.

A program for each sequence, from its last token to its first. Not launched where a token's ratio is its own.

# T packed tokens, B sequences
"""

from __future__ import annotations

import triton
import triton.language as tl

from grpo_mega.kernels.weighting_triton_parts import guarded_ratio, read, recurrence, valid_at


@triton.jit
def backward_kernel(
    trainer_ptr,
    base_ptr,
    valid_ptr,
    cu_seqlens_ptr,
    pull_ptr,
    factor_ptr,
    first_ptr,
    gradient_ptr,  # in and out, T
    beta,
    keep,
    SMOOTH: tl.constexpr,
    COUPLED: tl.constexpr,
    DIRECT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """COUPLED: every token of the sequence gets the sum of the pulls times its own factor. SMOOTH:

    h_t = pull_t + (1 - beta) h_{t+1},  d loss / d w_t = beta h_t, and h_0 at the first.

    The scan runs over tokens that are read in reverse: Triton's own reversed scans of pairs have been wrong.
    """
    number = tl.program_id(0)
    begin = tl.load(cu_seqlens_ptr + number).to(tl.int32)
    end = tl.load(cu_seqlens_ptr + number + 1).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((), tl.float32)
    if COUPLED:
        for start in range(begin, end, BLOCK):
            place = start + lane
            total += tl.sum(tl.load(pull_ptr + place, mask=place < end, other=0.0), 0)
    first = tl.load(first_ptr + number)
    carry = tl.zeros((), tl.float32)
    for start in range(0, end - begin, BLOCK):
        place = end - 1 - start - lane
        inside = place >= begin
        valid = valid_at(valid_ptr, place, inside)
        if COUPLED:
            pull = total * tl.load(factor_ptr + place, mask=valid, other=0.0)
        else:
            pull = tl.load(pull_ptr + place, mask=valid, other=0.0)
        if SMOOTH:
            factor = tl.where(valid, keep, 1.0)
            factor, added = tl.associative_scan((factor, pull), 0, recurrence)
            pull = factor * carry + added
            carry = tl.sum(tl.where(lane == BLOCK - 1, pull, 0.0), 0)
            pull = tl.where(place == first, pull, beta * pull)
        log_ratio = read(trainer_ptr, place, valid) - read(base_ptr, place, valid)
        _, slope = guarded_ratio(log_ratio)
        gradient = pull * slope
        if DIRECT:
            gradient += tl.load(gradient_ptr + place, mask=valid, other=0.0)
        tl.store(gradient_ptr + place, tl.where(valid, gradient, 0.0), mask=inside)
