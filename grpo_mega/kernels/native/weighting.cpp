// The policy loss on packed sequences, one pass over each: loss, gradients, and the sums that metrics are made of.
//
// The same quantities as the Triton kernels leave, under the same names; `Arguments`, the switches, `row` and `trace` stand before this
// file, written from the Python side (grpo_mega.kernels.native).
#include "sequence.h"

// Of x - shift and, where asked for, of its square, in float64; the extremes of x.
class Traces {
 public:
  explicit Traces(const Arguments& given, int64_t program)
      : sums_(given.sums + program * TRACE_COUNT * 4), counts_(2 * BINS, 0) {
    for (int i = 0; i < TRACE_COUNT; ++i) {
      lowest_[i] = all(INFINITE);
      highest_[i] = all(-INFINITE);
    }
  }

  template <int CODE>
  void add(const Lanes& valid, const Lanes& values) {
    constexpr int index = CODE / 8;
    constexpr float shift = CODE / 4 % 2;
    float numbers[WIDTH];
    where(valid, values, all(shift)).store(numbers);
    for (int i = 0; i < WIDTH; ++i) {
      const double shifted = static_cast<double>(numbers[i]) - shift;
      parts_[2 * index][i] += shifted;
      if constexpr (CODE / 2 % 2 == 1) parts_[2 * index + 1][i] += shifted * shifted;
    }
    if constexpr (CODE % 2 == 1) {
      lowest_[index] = at::vec::minimum(lowest_[index], where(valid, values, all(INFINITE)));
      highest_[index] = at::vec::maximum(highest_[index], where(valid, values, all(-INFINITE)));
    }
  }

  // Of x y: of a sure policy such products differ from 1 by less than float32 can say.
  template <int CODE>
  void add_product(const Lanes& valid, const Lanes& x, const Lanes& y) {
    static_assert(CODE % 8 == 0, "a plain sum");
    float first[WIDTH], second[WIDTH];
    where(valid, x, all(0.0f)).store(first);
    y.store(second);
    for (int i = 0; i < WIDTH; ++i) parts_[CODE / 4][i] += static_cast<double>(first[i]) * second[i];
  }

  // By the bits of each number: see grpo_mega.monitor.histogram.
  void count(int which, const Chunk& chunk, const Lanes& values) {
    using Whole = at::vec::Vectorized<int32_t>;
    float numbers[WIDTH];
    int32_t bins[WIDTH];
    where(chunk.valid, values, all(0.0f)).store(numbers);
    const Whole bits = Whole::loadu(numbers), sign = bits >> Whole(31);
    const Whole exponent = ((bits & Whole(0x7fffffff)) >> Whole(BIN_SHIFT)) - Whole(SMALLEST_BIN - 1);
    const Whole magnitude = at::vec::minimum(at::vec::maximum(exponent, Whole(0)), Whole(BIN_SIDE));
    ((magnitude ^ sign) - sign + Whole(BIN_SIDE)).store(bins);
    int32_t* counts = counts_.data() + which * BINS;
    for (int bin : bins) ++counts[bin];
    if (!chunk.is_full()) counts[BIN_SIDE] -= WIDTH - static_cast<int>(sum_of(ones_where(chunk.valid)));  // those that are none
  }

  void finish(const Arguments& given) {
    for (int i = 0; i < TRACE_COUNT; ++i) {
      for (int column = 0; column < 2; ++column)
        for (double part : parts_[2 * i + column]) sums_[4 * i + column] += part;
      float lowest[WIDTH], highest[WIDTH];
      lowest_[i].store(lowest);
      highest_[i].store(highest);
      sums_[4 * i + 2] = *std::min_element(lowest, lowest + WIDTH);
      sums_[4 * i + 3] = *std::max_element(highest, highest + WIDTH);
    }
    for (int bin = 0; bin < 2 * BINS; ++bin)
      if (counts_[bin] != 0) __atomic_fetch_add(given.counts + bin, counts_[bin], __ATOMIC_RELAXED);  // whole numbers: any order
  }

 private:
  double* sums_;
  double parts_[2 * TRACE_COUNT][WIDTH] = {};
  Lanes lowest_[TRACE_COUNT], highest_[TRACE_COUNT];
  std::vector<int32_t> counts_;
};

