// Arithmetic of the policy loss on a few tokens at once: the guarded ratio, credit weights, objectives, sums.
// What grpo_mega.algo.objective composes from torch operations; see there for why. All in float32.
//
// Before this file stand constants for the switches of one loss (SMOOTH, LEVEL, ...), so that what is off costs nothing.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <ATen/cpu/vec/vec_mask.h>
#include <cstdint>
#include <cstring>
#include <limits>

using Lanes = at::vec::Vectorized<float>;
constexpr int WIDTH = Lanes::size();
constexpr float INFINITE = std::numeric_limits<float>::infinity();

inline Lanes all(float x) { return Lanes(x); }
inline Lanes where(const Lanes& mask, const Lanes& yes, const Lanes& no) { return Lanes::blendv(no, yes, mask); }
inline Lanes nowhere() { return all(0.0f) < all(0.0f); }
inline Lanes within(const Lanes& x, const Lanes& low, const Lanes& high) {
  return at::vec::minimum(at::vec::maximum(x, low), high);
}
inline Lanes ones_where(const Lanes& mask) { return where(mask, all(1.0f), all(0.0f)); }
inline Lanes unless(const Lanes& mask, const Lanes& not_in) { return where(not_in, nowhere(), mask); }

inline double sum_of(const Lanes& x) {
  float values[WIDTH];
  x.store(values);
  double total = 0.0;
  for (float value : values) total += value;
  return total;
}

inline Lanes counting_from(float first) { return Lanes::arange(first, 1.0f); }

// Up to WIDTH tokens from a place on: which of them count, and what is given for them.
struct Chunk {
  int64_t place;
  int count;
  Lanes valid;

  Chunk(const uint8_t* mask, int64_t begin, int64_t end) : place(begin) {
    count = end - begin < WIDTH ? static_cast<int>(end - begin) : WIDTH;
    valid = counting_from(0.0f) < all(static_cast<float>(count));
    if (mask != nullptr) {
      const auto flags = at::vec::VecMask<float, 1>::from(reinterpret_cast<const bool*>(mask + begin), count);
      valid = valid & (flags.template to<float, 1>() != all(0.0f));
    }
  }
  bool is_full() const { return valid.zero_mask() == 0; }
  // 0 where there is no token: what is masked is never looked at
  Lanes read(const float* values) const {
    const Lanes loaded = count == WIDTH ? Lanes::loadu(values + place) : Lanes::loadu(values + place, count);
    return where(valid, loaded, all(0.0f));
  }
  void write(float* values, const Lanes& x) const { where(valid, x, all(0.0f)).store(values + place, count); }
};

// A sum over many tokens, in float64: float32 sums would change with the width of a vector.
class Sum {
 public:
  void add(const Lanes& x) {
    float values[WIDTH];
    x.store(values);
    for (int i = 0; i < WIDTH; ++i) parts_[i] += values[i];
  }
  void add_square(const Lanes& x) {
    float values[WIDTH];
    x.store(values);
    for (int i = 0; i < WIDTH; ++i) parts_[i] += static_cast<double>(values[i]) * values[i];
  }
  double value() const {
    double total = 0.0;
    for (double part : parts_) total += part;
    return total;
  }

 private:
  double parts_[WIDTH] = {};
};

struct Ratio {
  Lanes value, slope;  // and its derivative by the log-ratio
};

// clamp(exp(clamp(l)))
inline Ratio guarded_ratio(const Lanes& log_ratio) {
  const Lanes bounded = within(log_ratio, all(-LOG_BOUND), all(LOG_BOUND));
  const Lanes raw = bounded.exp();
  const Lanes free = (log_ratio == bounded) & (raw >= all(LOWEST_RATIO)) & (raw <= all(HIGHEST_RATIO));
  return {within(raw, all(LOWEST_RATIO), all(HIGHEST_RATIO)), where(free, raw, all(0.0f))};
}

// e^d - 1 - d. Near 0, where the difference of such numbers would be rounding, by its series.
inline Lanes k3_of(const Lanes& difference) {
  const Lanes d = within(difference, all(-0.5f), all(0.5f));
  Lanes series = all(1.0f) + d * all(1.0f / 9.0f);
  for (float next = 8.0f; next > 2.5f; next -= 1.0f) series = all(1.0f) + d * all(1.0f / next) * series;
  const Lanes near = difference.abs() <= all(0.5f);
  if (near.zero_mask() == 0) return all(0.5f) * d * d * series;  // of all lanes, and of all but a few chunks
  return where(near, all(0.5f) * d * d * series, difference.exp() - all(1.0f) - difference);
}

