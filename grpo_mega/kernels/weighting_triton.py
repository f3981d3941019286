"""Launch 1 of 3 of the policy loss: what depends on a whole sequence.

A program for each sequence walks over its packed tokens; masked ones are passed over as the identity of every
sum and of the scan. Compiles for Triton 3.6 to 3.9, and runs on CPU tensors under TRITON_INTERPRET=1.

# T packed tokens, B sequences
"""

from __future__ import annotations

import triton
import triton.language as tl

from grpo_mega.kernels.weighting_triton_parts import (
    ACTED,
    CORRECTED,
    CREDIT_MEAN,
    DECAY_LAST,
    DECAY_SCALE,
    DECAY_SUM,
    LENGTH,
    LEVEL_RATIO,
    SHARE,
    TARGET,
    TOKEN_VARIANCE,
    TOP,
    adaptive_at,
    advantage_at,
    decay_at,
    gradient_norm,
    guarded_ratio,
    log_cut,
    read,
    recurrence,
    valid_at,
)

NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def sequence_kernel(
    trainer_ptr,
    base_ptr,  # log-probabilities below the ratio: the sampler's, or under a correction the proximal ones
    sampler_ptr,
    sq_prob_ptr,
    advantage_ptr,
    valid_ptr,
    cu_seqlens_ptr,
    sequence_ptr,  # out, T: which sequence a token belongs to
    position_ptr,  # out, T: its place among the sequence's valid tokens
    smoothed_ptr,  # out, T: its ratio after the EMA
    first_ptr,  # out, B: where the first valid token lies
    table_ptr,  # out, rows x B
    sequences,
    given,
    beta,
    keep,
    temperature,
    max_weight,
    log_gamma,
    alpha,
    tau,
    log_low,
    log_high,
    log_cap,
    log_floor,
    SMOOTH: tl.constexpr,
    LEVEL: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    ADAPTIVE_INSIDE: tl.constexpr,
    DECAY: tl.constexpr,
    DECAY_INSIDE: tl.constexpr,
    INSIDE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    SHARED: tl.constexpr,
    WALKS: tl.constexpr,
    CORRECTION: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
    TOKEN_ADVANTAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First its length and the normalisers of the credit weights, then the scan and the sums over its ratios.

    Long because each part is a loop-carried sum, which a function of its own could not be.
    """
    number = tl.program_id(0)
    begin = tl.load(cu_seqlens_ptr + number).to(tl.int32)
    end = tl.load(cu_seqlens_ptr + number + 1).to(tl.int32)
    table_ptr += number
    lane = tl.arange(0, BLOCK)
    own = tl.zeros((BLOCK,), tl.int32) + number

    count = tl.zeros((), tl.int32)
    first = tl.full((), NOWHERE, tl.int32)
    top = tl.zeros((), tl.float32)  # no norm is below 0
    power = tl.zeros((), tl.float32)
    mismatch = tl.zeros((), tl.float64)  # a sum of -80 in float32 would be off by 8e-6 in its exponential
    for start in range(begin, end, BLOCK):
        place = start + lane
        inside = place < end
        valid = valid_at(valid_ptr, place, inside)
        tl.store(sequence_ptr + place, own, mask=inside)
        if DECAY != "":
            position = count + tl.cumsum(valid.to(tl.int32), 0) - 1
            tl.store(position_ptr + place, position, mask=valid)
        first = tl.minimum(first, tl.min(tl.where(valid, place, NOWHERE), 0))
        count += tl.sum(valid.to(tl.int32), 0)
        if ADAPTIVE != "":
            norm = gradient_norm(read(trainer_ptr, place, valid), sq_prob_ptr, place, valid, ADAPTIVE)
            logit = norm / temperature
            new = tl.maximum(top, tl.max(logit, 0))
            power = power * tl.exp(top - new) + tl.sum(tl.where(valid, tl.exp(logit - new), 0.0), 0)
            top = new
        if BY_SEQUENCE:
            delta = read(base_ptr, place, valid) - read(sampler_ptr, place, valid)
            mismatch += tl.sum(delta.to(tl.float64), 0)
    length = count.to(tl.float32)
    at_least_1 = tl.maximum(length, 1.0)
    tl.store(first_ptr + number, first)
    tl.store(table_ptr + LENGTH * sequences, length)

    share = tl.zeros((), tl.float32)
    if ADAPTIVE != "":
        share = length / tl.maximum(power, 1.0)
        tl.store(table_ptr + TOP * sequences, top)
        tl.store(table_ptr + SHARE * sequences, share)

    decay_scale = tl.full((), 1.0, tl.float32)
    if DECAY != "":
        total = tl.zeros((), tl.float32)
        for start in range(0, count, BLOCK):
            position = start + lane
            weight = decay_at(position.to(tl.float32), length, log_gamma, alpha, tau, DECAY)
            total += tl.sum(tl.where(position < count, weight, 0.0), 0)
        if NORMALIZE == "mean":
            decay_scale = length / tl.maximum(total, 1e-30)
        if NORMALIZE == "sum":
            decay_scale = tl.minimum(length, 1.0) / tl.maximum(total, 1e-30)
        last = decay_at(tl.maximum(length - 1.0, 0.0), length, log_gamma, alpha, tau, DECAY)
        tl.store(table_ptr + DECAY_SCALE * sequences, decay_scale)
        tl.store(table_ptr + DECAY_SUM * sequences, total * decay_scale)
        tl.store(table_ptr + DECAY_LAST * sequences, last * decay_scale)

    if BY_SEQUENCE:
        acted = mismatch > log_cap
        corrected = tl.exp(tl.minimum(mismatch, log_cap)).to(tl.float32)
        if CORRECTION == "mis":
            acted = acted | (mismatch < log_floor)
            corrected = tl.where(acted, 0.0, corrected)
        tl.store(table_ptr + CORRECTED * sequences, corrected)
        tl.store(table_ptr + ACTED * sequences, acted.to(tl.float32))

    if WALKS:
        seen = tl.zeros((), tl.int32)
        counted = tl.zeros((), tl.float32)
        mean = tl.zeros((), tl.float32)  # of ratio - 1
        spread = tl.zeros((), tl.float32)  # sum of squares around the mean
        log_total = tl.zeros((), tl.float32)
        credit_total = tl.zeros((), tl.float32)
        target_total = tl.zeros((), tl.float32)
        carry = tl.zeros((), tl.float32)
        for start in range(begin, end, BLOCK):
            place = start + lane
            valid = valid_at(valid_ptr, place, place < end)
            trainer = read(trainer_ptr, place, valid)
            ratio, _ = guarded_ratio(trainer - read(base_ptr, place, valid))
            if SMOOTH:
                opens = place == first
                factor = tl.where(valid, tl.where(opens, 0.0, keep), 1.0)
                added = tl.where(valid, tl.where(opens, ratio, beta * ratio), 0.0)
                factor, added = tl.associative_scan((factor, added), 0, recurrence)
                smoothed = factor * carry + added
                carry = tl.sum(tl.where(lane == BLOCK - 1, smoothed, 0.0), 0)
                tl.store(smoothed_ptr + place, smoothed, mask=valid)
                ratio = tl.where(valid, smoothed, 1.0)
            here = tl.sum(valid.to(tl.float32), 0)
            both = tl.maximum(counted + here, 1.0)
            if LEVEL != "token":
                # each block around its own mean, then both around the common one
                deviation = tl.where(valid, ratio - 1.0, 0.0)
                part = tl.sum(deviation, 0) / tl.maximum(here, 1.0)
                rest = tl.where(valid, deviation - part, 0.0)
                spread += tl.sum(rest * rest, 0) + (part - mean) * (part - mean) * counted * here / both
                mean += (part - mean) * here / both
            if LEVEL == "gspo" or LEVEL == "gspo_token":
                log_total += tl.sum(tl.where(valid, tl.log(ratio), 0.0), 0)
            counted += here
            if SHARED:
                credit = tl.full((BLOCK,), 1.0, tl.float32)
                if ADAPTIVE_INSIDE:
                    norm = gradient_norm(trainer, sq_prob_ptr, place, valid, ADAPTIVE)
                    weight, _ = adaptive_at(norm, top, share, length, temperature, max_weight)
                    credit *= weight
                if DECAY_INSIDE:
                    position = seen + tl.cumsum(valid.to(tl.int32), 0) - 1
                    position = tl.maximum(position, 0).to(tl.float32)
                    credit *= decay_at(position, length, log_gamma, alpha, tau, DECAY) * decay_scale
                    seen += tl.sum(valid.to(tl.int32), 0)
                credit_total += tl.sum(tl.where(valid, credit, 0.0), 0)
                final = ratio * credit
                if OBJECTIVE == "gmpo":
                    advantage = advantage_at(advantage_ptr, place, own, valid, given, TOKEN_ADVANTAGES)
                    final, _ = log_cut(final, advantage, log_low, log_high)
                elif not INSIDE:
                    final -= 1.0  # exact near 1; weights inside the ratio can bring it near 0 instead
                target_total += tl.sum(tl.where(valid, final, 0.0), 0)
        level = 1.0 + mean
        if LEVEL == "gspo" or LEVEL == "gspo_token":
            level = tl.exp(log_total / at_least_1)
        if LEVEL != "token":
            tl.store(table_ptr + LEVEL_RATIO * sequences, level)
            tl.store(table_ptr + TOKEN_VARIANCE * sequences, spread / at_least_1)
        target = target_total / at_least_1
        credit_mean = credit_total / at_least_1
        if OBJECTIVE == "gmpo":
            tl.store(table_ptr + TARGET * sequences, tl.exp(target))
        if OBJECTIVE == "ptrw_legacy":
            if LEVEL != "token":
                target = level * credit_mean
            elif not INSIDE:
                target += 1.0
            tl.store(table_ptr + TARGET * sequences, target)
            tl.store(table_ptr + CREDIT_MEAN * sequences, credit_mean)
