"""Launch 2 of 3 of the policy loss: each token's loss and gradients, and the sums that metrics are made of.

A program for each block of the packed tokens, wherever sequences begin; what a token needs of its sequence it
reads from the table that launch 1 wrote. Sums are stored for each program, and added up in a fixed order
later: the same numbers every time.

# T packed tokens, B sequences
"""

from __future__ import annotations

import triton
import triton.language as tl

from grpo_mega.kernels.weighting_options import CLAMPED_BEYOND
from grpo_mega.kernels.weighting_triton_parts import (
    ACTED,
    CORRECTED,
    CREDIT_MEAN,
    DECAY_SCALE,
    LENGTH,
    LEVEL_RATIO,
    LOG_BOUND,
    SHARE,
    TARGET,
    TINY,
    TOP,
    adaptive_at,
    advantage_at,
    clipped,
    decay_at,
    gradient_norm,
    guarded_ratio,
    k3_of,
    kl_of,
    log_cut,
    read,
    valid_at,
    within,
)
from grpo_mega.kernels.weighting_triton_traces import (
    ADAPTIVE_CAPPED,
    ADAPTIVE_NORM,
    ADAPTIVE_WEIGHT,
    ADVANTAGE,
    CLAMPED,
    COLUMNS,
    CORRECTION_ACTED,
    CORRECTION_WEIGHT,
    CORRECTIVE,
    CUT,
    DECAY_WEIGHT,
    EMA_CHANGE,
    EMA_RELATIVE,
    EMA_SMOOTHED,
    ENTROPY,
    FINAL_RATIO,
    FINAL_WEIGHT,
    KL_TRACE,
    LOG_RATIO_ABS,
    LOGPROB,
    LOSS,
    LOWER,
    MISMATCH_ABS,
    MISMATCH_K3,
    MISMATCH_PRODUCT,
    MISMATCH_SAMPLER,
    MISMATCH_TRAINER,
    NEGATIVE_CUT,
    NOT_FINITE,
    POLICY,
    POSITIVE,
    POSITIVE_CUT,
    PTRW_LOSS,
    RATIO,
    REFERENCE,
    TRUST,
    count,
    trace,
)

BEYOND = tl.constexpr(CLAMPED_BEYOND)


