// What depends on a whole sequence: its length, what normalises its credit weights, its ratio, and the EMA in both directions.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"

// Of one sequence at a time; as long as the longest so far.
struct Scratch {
  std::vector<float> smoothed, pull, factor, slope;

  void fit(size_t length) {
    for (auto* values : {&smoothed, &pull, &factor, &slope})
      if (values->size() < length) values->resize(length);
  }
};

class Sequence {
 public:
  Sequence(const Arguments& given, Scratch& scratch, int64_t number)
      : given(given), scratch(scratch), number(number), begin(given.cu_seqlens[number]), end(given.cu_seqlens[number + 1]) {
    scratch.fit(end - begin + WIDTH);
  }

  Chunk chunk(int64_t place) const { return Chunk(given.valid, place, end); }

  Lanes advantage(const Chunk& chunk) const {
    if constexpr (TOKEN_ADVANTAGES) return chunk.read(given.advantage);
    return where(chunk.valid, all(number < given.given ? given.advantage[number] : 0.0f), all(0.0f));
  }

  // Of a chunk's tokens among those of the sequence that count; `seen` stand before it, and it adds its own.
  static Lanes positions(const Chunk& chunk, float& seen) {
    if (chunk.is_full()) {
      seen += WIDTH;
      return counting_from(seen - WIDTH);
    }
    float positions[WIDTH], flags[WIDTH];
    ones_where(chunk.valid).store(flags);
    for (int i = 0; i < WIDTH; ++i) {
      positions[i] = seen;
      seen += flags[i];
    }
    return Lanes::loadu(positions);
  }

  Lanes adaptive(const Lanes& norm) const { return (norm * all(1.0f / given.temperature) - all(top)).exp() * all(share); }
  Lanes capped(const Lanes& uncapped) const {
    return length > 1.0f ? at::vec::minimum(uncapped, all(given.max_weight)) : all(1.0f);
  }

  void measure() {
    count();
    if constexpr (ADAPTIVE != "") weigh_adaptively();
    if constexpr (DECAY != "") normalise_decay();
    if constexpr (BY_SEQUENCE) correct();
    if constexpr (WALKS) walk();
  }

  // h_t = pull_t + (1 - beta) h_{t+1},  d loss / d w_t = beta h_t, and h_0 at the first; before it, where all tokens of the sequence
  // share a ratio, each gets the sum of the pulls times its own factor.
  void pull_back() {
    double total = 0.0;
    if constexpr (COUPLED)
      for (int64_t i = 0; i < end - begin; ++i) total += scratch.pull[i];
    float carry = 0.0f;
    for (int64_t i = end - begin - 1; i >= 0; --i) {
      const int64_t place = begin + i;
      if (given.valid != nullptr && !given.valid[place]) continue;
      float pull = COUPLED ? static_cast<float>(total) * scratch.factor[i] : scratch.pull[i];
      if constexpr (SMOOTH) {
        carry = pull + given.keep * carry;
        pull = place == first ? carry : given.beta * carry;
      }
      given.gradient[place] += pull * scratch.slope[i];
    }
  }

  const Arguments& given;
  Scratch& scratch;
  const int64_t number, begin, end;
  int64_t first = -1;
  float length = 0.0f, top = 0.0f, share = 0.0f, decay_scale = 1.0f, level = 1.0f, target = 1.0f, credit_mean = 1.0f;
  float corrected = 1.0f;
  bool acted = false;

 private:
  void tell(int row, double value) { given.table[row * given.sequences + number] = static_cast<float>(value); }
  double at_least_1() const { return std::max(length, 1.0f); }

  void count() {
    Sum counted;
    for (int64_t place = begin; place < end; place += WIDTH) {
      const Chunk tokens = chunk(place);
      counted.add(ones_where(tokens.valid));
      if (first < 0) first = first_of(tokens);
    }
    length = static_cast<float>(counted.value());
    tell(row::length, length);
  }

  static int64_t first_of(const Chunk& tokens) {
    float flags[WIDTH];
    ones_where(tokens.valid).store(flags);
    for (int i = 0; i < WIDTH; ++i)
      if (flags[i] != 0.0f) return tokens.place + i;
    return -1;
  }

  void weigh_adaptively() {
    Lanes tops = all(0.0f);  // no norm is below 0
    for (int64_t place = begin; place < end; place += WIDTH) {
      const Chunk tokens = chunk(place);
      tops = at::vec::maximum(tops, gradient_norm(tokens.read(given.trainer), tokens, given));
    }
    float values[WIDTH];
    (tops * all(1.0f / given.temperature)).store(values);
    for (float value : values) top = value > top || value != value ? value : top;
    Sum power;
    share = 1.0f;
    for (int64_t place = begin; place < end; place += WIDTH) {
      const Chunk tokens = chunk(place);
      const Lanes weight = adaptive(gradient_norm(tokens.read(given.trainer), tokens, given));
      power.add(where(tokens.valid, weight, all(0.0f)));
    }
    share = static_cast<float>(length / std::max(power.value(), 1.0));
    tell(row::top, top);
    tell(row::share, share);
  }

