"""What launch 2 of the policy loss sums up for metrics: the place of each quantity, and how it is stored."""

from __future__ import annotations

import triton
import triton.language as tl

from grpo_mega.kernels.weighting import TRACES, trace_codes

COLUMNS = tl.constexpr(4 * len(TRACES))  # of what a program stores

_CODES = trace_codes()
LOSS = tl.constexpr(_CODES["loss"])
POLICY = tl.constexpr(_CODES["policy"])
NOT_FINITE = tl.constexpr(_CODES["not_finite"])
RATIO = tl.constexpr(_CODES["ratio"])
LOG_RATIO_ABS = tl.constexpr(_CODES["log_ratio_abs"])
CLAMPED = tl.constexpr(_CODES["clamped"])
CUT = tl.constexpr(_CODES["cut"])
LOWER = tl.constexpr(_CODES["lower"])
ADVANTAGE = tl.constexpr(_CODES["advantage"])
LOGPROB = tl.constexpr(_CODES["logprob"])
FINAL_RATIO = tl.constexpr(_CODES["final_ratio"])
FINAL_WEIGHT = tl.constexpr(_CODES["final_weight"])
MISMATCH_ABS = tl.constexpr(_CODES["mismatch/abs"])
MISMATCH_K3 = tl.constexpr(_CODES["mismatch/k3"])
MISMATCH_TRAINER = tl.constexpr(_CODES["mismatch/trainer"])
MISMATCH_SAMPLER = tl.constexpr(_CODES["mismatch/sampler"])
MISMATCH_PRODUCT = tl.constexpr(_CODES["mismatch/product"])
REFERENCE = tl.constexpr(_CODES["reference"])
KL_TRACE = tl.constexpr(_CODES["kl"])
ENTROPY = tl.constexpr(_CODES["entropy"])
EMA_SMOOTHED = tl.constexpr(_CODES["ema/smoothed"])
EMA_CHANGE = tl.constexpr(_CODES["ema/change"])
EMA_RELATIVE = tl.constexpr(_CODES["ema/relative_change"])
ADAPTIVE_NORM = tl.constexpr(_CODES["gradient_adaptive/norm"])
ADAPTIVE_WEIGHT = tl.constexpr(_CODES["gradient_adaptive/weight"])
ADAPTIVE_CAPPED = tl.constexpr(_CODES["gradient_adaptive/capped"])
DECAY_WEIGHT = tl.constexpr(_CODES["temporal_decay/weight"])
TRUST = tl.constexpr(_CODES["ptrw/trust"])
CORRECTIVE = tl.constexpr(_CODES["ptrw/corrective"])
PTRW_LOSS = tl.constexpr(_CODES["ptrw/loss"])
POSITIVE = tl.constexpr(_CODES["asymmetric/positive"])
POSITIVE_CUT = tl.constexpr(_CODES["asymmetric/positive_cut"])
NEGATIVE_CUT = tl.constexpr(_CODES["asymmetric/negative_cut"])
CORRECTION_WEIGHT = tl.constexpr(_CODES["correction/weight"])
CORRECTION_ACTED = tl.constexpr(_CODES["correction/acted"])


@triton.jit
def trace(sums_ptr, values, valid, CODE: tl.constexpr):
    """Stores the sum of x - shift and, where asked for, the sum of its square, in float64, and the extremes
    of x."""
    sums_ptr += CODE // 8 * 4
    shifted = values.to(tl.float64)
    if CODE // 4 % 2 == 1:
        shifted -= 1.0
    shifted = tl.where(valid, shifted, 0.0)
    tl.store(sums_ptr, tl.sum(shifted, 0))
    if CODE // 2 % 2 == 1:
        tl.store(sums_ptr + 1, tl.sum(shifted * shifted, 0))
    if CODE % 2 == 1:
        tl.store(sums_ptr + 2, tl.min(tl.where(valid, values, float("inf")), 0))
        tl.store(sums_ptr + 3, tl.max(tl.where(valid, values, -float("inf")), 0))


@triton.jit
def count(sums_ptr, places, CODE: tl.constexpr):
    """Stores how many there are; `places` are valid ones."""
    tl.store(sums_ptr + CODE // 8 * 4, tl.sum(places.to(tl.float32), 0))