// A few tokens on their way from log-probabilities to loss and gradient.
struct Tokens {
  Chunk chunk;
  Lanes trainer, sampler, base, advantage;
  Lanes spoilt;  // 0, or nan where anything given is not finite: clamps would make a finite loss of it
  Lanes raw, slope, smoothed, ratio, level;
  Lanes credit = all(1.0f), weight = all(1.0f);  // inside the ratio, and outside
  Lanes value, rise = all(0.0f);  // the objective, and by what it rises with the ratio
  Lanes direct = all(0.0f);  // by what it rises with the log-probability itself
  Lanes factor = all(1.0f);

  Tokens(const Sequence& of, const Chunk& chunk) : chunk(chunk) {
    trainer = chunk.read(of.given.trainer);
    sampler = chunk.read(of.given.sampler);
    base = CORRECTION == "" ? sampler : chunk.read(of.given.base);
    advantage = of.advantage(chunk);
    spoilt = (trainer + sampler + base + advantage) * all(0.0f);
  }
};

class Evaluation {
 public:
  Evaluation(Sequence& sequence, Traces& traces) : of(sequence), given(sequence.given), traces(traces) {}

  void run() {
    for (int64_t place = of.begin; place < of.end; place += WIDTH) {
      Tokens tokens(of, of.chunk(place));
      take_ratio(tokens);
      take_credit(tokens);
      take_objective(tokens);
      take_correction(tokens);
      finish(tokens);
    }
  }

 private:
  Sequence& of;
  const Arguments& given;
  Traces& traces;
  float seen = 0.0f;

  template <int CODE>
  void add(const Tokens& tokens, const Lanes& values) { traces.add<CODE>(tokens.chunk.valid, values); }
  template <int CODE>
  void add_where(const Tokens& tokens, const Lanes& mask) { traces.add<CODE>(tokens.chunk.valid, ones_where(mask)); }

  void take_ratio(Tokens& tokens) {
    const Lanes log_ratio = tokens.trainer - tokens.base, distance = log_ratio.abs();
    const Ratio guarded = guarded_ratio(log_ratio);
    tokens.raw = guarded.value;
    tokens.slope = guarded.slope;
    add<trace::ratio>(tokens, tokens.raw);
    add<trace::log_ratio_abs>(tokens, distance);
    add_where<trace::clamped>(tokens, distance > all(CLAMPED_BEYOND));
    traces.count(0, tokens.chunk, log_ratio);
    tokens.smoothed = tokens.raw;
    if constexpr (SMOOTH) {
      tokens.smoothed = Lanes::loadu(of.scratch.smoothed.data() + (tokens.chunk.place - of.begin));
      const Lanes change = (tokens.smoothed - tokens.raw).abs();
      add<trace::ema_smoothed>(tokens, tokens.smoothed);
      add<trace::ema_change>(tokens, change);
      add<trace::ema_relative_change>(tokens, change / tokens.raw);
    }
    tokens.level = tokens.ratio = LEVEL == "token" ? tokens.smoothed : all(of.level);
  }

  void take_credit(Tokens& tokens) {
    if constexpr (ADAPTIVE != "") {
      const Lanes norm = gradient_norm(tokens.trainer, tokens.chunk, given);
      if constexpr (ADAPTIVE == "logit") tokens.spoilt = tokens.spoilt + tokens.chunk.read(given.sq_prob) * all(0.0f);
      const Lanes uncapped = of.adaptive(norm), weight = of.capped(uncapped);
      add<trace::gradient_adaptive_norm>(tokens, norm);
      add<trace::gradient_adaptive_weight>(tokens, weight);
      add_where<trace::gradient_adaptive_capped>(tokens, uncapped > all(given.max_weight));
      (ADAPTIVE_INSIDE ? tokens.credit : tokens.weight) = weight;
    }
    if (given.weight != nullptr) tokens.weight = tokens.weight * tokens.chunk.read(given.weight);
    if constexpr (DECAY != "") {
      const Lanes decay = decay_at(Sequence::positions(tokens.chunk, seen), of.length, given) * all(of.decay_scale);
      add<trace::temporal_decay_weight>(tokens, decay);
      Lanes& place = DECAY_INSIDE ? tokens.credit : tokens.weight;
      place = place * decay;
    }
    tokens.ratio = tokens.ratio * tokens.credit;
    add<trace::final_ratio>(tokens, tokens.ratio);
  }