struct Penalty {
  Lanes value, slope;  // and its derivative by the trainer's log-probability
};

// The estimator of d = reference - trainer, clamped.
inline Penalty kl_of(const Lanes& difference) {
  const Lanes d = within(difference, all(-LOG_BOUND), all(LOG_BOUND));
  Penalty kl;
  if constexpr (KL == "k1") {
    kl = {d.neg(), all(1.0f)};
  } else if constexpr (KL == "k2") {
    kl = {all(0.5f) * d * d, d.neg()};
  } else if constexpr (KL == "abs") {
    kl = {d.abs(), ones_where(d < all(0.0f)) - ones_where(d > all(0.0f))};
  } else {
    kl.value = k3_of(d);
    kl.slope = (kl.value + d).neg();
  }
  kl.slope = where(difference == d, kl.slope, all(0.0f));
  return kl;
}

// Credit of the token at this place among its sequence's, not normalised.
inline Lanes decay_at(const Lanes& position, float length, const Arguments& given) {
  if constexpr (DECAY == "exponential") {
    const Lanes exponent = position * all(given.log_gamma);
    return where(exponent > all(NEGLIGIBLE_EXPONENT), exponent.exp(), all(0.0f));
  }
  // where length <= 1 the position is 0: any divisor gives 1
  const float whole = length > 1.0f ? std::log1p((length - 1.0f) / given.tau) : 1.0f;
  return ((position / all(given.tau)).log1p() * all(-given.alpha / whole)).exp();
}

// 0 where there is no token.
inline Lanes gradient_norm(const Lanes& logprob, const Chunk& chunk, const Arguments& given) {
  if constexpr (ADAPTIVE != "logit") return logprob.abs();
  const Lanes squared = all(1.0f) - all(2.0f) * logprob.exp() + chunk.read(given.sq_prob);
  return where(chunk.valid, at::vec::maximum(squared, all(0.0f)).sqrt(), all(0.0f));
}

struct Cut {
  Lanes kept, cut, lower;  // what is kept of the ratio, where it is cut, where by the bound for A < 0
};

inline Cut clipped(const Lanes& ratio, const Lanes& advantage, const Arguments& given) {
  const Lanes rises = advantage > all(0.0f), falls = advantage < all(0.0f);
  const Lanes bottom = where(rises, all(given.bottom_positive), all(given.bottom_negative));
  const Lanes top = where(rises, all(given.top_positive), all(given.top_negative));
  if constexpr (OBJECTIVE == "clamp") {
    const Lanes kept = within(ratio, bottom, top);
    return {kept, kept != ratio, nowhere()};
  }
  const Lanes cut = ((ratio > top) & rises) | ((ratio < bottom) & falls);
  Cut result = {where(cut, within(ratio, bottom, top), ratio), cut, nowhere()};
  if constexpr (DUAL) {
    result.lower = falls & (ratio > all(given.dual_bound));
    result.kept = where(result.lower, all(given.dual_bound), result.kept);
  }
  return result;
}

// GMPO: the pessimistically clipped logarithm of the ratio.
inline Cut log_cut(const Lanes& ratio, const Lanes& advantage, const Arguments& given) {
  const Lanes log = at::vec::maximum(ratio, all(SMALLEST_RATIO)).log();
  const Lanes high = all(given.log_high), low = all(-given.log_low);
  const Lanes cut = ((log > high) & (advantage > all(0.0f))) | ((log < low) & (advantage < all(0.0f)));
  return {where(cut, within(log, low, high), log), cut, nowhere()};
}

struct Trust {
  Lanes value, rise, corrective;  // of the objective over the advantage, and by what it rises with the ratio
};

inline Trust trust_of(const Lanes& ratio, const Lanes& advantage, const Arguments& given) {
  const Lanes away = ratio - all(1.0f);
  Trust trust;
  trust.value = (away * away * all(-1.0f / given.two_variances)).exp();
  trust.corrective = ((advantage > all(0.0f)) & (ratio < all(1.0f))) | ((advantage < all(0.0f)) & (ratio > all(1.0f)));
  trust.rise = trust.value;
  if constexpr (!DETACH) trust.rise = trust.value * (all(1.0f) - ratio * away * all(2.0f / given.two_variances));
  if constexpr (KEEP_CORRECTIVE) {
    trust.value = where(trust.corrective, all(1.0f), trust.value);
    trust.rise = where(trust.corrective, all(1.0f), trust.rise);
  }
  return trust;
}