@triton.jit
def token_kernel(
    trainer_ptr,
    base_ptr,  # log-probabilities below the ratio: the sampler's, or under a correction the proximal ones
    sampler_ptr,
    reference_ptr,
    entropy_ptr,
    sq_prob_ptr,
    weight_ptr,  # credit weights made elsewhere
    advantage_ptr,
    valid_ptr,
    cu_seqlens_ptr,
    sequence_ptr,
    position_ptr,
    smoothed_ptr,
    table_ptr,
    loss_ptr,  # out, T
    gradient_ptr,  # out, T: d loss / d log-probability, without what passes through launch 3
    entropy_gradient_ptr,  # out, T
    pull_ptr,  # out, T: d loss / d ratio, of the token or to be summed over its sequence
    factor_ptr,  # out, T: what that sum counts for at each token
    sums_ptr,  # out, programs x COLUMNS
    tokens,
    sequences,
    given,
    temperature,
    max_weight,
    log_gamma,
    alpha,
    tau,
    bottom_positive,
    top_positive,
    bottom_negative,
    top_negative,
    dual_bound,
    two_variances,
    log_low,
    log_high,
    min_ratio,
    max_ratio,
    log_cap,
    log_floor,
    kl_coef,
    entropy_coef,
    scale,
    SMOOTH: tl.constexpr,
    LEVEL: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    ADAPTIVE_INSIDE: tl.constexpr,
    DECAY: tl.constexpr,
    DECAY_INSIDE: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    DUAL: tl.constexpr,
    DETACH: tl.constexpr,
    KEEP_CORRECTIVE: tl.constexpr,
    SHARED: tl.constexpr,
    COUPLED: tl.constexpr,
    PULLED: tl.constexpr,
    CORRECTION: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
    KL: tl.constexpr,
    PER_LENGTH: tl.constexpr,
    TOKEN_ADVANTAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss as grpo_mega.algo.objective composes it, one token to a lane.

    Long because it holds the whole chain: nothing of it goes to memory in between.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums_ptr += tl.program_id(0).to(tl.int64) * COLUMNS
    there = place < tokens
    begin = tl.load(cu_seqlens_ptr).to(tl.int32)
    end = tl.load(cu_seqlens_ptr + sequences).to(tl.int32)
    valid = valid_at(valid_ptr, place, (place >= begin) & (place < end))
    number = tl.load(sequence_ptr + place, mask=valid, other=0)
    table_ptr += number
    length = tl.load(table_ptr + LENGTH * sequences, mask=valid, other=1.0)

    # read
    trainer = read(trainer_ptr, place, valid)
    sampler = read(sampler_ptr, place, valid)
    base = read(base_ptr, place, valid)
    log_ratio = trainer - base
    proximal = trainer
    if CORRECTION != "":
        proximal = base
    advantage = advantage_at(advantage_ptr, place, number, valid, given, TOKEN_ADVANTAGES)
    # 0, or nan where anything given is not finite: clamps would make a finite loss of it
    spoilt = trainer * 0.0 + sampler * 0.0 + base * 0.0 + advantage * 0.0

    # A. ratio and credit
    raw, slope = guarded_ratio(log_ratio)
    trace(sums_ptr, raw, valid, RATIO)
    distance = tl.abs(log_ratio)
    trace(sums_ptr, distance, valid, LOG_RATIO_ABS)
    count(sums_ptr, valid & (distance > BEYOND), CLAMPED)
    smoothed = raw
    if SMOOTH:
        smoothed = tl.load(smoothed_ptr + place, mask=valid, other=1.0)
        change = tl.abs(smoothed - raw)
        trace(sums_ptr, smoothed, valid, EMA_SMOOTHED)
        trace(sums_ptr, change, valid, EMA_CHANGE)
        trace(sums_ptr, change / raw, valid, EMA_RELATIVE)
    ratio = smoothed
    if LEVEL != "token":
        ratio = tl.load(table_ptr + LEVEL_RATIO * sequences, mask=valid, other=1.0)
    level = ratio
    credit = tl.full((BLOCK,), 1.0, tl.float32)  # inside the ratio
    weight = tl.full((BLOCK,), 1.0, tl.float32)
    if ADAPTIVE != "":
        norm = gradient_norm(trainer, sq_prob_ptr, place, valid, ADAPTIVE)
        if sq_prob_ptr is not None:
            spoilt += read(sq_prob_ptr, place, valid) * 0.0
        top = tl.load(table_ptr + TOP * sequences, mask=valid, other=0.0)
        share = tl.load(table_ptr + SHARE * sequences, mask=valid, other=0.0)
        adaptive, capped = adaptive_at(norm, top, share, length, temperature, max_weight)
        trace(sums_ptr, norm, valid, ADAPTIVE_NORM)
        trace(sums_ptr, adaptive, valid, ADAPTIVE_WEIGHT)
        count(sums_ptr, valid & capped, ADAPTIVE_CAPPED)
        if ADAPTIVE_INSIDE:
            credit *= adaptive
        else:
            weight *= adaptive
    if weight_ptr is not None:
        weight *= read(weight_ptr, place, valid)
    if DECAY != "":
        position = tl.load(position_ptr + place, mask=valid, other=0).to(tl.float32)
        decay = decay_at(position, length, log_gamma, alpha, tau, DECAY)
        decay *= tl.load(table_ptr + DECAY_SCALE * sequences, mask=valid, other=0.0)
        trace(sums_ptr, decay, valid, DECAY_WEIGHT)
        if DECAY_INSIDE:
            credit *= decay
        else:
            weight *= decay
    ratio *= credit
    trace(sums_ptr, ratio, valid, FINAL_RATIO)

    # B. objective: its value, and by what it rises with the ratio
    cut = valid & (there != there)
    lower = cut
    rise = tl.zeros((BLOCK,), tl.float32)
    direct = tl.zeros((BLOCK,), tl.float32)  # by what it rises with the log-probability itself
    factor = tl.full((BLOCK,), 1.0, tl.float32)
    if OBJECTIVE == "clip":
        kept, cut, lower = clipped(
            ratio,
            advantage,
            bottom_positive,
            top_positive,
            bottom_negative,
            top_negative,
            dual_bound,
            DUAL,
        )
        value = kept * advantage
        rise = tl.where(cut | lower, 0.0, advantage)
    elif OBJECTIVE == "clamp":
        bottom = tl.where(advantage > 0.0, bottom_positive, bottom_negative)
        top_end = tl.where(advantage > 0.0, top_positive, top_negative)
        kept = within(ratio, bottom, top_end)
        cut = kept != ratio
        value = kept * advantage
        rise = tl.where(cut, 0.0, advantage)
    elif OBJECTIVE == "cispo":
        direct = within(ratio, min_ratio, max_ratio) * advantage
        value = direct * trainer
    elif OBJECTIVE == "gmpo":
        target = tl.load(table_ptr + TARGET * sequences, mask=valid, other=1.0)
        _, cut = log_cut(ratio, advantage, log_low, log_high)
        value = target * advantage
        rise = advantage
        factor = tl.where(cut | (ratio < TINY), 0.0, target / (tl.maximum(ratio, TINY) * length))
    else:
        if OBJECTIVE == "ptrw_legacy":
            ratio = tl.load(table_ptr + TARGET * sequences, mask=valid, other=1.0)
            factor = 1.0 / length
        trust = tl.exp(-((ratio - 1.0) * (ratio - 1.0)) / two_variances)
        corrective = ((advantage > 0.0) & (ratio < 1.0)) | ((advantage < 0.0) & (ratio > 1.0))
        rise = trust
        if not DETACH:
            rise = trust * (1.0 - 2.0 * ratio * (ratio - 1.0) / two_variances)
        if KEEP_CORRECTIVE:
            trust = tl.where(corrective, 1.0, trust)
            rise = tl.where(corrective, 1.0, rise)
        value = trust * ratio * advantage
        rise *= advantage
        trace(sums_ptr, trust, valid, TRUST)
        count(sums_ptr, valid & corrective, CORRECTIVE)
        trace(sums_ptr, -value, valid, PTRW_LOSS)
    if ASYMMETRIC:
        count(sums_ptr, valid & (advantage > 0.0), POSITIVE)
        count(sums_ptr, valid & cut & (advantage > 0.0), POSITIVE_CUT)
        count(sums_ptr, valid & cut & (advantage <= 0.0), NEGATIVE_CUT)
    count(sums_ptr, valid & cut, CUT)
    count(sums_ptr, valid & lower, LOWER)
    trace(sums_ptr, advantage, valid, ADVANTAGE)
    trace(sums_ptr, trainer, valid, LOGPROB)

    # C. correction of the mismatch
    mismatch = proximal - sampler
    if CORRECTION != "":
        if BY_SEQUENCE:
            corrected = tl.load(table_ptr + CORRECTED * sequences, mask=valid, other=0.0)
            acted = tl.load(table_ptr + ACTED * sequences, mask=valid, other=0.0) > 0.0
        else:
            acted = mismatch > log_cap
            corrected = tl.exp(tl.minimum(mismatch, log_cap))
            if CORRECTION == "mis":
                acted = acted | (mismatch < log_floor)
                corrected = tl.where(acted, 0.0, corrected)
        trace(sums_ptr, corrected, valid, CORRECTION_WEIGHT)
        count(sums_ptr, valid & acted, CORRECTION_ACTED)
        weight *= corrected
    trace(sums_ptr, weight, valid, FINAL_WEIGHT)
    trainer_prob = tl.exp(proximal)
    sampler_prob = tl.exp(sampler)
    trace(sums_ptr, tl.abs(mismatch), valid, MISMATCH_ABS)
    trace(sums_ptr, k3_of(within(mismatch, -LOG_BOUND, LOG_BOUND)), valid, MISMATCH_K3)
    trace(sums_ptr, trainer_prob, valid, MISMATCH_TRAINER)
    trace(sums_ptr, sampler_prob, valid, MISMATCH_SAMPLER)
    # of a sure policy the products differ from 1 by less than float32 can say
    trace(sums_ptr, trainer_prob.to(tl.float64) * sampler_prob, valid, MISMATCH_PRODUCT)

    # D. loss and gradients
    aggregate = tl.zeros((BLOCK,), tl.float32) + scale
    if PER_LENGTH:
        aggregate = aggregate / length
    policy = -weight * value
    loss = policy
    gradient = -aggregate * weight * direct
    if KL != "":
        reference = read(reference_ptr, place, valid)
        spoilt += reference * 0.0
        kl, kl_slope = kl_of(reference - trainer, KL)
        trace(sums_ptr, reference, valid, REFERENCE)
        trace(sums_ptr, kl, valid, KL_TRACE)
        loss += kl_coef * kl
        gradient += aggregate * kl_coef * kl_slope
    if entropy_ptr is not None:
        entropy = read(entropy_ptr, place, valid)
        spoilt += entropy * 0.0
        trace(sums_ptr, entropy, valid, ENTROPY)
        loss -= entropy_coef * entropy
        if entropy_gradient_ptr is not None:
            tl.store(
                entropy_gradient_ptr + place, tl.where(valid, -entropy_coef * aggregate, 0.0), mask=there
            )
    loss += spoilt
    gradient += spoilt
    trace(sums_ptr, aggregate * loss, valid, LOSS)
    trace(sums_ptr, aggregate * (policy + spoilt), valid, POLICY)
    count(sums_ptr, valid & (spoilt != 0.0), NOT_FINITE)
    tl.store(loss_ptr + place, tl.where(valid, loss, 0.0), mask=there)

    pull = -aggregate * weight * rise
    if LEVEL == "amic" or LEVEL == "gspo":
        level_rise = 1.0 / length
        if LEVEL == "gspo":
            level_rise = level / (smoothed * length)
        if SHARED:
            factor *= (
                tl.load(table_ptr + CREDIT_MEAN * sequences, mask=valid, other=0.0) * length * level_rise
            )
        else:
            pull *= credit
            factor = level_rise
    else:
        local = credit
        if LEVEL == "gspo_token":
            local = credit * level / smoothed
        if SHARED:
            factor *= local
        else:
            pull *= local
    if PULLED:
        tl.store(pull_ptr + place, tl.where(valid, pull, 0.0), mask=there)
        if COUPLED:
            tl.store(factor_ptr + place, tl.where(valid, factor, 0.0), mask=there)
    elif OBJECTIVE != "cispo":
        gradient += pull * slope
    tl.store(gradient_ptr + place, tl.where(valid, gradient, 0.0), mask=there)