  void take_objective(Tokens& tokens) {
    Cut cut = {tokens.ratio, nowhere(), nowhere()};
    if constexpr (OBJECTIVE == "clip" || OBJECTIVE == "clamp") {
      cut = clipped(tokens.ratio, tokens.advantage, given);
      tokens.value = cut.kept * tokens.advantage;
      tokens.rise = where(cut.cut | cut.lower, all(0.0f), tokens.advantage);
    } else if constexpr (OBJECTIVE == "cispo") {
      tokens.direct = within(tokens.ratio, all(given.min_ratio), all(given.max_ratio)) * tokens.advantage;
      tokens.value = tokens.direct * tokens.trainer;
    } else if constexpr (OBJECTIVE == "gmpo") {
      cut = log_cut(tokens.ratio, tokens.advantage, given);
      tokens.value = all(of.target) * tokens.advantage;
      tokens.rise = tokens.advantage;
      const Lanes tiny = all(SMALLEST_RATIO);
      const Lanes factor = all(of.target / of.length) / at::vec::maximum(tokens.ratio, tiny);
      tokens.factor = where(cut.cut | (tokens.ratio < tiny), all(0.0f), factor);
    } else {
      take_trust(tokens);
    }
    if constexpr (ASYMMETRIC) {
      const Lanes positive = tokens.advantage > all(0.0f);
      add_where<trace::asymmetric_positive>(tokens, positive);
      add_where<trace::asymmetric_positive_cut>(tokens, cut.cut & positive);
      add_where<trace::asymmetric_negative_cut>(tokens, unless(cut.cut, positive));
    }
    add_where<trace::cut>(tokens, cut.cut);
    add_where<trace::lower>(tokens, cut.lower);
    add<trace::advantage>(tokens, tokens.advantage);
    add<trace::logprob>(tokens, tokens.trainer);
  }

  void take_trust(Tokens& tokens) {
    if constexpr (OBJECTIVE == "ptrw_legacy") {
      tokens.ratio = all(of.target);
      tokens.factor = all(1.0f / of.length);
    }
    const Trust trust = trust_of(tokens.ratio, tokens.advantage, given);
    tokens.value = trust.value * tokens.ratio * tokens.advantage;
    tokens.rise = trust.rise * tokens.advantage;
    add<trace::ptrw_trust>(tokens, trust.value);
    add_where<trace::ptrw_corrective>(tokens, trust.corrective);
    add<trace::ptrw_loss>(tokens, tokens.value.neg());
  }

  // Of the mismatch between sampler and trainer; and what is reported of it.
  void take_correction(Tokens& tokens) {
    const Lanes proximal = CORRECTION == "" ? tokens.trainer : tokens.base;
    const Lanes mismatch = proximal - tokens.sampler;
    if constexpr (CORRECTION != "") {
      Lanes corrected = all(of.corrected), acted = of.acted ? all(0.0f) == all(0.0f) : nowhere();
      if constexpr (!BY_SEQUENCE) {
        acted = mismatch > all(given.log_cap);
        corrected = at::vec::minimum(mismatch, all(given.log_cap)).exp();
        if constexpr (CORRECTION == "mis") {
          acted = acted | (mismatch < all(given.log_floor));
          corrected = where(acted, all(0.0f), corrected);
        }
      }
      add<trace::correction_weight>(tokens, corrected);
      add_where<trace::correction_acted>(tokens, acted);
      tokens.weight = tokens.weight * corrected;
      traces.count(1, tokens.chunk, mismatch);
    }
    const Lanes trainer = proximal.exp(), sampler = tokens.sampler.exp();
    add<trace::final_weight>(tokens, tokens.weight);
    add<trace::mismatch_abs>(tokens, mismatch.abs());
    add<trace::mismatch_k3>(tokens, k3_of(within(mismatch, all(-LOG_BOUND), all(LOG_BOUND))));
    add<trace::mismatch_trainer>(tokens, trainer);
    add<trace::mismatch_sampler>(tokens, sampler);
    traces.add_product<trace::mismatch_product>(tokens.chunk.valid, trainer, sampler);
  }