  void normalise_decay() {
    double total;
    if constexpr (DECAY == "exponential") {
      const double log_gamma = given.log_gamma;
      total = log_gamma == 0.0 ? length : std::expm1(length * log_gamma) / std::expm1(log_gamma);
    } else {
      Sum weights;
      for (float position = 0.0f; position < length; position += WIDTH) {
        const Lanes places = counting_from(position);
        weights.add(where(places < all(length), decay_at(places, length, given), all(0.0f)));
      }
      total = weights.value();
    }
    const double wanted = NORMALIZE == "mean" ? length : std::min(length, 1.0f);
    if constexpr (NORMALIZE != "none") decay_scale = static_cast<float>(wanted / std::max(total, 1e-30));
    float last[WIDTH];
    decay_at(all(std::max(length - 1.0f, 0.0f)), length, given).store(last);
    tell(row::decay_scale, decay_scale);
    tell(row::decay_sum, total * decay_scale);
    tell(row::decay_last, last[0] * decay_scale);
  }

  void correct() {
    double mismatch = 0.0;  // a sum of -80 in float32 would be off by 8e-6 in its exponential
    for (int64_t place = begin; place < end; ++place)
      if (given.valid == nullptr || given.valid[place])
        mismatch += static_cast<double>(given.base[place]) - static_cast<double>(given.sampler[place]);
    acted = mismatch > given.log_cap;
    corrected = static_cast<float>(std::exp(std::min(mismatch, static_cast<double>(given.log_cap))));
    if constexpr (CORRECTION == "mis") {
      acted = acted || mismatch < given.log_floor;
      if (acted) corrected = 0.0f;
    }
    tell(row::correction, corrected);
    tell(row::acted, acted);
  }

  // The EMA, and sums over the ratios after it.
  void walk() {
    Sum deviations, squares, logarithms, credits, targets;
    float carry = 0.0f, seen = 0.0f;
    for (int64_t place = begin; place < end; place += WIDTH) {
      const Chunk tokens = chunk(place);
      Lanes ratio = guarded_ratio(tokens.read(given.trainer) - tokens.read(given.base)).value;
      if constexpr (SMOOTH) ratio = smoothed(tokens, ratio, carry);
      const Lanes deviation = where(tokens.valid, ratio - all(1.0f), all(0.0f));
      if constexpr (LEVEL != "token") {
        deviations.add(deviation);
        squares.add_square(deviation);
      }
      if constexpr (LEVEL == "gspo" || LEVEL == "gspo_token")
        logarithms.add(where(tokens.valid, ratio.log(), all(0.0f)));
      if constexpr (SHARED) {
        const Lanes credit = inner_credit(tokens, seen);
        credits.add(where(tokens.valid, credit, all(0.0f)));
        Lanes final = ratio * credit;
        if constexpr (OBJECTIVE == "gmpo") final = log_cut(final, advantage(tokens), given).kept;
        else if constexpr (!INSIDE) final = final - all(1.0f);  // exact near 1
        targets.add(where(tokens.valid, final, all(0.0f)));
      }
    }
    settle(deviations.value(), squares.value(), logarithms.value(), credits.value(), targets.value());
  }

  Lanes smoothed(const Chunk& tokens, const Lanes& ratio, float& carry) {
    float values[WIDTH];
    ratio.store(values);
    for (int i = 0; i < tokens.count; ++i) {
      const int64_t place = tokens.place + i;
      if (given.valid != nullptr && !given.valid[place]) {
        values[i] = 1.0f;
        continue;
      }
      carry = place == first ? values[i] : given.beta * values[i] + given.keep * carry;
      values[i] = carry;
    }
    const Lanes result = Lanes::loadu(values);
    result.store(scratch.smoothed.data() + (tokens.place - begin));
    return result;
  }

  // Of weights inside the ratio.
  Lanes inner_credit(const Chunk& tokens, float& seen) const {
    Lanes credit = all(1.0f);
    if constexpr (ADAPTIVE_INSIDE) credit = capped(adaptive(gradient_norm(tokens.read(given.trainer), tokens, given)));
    if constexpr (DECAY_INSIDE) credit = credit * decay_at(positions(tokens, seen), length, given) * all(decay_scale);
    return credit;
  }

  void settle(double deviation, double square, double logarithm, double credit, double total) {
    const double mean = deviation / at_least_1();
    if constexpr (LEVEL != "token") {
      const bool geometric = LEVEL == "gspo" || LEVEL == "gspo_token";
      level = static_cast<float>(geometric ? std::exp(logarithm / at_least_1()) : 1.0 + mean);
      tell(row::level, level);
      tell(row::token_variance, std::max(square / at_least_1() - mean * mean, 0.0));
    }
    credit_mean = static_cast<float>(credit / at_least_1());
    target = static_cast<float>(total / at_least_1());
    if constexpr (OBJECTIVE == "gmpo") target = std::exp(target);
    if constexpr (OBJECTIVE == "ptrw_legacy") {
      if constexpr (LEVEL != "token") target = level * credit_mean;
      else if constexpr (!INSIDE) target += 1.0f;
    }
    tell(row::target, target);
    tell(row::credit_mean, credit_mean);
  }
};
