"""Arithmetic that several kernels of the policy loss share: the guarded ratio, the credit weights, what is
read for a token.

Everything is computed in float32, whatever the format of the inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grpo_mega.kernels.weighting import TABLE
from grpo_mega.kernels.weighting_options import (
    LOG_RATIO_BOUND,
    NEGLIGIBLE_EXPONENT,
    RATIO_BOUNDS,
    SMALLEST_RATIO,
)

LOG_BOUND = tl.constexpr(LOG_RATIO_BOUND)
LOWEST_RATIO = tl.constexpr(RATIO_BOUNDS[0])
HIGHEST_RATIO = tl.constexpr(RATIO_BOUNDS[1])
NEGLIGIBLE = tl.constexpr(NEGLIGIBLE_EXPONENT)
TINY = tl.constexpr(SMALLEST_RATIO)
LOG_2 = tl.constexpr(0.6931471805599453)

# rows of the table of sequences
LENGTH = tl.constexpr(TABLE.index("length"))
LEVEL_RATIO = tl.constexpr(TABLE.index("level"))
TOKEN_VARIANCE = tl.constexpr(TABLE.index("token_variance"))
TOP = tl.constexpr(TABLE.index("top"))
SHARE = tl.constexpr(TABLE.index("share"))
DECAY_SCALE = tl.constexpr(TABLE.index("decay_scale"))
DECAY_SUM = tl.constexpr(TABLE.index("decay_sum"))
DECAY_LAST = tl.constexpr(TABLE.index("decay_last"))
CORRECTED = tl.constexpr(TABLE.index("correction"))
ACTED = tl.constexpr(TABLE.index("acted"))
TARGET = tl.constexpr(TABLE.index("target"))
CREDIT_MEAN = tl.constexpr(TABLE.index("credit_mean"))


@triton.jit
def within(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def valid_at(valid_ptr, place, inside):
    """Which tokens of a block count."""
    valid = inside
    if valid_ptr is not None:
        valid = inside & (tl.load(valid_ptr + place, mask=inside, other=0) != 0)
    return valid


@triton.jit
def read(value_ptr, place, valid):
    """0 where there is no token: what is masked is never read."""
    return tl.load(value_ptr + place, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def advantage_at(advantage_ptr, place, sequence, valid, given, TOKEN_ADVANTAGES: tl.constexpr):
    """Of the token, or of its sequence; padding beyond the `given` ones has none."""
    if TOKEN_ADVANTAGES:
        advantage = read(advantage_ptr, place, valid)
    else:
        advantage = read(advantage_ptr, sequence, valid & (sequence < given))
    return advantage


@triton.jit
def guarded_ratio(log_ratio):
    """clamp(exp(clamp(l))) and its derivative by l."""
    ratio = tl.exp(within(log_ratio, -LOG_BOUND, LOG_BOUND))
    free = (log_ratio >= -LOG_BOUND) & (log_ratio <= LOG_BOUND)
    free = free & (ratio >= LOWEST_RATIO) & (ratio <= HIGHEST_RATIO)
    return within(ratio, LOWEST_RATIO, HIGHEST_RATIO), tl.where(free, ratio, 0.0)


@triton.jit
def recurrence(factor, value, later_factor, later_value):
    """y -> factor y + value, then y -> later_factor y + later_value."""
    return factor * later_factor, later_factor * value + later_value


@triton.jit
def log1p(x):
    """x >= 0. What 1 + x rounds away is put back: ln(u) x / (u - 1) with u = 1 + x as rounded."""
    u = 1.0 + x
    lost = u == 1.0
    return tl.where(lost, x, tl.log(u) * (x / tl.where(lost, 1.0, u - 1.0)))


@triton.jit
def decay_at(position, length, log_gamma, alpha, tau, DECAY: tl.constexpr):
    """Of the token at this position among its sequence's, not normalised."""
    if DECAY == "exponential":
        exponent = position * log_gamma
        weight = tl.where(exponent > NEGLIGIBLE, tl.exp(exponent), 0.0)
    else:
        # where length <= 1 the position is 0: any divisor gives 1
        whole = tl.where(length > 1.0, log1p(tl.maximum(length - 1.0, 0.0) / tau), LOG_2)
        weight = tl.exp(-alpha * log1p(position / tau) / whole)
    return weight