  void finish(Tokens& tokens) {
    const Lanes share = all(PER_LENGTH ? given.scale / of.length : given.scale);
    const Lanes policy = (tokens.weight * tokens.value).neg();
    Lanes loss = policy, gradient = (share * tokens.weight * tokens.direct).neg();
    if constexpr (KL != "") {
      const Lanes reference = tokens.chunk.read(given.reference);
      const Penalty kl = kl_of(reference - tokens.trainer);
      tokens.spoilt = tokens.spoilt + reference * all(0.0f);
      add<trace::reference>(tokens, reference);
      add<trace::kl>(tokens, kl.value);
      loss = loss + all(given.kl_coef) * kl.value;
      gradient = gradient + share * all(given.kl_coef) * kl.slope;
    }
    if (given.entropy != nullptr) {
      const Lanes entropy = tokens.chunk.read(given.entropy);
      tokens.spoilt = tokens.spoilt + entropy * all(0.0f);
      add<trace::entropy>(tokens, entropy);
      loss = loss - all(given.entropy_coef) * entropy;
      if (given.entropy_gradient != nullptr) tokens.chunk.write(given.entropy_gradient, share * all(-given.entropy_coef));
    }
    loss = loss + tokens.spoilt;
    add<trace::loss>(tokens, share * loss);
    add<trace::policy>(tokens, share * (policy + tokens.spoilt));
    add_where<trace::not_finite>(tokens, tokens.spoilt != all(0.0f));
    tokens.chunk.write(given.loss, loss);
    const Lanes pull = pulled(tokens, share);
    gradient = gradient + tokens.spoilt;
    if constexpr (!PULLED && OBJECTIVE != "cispo") gradient = gradient + pull * tokens.slope;
    tokens.chunk.write(given.gradient, gradient);
  }

  // d loss / d ratio, of the token or to be summed over its sequence; kept for the way back where that is needed.
  Lanes pulled(Tokens& tokens, const Lanes& share) {
    Lanes pull = (share * tokens.weight * tokens.rise).neg();
    if constexpr (LEVEL == "amic" || LEVEL == "gspo") {
      const Lanes one = all(1.0f / of.length);
      const Lanes level_rise = LEVEL == "gspo" ? tokens.level / tokens.smoothed * one : one;
      if constexpr (SHARED) tokens.factor = tokens.factor * all(of.credit_mean * of.length) * level_rise;
      else pull = pull * tokens.credit, tokens.factor = level_rise;
    } else {
      const Lanes local = LEVEL == "gspo_token" ? tokens.credit * tokens.level / tokens.smoothed : tokens.credit;
      if constexpr (SHARED) tokens.factor = tokens.factor * local;
      else pull = pull * local;
    }
    if constexpr (PULLED) {
      const int64_t place = tokens.chunk.place - of.begin;
      where(tokens.chunk.valid, pull, all(0.0f)).store(of.scratch.pull.data() + place);
      tokens.slope.store(of.scratch.slope.data() + place);
      if constexpr (COUPLED) tokens.factor.store(of.scratch.factor.data() + place);
    }
    return pull;
  }
};

extern "C" void policy_loss(const Arguments* arguments) {
  const Arguments& given = *arguments;
#pragma omp parallel for schedule(dynamic, 1) num_threads(given.threads)
  for (int64_t program = 0; program < given.programs; ++program) {
    const int64_t* begins = given.cu_seqlens;
    const int64_t* beyond = begins + given.sequences;
    const bool is_last = program + 1 == given.programs;
    int64_t number = std::lower_bound(begins, beyond, program * TOKENS_OF_A_PROGRAM) - begins;
    const int64_t stop =
        is_last ? given.sequences : std::lower_bound(begins, beyond, (program + 1) * TOKENS_OF_A_PROGRAM) - begins;
    Scratch scratch;
    Traces traces(given, program);
    for (; number < stop; ++number) {
      Sequence sequence(given, scratch, number);
      sequence.measure();
      Evaluation(sequence, traces).run();
      if constexpr (PULLED) sequence.pull_back();
    }
    traces.finish(given);
  }
}