@triton.jit
def gradient_norm(logprob, sq_prob_ptr, place, valid, ADAPTIVE: tl.constexpr):
    """0 where there is no token."""
    if ADAPTIVE == "logp":
        norm = tl.abs(logprob)
    else:
        squared = read(sq_prob_ptr, place, valid)
        norm = tl.sqrt(tl.maximum(1.0 - 2.0 * tl.exp(logprob) + squared, 0.0))
    return norm


@triton.jit
def adaptive_at(norm, top, share, length, temperature, max_weight):
    """The capped weight and where the cap acted; `share` is length / sum of exponentials."""
    uncapped = tl.exp(norm / temperature - top) * share
    weight = tl.where(length > 1.0, tl.minimum(uncapped, max_weight), 1.0)
    return weight, uncapped > max_weight


@triton.jit
def log_cut(ratio, advantage, log_low, log_high):
    """GMPO: the pessimistically clipped logarithm of the ratio, and where it was clipped."""
    log = tl.log(tl.maximum(ratio, TINY))
    cut = ((log > log_high) & (advantage > 0.0)) | ((log < -log_low) & (advantage < 0.0))
    return tl.where(cut, within(log, -log_low, log_high), log), cut


@triton.jit
def k3_of(difference):
    """e^d - 1 - d. Near 0, where the difference of such numbers would be rounding, by its series."""
    d = within(difference, -0.5, 0.5)
    series = 1.0 + d / 9.0
    series = 1.0 + d / 8.0 * series
    series = 1.0 + d / 7.0 * series
    series = 1.0 + d / 6.0 * series
    series = 1.0 + d / 5.0 * series
    series = 1.0 + d / 4.0 * series
    series = 1.0 + d / 3.0 * series
    near = tl.abs(difference) <= 0.5
    return tl.where(near, 0.5 * d * d * series, tl.exp(difference) - 1.0 - difference)


@triton.jit
def kl_of(difference, KL: tl.constexpr):
    """The estimator of d = reference - trainer, clamped, and its derivative by the trainer's."""
    d = within(difference, -LOG_BOUND, LOG_BOUND)
    if KL == "k1":
        value = -d
        slope = tl.full(d.shape, 1.0, tl.float32)
    elif KL == "k2":
        value = 0.5 * d * d
        slope = -d
    elif KL == "abs":
        value = tl.abs(d)
        slope = tl.where(d > 0.0, -1.0, tl.where(d < 0.0, 1.0, 0.0))
    else:
        value = k3_of(d)
        slope = -(value + d)
    free = (difference >= -LOG_BOUND) & (difference <= LOG_BOUND)
    return value, tl.where(free, slope, 0.0)


@triton.jit
def clipped(
    ratio,
    advantage,
    bottom_positive,
    top_positive,
    bottom_negative,
    top_negative,
    dual_bound,
    DUAL: tl.constexpr,
):
    """The pessimistic clip: what is kept of the ratio, where it is cut, where by the bound for A < 0."""
    bottom = tl.where(advantage > 0.0, bottom_positive, bottom_negative)
    top = tl.where(advantage > 0.0, top_positive, top_negative)
    cut = ((ratio > top) & (advantage > 0.0)) | ((ratio < bottom) & (advantage < 0.0))
    kept = tl.where(cut, within(ratio, bottom, top), ratio)
    lower = cut & (advantage == 0.0)  # nowhere: an advantage of 0 is never cut
    if DUAL:
        lower = (advantage < 0.0) & (ratio > dual_bound)
        kept = tl.where(lower, dual_bound, kept)
    return kept, cut, lower
