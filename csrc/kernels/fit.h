// Fitting scales: which codes, scales and minima store a row of weights with the least squared error. The quantisers
// (kernels/quantise.h) pack what is found here. Compiled once a tier.
//
// Sixteen sub-blocks are fitted at a time, one to a lane: every sum over the weights of a sub-block is a chain of its
// own in ascending order, without fused operations, so any width of vectors gives the same bits.
//
// Each sub-block first gets the scale (and minimum) it would like best: many trial scales, the codes each leads to, and
// for those codes the best scale in closed form. Then the integer scales of a block are chosen together: the step they
// are multiples of, by the curvature of each sub-block's error; each integer scale and minimum and its neighbours, by the
// error after rounding anew; the steps again, in closed form, for all the codes.
//
// Error means the sum of w (x - stored x)^2, w the importance of the weight's column, or what favour_large makes of it.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "quant/formats.h"
#include "quant/fp16.h"

namespace pe {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#elif defined(__GNUC__)
constexpr int kWidth = 4;
#else
constexpr int kWidth = 1;
#endif
#if defined(__GNUC__)
typedef float Lanes __attribute__((vector_size(4 * kWidth)));
typedef int32_t WholeLanes __attribute__((vector_size(4 * kWidth)));
typedef uint8_t CodeLanes __attribute__((vector_size(kWidth)));
#else
typedef float Lanes;
#endif
using Mask = decltype(Lanes{} < Lanes{});

constexpr int kSubs = 16;  // sub-blocks fitted together

inline Lanes load(const float* p) {
  Lanes v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Lanes v) { memcpy(p, &v, sizeof v); }
inline Lanes all(float x) { return Lanes{} + x; }
inline Lanes choose(Mask m, Lanes a, Lanes b) { return m ? a : b; }
inline Lanes least(Lanes a, Lanes b) { return choose(a < b, a, b); }
inline Lanes most(Lanes a, Lanes b) { return choose(a > b, a, b); }
inline Lanes magnitude(Lanes a) { return most(a, -a); }
// Nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
inline Lanes round_even(Lanes x) { return (x + 12582912.0f) - 12582912.0f; }
// Whole numbers 0 .. 255, fractions cut off, as bytes.
inline void store_codes(uint8_t* p, Lanes x) {
#if defined(__GNUC__)
  const CodeLanes code = __builtin_convertvector(__builtin_convertvector(x, WholeLanes), CodeLanes);
  memcpy(p, &code, sizeof code);
#else
  *p = static_cast<uint8_t>(x);
#endif
}
// a / b where b is not too small to divide by, else 0.
constexpr float kTiny = 1e-30f, kHuge = 3e38f;
inline Lanes ratio(Lanes a, Lanes b) { return choose(magnitude(b) > kTiny, a / b, Lanes{}); }

// N weights each of 16 sub-blocks, transposed: x[k][j] is weight k of sub-block j, w its importance.
template <int N>
struct Batch {
  alignas(64) float x[N][kSubs];
  alignas(64) float w[N][kSubs];

  // `subs` sub-blocks from x; the other lanes are zeros.
  void fill(const float* from, const float* importance, size_t subs) {
    for (size_t j = 0; j < kSubs; ++j) {
      for (int k = 0; k < N; ++k) {
        const size_t at = j * N + static_cast<size_t>(k);
        x[k][j] = j < subs ? from[at] : 0;
        w[k][j] = j < subs && importance != nullptr ? importance[at] : 1;
      }
    }
  }

  // Large weights count for more: times 1 + by |x| / mean |x|, the mean over the block of 256.
  void favour_large(float by) {
    constexpr int kPer = 256 / N;  // sub-blocks of a block
    alignas(64) float per[kSubs];
    for (int g = 0; g < kSubs; g += kWidth) {
      Lanes sum{};
      for (int k = 0; k < N; ++k) sum += magnitude(load(x[k] + g));
      store(per + g, sum);
    }
    for (int at = 0; at < kSubs; at += kPer) {
      float sum = 0;
      for (int j = at; j < at + kPer; ++j) sum += per[j];
      for (int j = at; j < at + kPer; ++j) per[j] = sum > kTiny ? by * 256 / sum : 0;
    }
    for (int k = 0; k < N; ++k) {
      for (int g = 0; g < kSubs; g += kWidth)
        store(w[k] + g, load(w[k] + g) * (magnitude(load(x[k] + g)) * load(per + g) + 1.0f));
    }
  }
};

// ---- levels: the values a code stands for, in units of the step ----

template <int kLow, int kHigh>
struct Even {
  static constexpr int kFirst = kLow;
  static Lanes nearest(Lanes v) { return round_even(least(most(v, all(kLow)), all(kHigh))); }
  static uint8_t code(float level) { return static_cast<uint8_t>(static_cast<int>(level) - kLow); }
};

struct Iq4 {
  static Lanes nearest(Lanes v) {
    Lanes level = all(kIq4Values[0]);
    for (int i = 0; i < 15; ++i) {
      const float middle = 0.5f * static_cast<float>(kIq4Values[i] + kIq4Values[i + 1]);
      level += choose(v > middle, all(static_cast<float>(kIq4Values[i + 1] - kIq4Values[i])), Lanes{});
    }
    return level;
  }
  static uint8_t code(float level) {
    uint8_t u = 0;
    while (u < 15 && static_cast<float>(kIq4Values[u]) < level) ++u;
    return u;
  }
};

// ---- one sub-block: x is about scale q ----

struct Scales {
  float scale[kSubs];  // the best
  float curve[kSubs];  // the error grows by curve (s - scale)^2 when s is used instead, codes unchanged
};

struct Trial {
  Lanes error, scale, curve;
};

// The codes of a trial scale, and the best scale for them. The error is summed over residuals, not over squares of x,
// which would cancel.
template <class Levels, int N>
Trial try_scale(const Batch<N>& b, int g, Lanes scale, Lanes inv) {
  Lanes rr{}, rq{}, qq{};
  for (int k = 0; k < N; ++k) {
    const Lanes x = load(b.x[k] + g), w = load(b.w[k] + g);
    const Lanes q = Levels::nearest(x * inv), r = x - scale * q, wr = w * r;
    rr += wr * r;
    rq += wr * q;
    qq += w * q * q;
  }
  const Lanes step = ratio(rq, qq);
  return {rr - step * rq, scale + step, qq};
}

template <class Levels, class Search, int N>
void fit_scales(const Batch<N>& b, Scales* fit) {
  for (int g = 0; g < kSubs; g += kWidth) {
    Lanes top{}, energy{};
    for (int k = 0; k < N; ++k) {
      const Lanes x = load(b.x[k] + g);
      top = choose(magnitude(x) > magnitude(top), x, top);
      energy += load(b.w[k] + g) * x * x;
    }
    const Lanes per_top = ratio(all(1), top);
    Trial best{energy, Lanes{}, all(1)};
    const auto consider = [&](Lanes scale, Lanes inv) {
      const Trial t = try_scale<Levels>(b, g, scale, inv);
      const Mask better = t.error < best.error;
      best = {choose(better, t.error, best.error), choose(better, t.scale, best.scale),
              choose(better, t.curve, best.curve)};
    };
    for (int i = 0; i < Search::kTrials; ++i) {  // the value that the largest weight would have
      const float low = Search::kLow + Search::kStep * static_cast<float>(i);
      const float high = Search::kHigh - Search::kStep * static_cast<float>(i);
      consider(top * (1 / low), per_top * low);
      consider(top * (1 / high), per_top * high);
    }
    for (int i = 0; i < 2; ++i) consider(best.scale, ratio(all(1), best.scale));
    store(fit->scale + g, best.scale);
    store(fit->curve + g, best.curve);
  }
}

// ---- one sub-block: x is about scale q - min, codes 0 .. top ----

struct Lines {
  float scale[kSubs], min[kSubs];
  float qq[kSubs], q[kSubs], one[kSubs];  // curvature: sums of w q^2, w q, w
};

struct LineTrial {
  Lanes error, scale, min, qq, q, one;
};

template <int kTop, bool kSigned, int N>
LineTrial try_line(const Batch<N>& b, int g, Lanes scale, Lanes inv, Lanes min) {
  Lanes rr{}, rq{}, r1{}, qq{}, q1{}, one{};
  for (int k = 0; k < N; ++k) {
    const Lanes w = load(b.w[k] + g), x = load(b.x[k] + g) + min;
    const Lanes q = Even<0, kTop>::nearest(x * inv), r = x - scale * q, wr = w * r, wq = w * q;
    rr += wr * r;
    rq += wr * q;
    r1 += wr;
    qq += wq * q;
    q1 += wq;
    one += w;
  }
  const Lanes det = qq * one - q1 * q1;
  const Mask line = det > 1e-6f * qq * one;  // else all codes are equal: only the minimum moves
  Lanes ds = choose(line, ratio(rq * one - r1 * q1, det), Lanes{});
  Lanes dm = choose(line, ratio(rq * q1 - r1 * qq, det), -ratio(r1, one));
  if (!kSigned) {  // minima are stored as min >= 0
    const Mask below = min + dm < Lanes{};
    dm = choose(below, -min, dm);
    ds = choose(below, ratio(rq - min * q1, qq), ds);
  }
  // residuals become r - ds q + dm
  const Lanes error = rr - 2.0f * (ds * rq - dm * r1) + ds * ds * qq - 2.0f * ds * dm * q1 + dm * dm * one;
  return {error, scale + ds, min + dm, qq, q1, one};
}

template <int kTop, class Search, bool kSigned, int N>
void fit_lines(const Batch<N>& b, Lines* fit) {
  for (int g = 0; g < kSubs; g += kWidth) {
    Lanes low = load(b.x[0] + g), high = low;
    for (int k = 1; k < N; ++k) {
      const Lanes x = load(b.x[k] + g);
      low = least(low, x);
      high = most(high, x);
    }
    if (!kSigned) low = least(low, Lanes{});
    if (!kSigned) high = most(high, Lanes{});
    const Lanes range = high - low;
    LineTrial best{all(kHuge), Lanes{}, -low, Lanes{}, Lanes{}, all(1)};
    const auto consider = [&](Lanes scale, Lanes min) {
      const LineTrial t = try_line<kTop, kSigned>(b, g, scale, ratio(all(1), scale), min);
      const Mask better = (t.error < best.error) & (t.scale >= Lanes{});
      best = {choose(better, t.error, best.error), choose(better, t.scale, best.scale),
              choose(better, t.min, best.min),     choose(better, t.qq, best.qq),
              choose(better, t.q, best.q),         choose(better, t.one, best.one)};
    };
    for (int i = 0; i < Search::kTrials; ++i) {  // what the codes 0 and kTop stand for, drawn in by parts of the range
      for (int j = 0; j < Search::kTrials; ++j) {
        const float in_low = Search::kFirst + Search::kStep * static_cast<float>(i);
        const float in_high = Search::kFirst + Search::kStep * static_cast<float>(j);
        consider(range * ((1 - in_low - in_high) / kTop), -(low + range * in_low));
      }
    }
    for (int i = 0; i < 3; ++i) consider(best.scale, best.min);
    store(fit->scale + g, best.scale);
    store(fit->min + g, best.min);
    store(fit->qq + g, best.qq);
    store(fit->q + g, best.q);
    store(fit->one + g, best.one);
  }
}

// ---- blocks: integer scales, and the steps they are multiples of ----

// The step d for sub-blocks that would like the scales scale[0 .. subs - 1]: of those that give the extreme scale an
// integer near the end of low .. high, the one with the least sum of curve (scale - d sc)^2. One candidate to a lane.
inline float pick_step(const float* scale, const float* curve, int subs, int low, int high) {
  constexpr int kCandidates = 64;
  float top = 0;
  for (int j = 0; j < subs; ++j) {
    if (scale[j] * scale[j] > top * top) top = scale[j];
  }
  if (!(top * top > 0)) return 0;
  alignas(64) float step[kCandidates], error[kCandidates];
  const float part = static_cast<float>(high) * 0.3f / kCandidates;
  for (int i = 0; i < kCandidates; ++i) {
    const bool negative = low < 0 && i % 2 == 0;
    step[i] = top / (negative ? static_cast<float>(low) + part * static_cast<float>(i)
                              : static_cast<float>(high) - part * static_cast<float>(i));
  }
  for (int i = 0; i < kCandidates; i += kWidth) {
    const Lanes d = load(step + i), inv = ratio(all(1), d);
    Lanes sum{};
    for (int j = 0; j < subs; ++j) {
      const Lanes sc =
          round_even(least(most(inv * scale[j], all(static_cast<float>(low))), all(static_cast<float>(high))));
      const Lanes miss = d * sc - scale[j];
      sum += miss * miss * curve[j];
    }
    store(error + i, sum);
  }
  int best = 0;
  for (int i = 1; i < kCandidates; ++i) {
    if (error[i] < error[best]) best = i;
  }
  return step[best];
}

inline float rounded_f16(float x) { return f16_to_f32(f32_to_f16(x)); }

// The integer scales of the blocks of a batch, and for each sub-block the step and the error it ends with.
struct Choice {
  alignas(64) float d[kSubs], dmin[kSubs];  // as the file holds them, of the sub-block's block
  alignas(64) float sc[kSubs], mn[kSubs];
  alignas(64) float error[kSubs];
};

struct Sums {  // over the weights of a sub-block, r what is missing: w r q, w r, w q^2, w q, w
  alignas(64) float rq[kSubs], r[kSubs], qq[kSubs], q[kSubs], one[kSubs];
};

template <class Levels, int N>
void sum_up(const Batch<N>& b, const Choice& c, Sums* sums) {
  for (int g = 0; g < kSubs; g += kWidth) {
    const Lanes scale = load(c.d + g) * load(c.sc + g), min = load(c.dmin + g) * load(c.mn + g);
    const Lanes inv = ratio(all(1), scale);
    Lanes rq{}, r1{}, qq{}, q1{}, one{};
    for (int k = 0; k < N; ++k) {
      const Lanes w = load(b.w[k] + g), x = load(b.x[k] + g) + min;
      const Lanes q = Levels::nearest(x * inv), wr = w * (x - scale * q), wq = w * q;
      rq += wr * q;
      r1 += wr;
      qq += wq * q;
      q1 += wq;
      one += w;
    }
    store(sums->rq + g, rq);
    store(sums->r + g, r1);
    store(sums->qq + g, qq);
    store(sums->q + g, q1);
    store(sums->one + g, one);
  }
}

// Tries each integer scale and minimum with its neighbours; keeps the best of each sub-block.
template <class Levels, bool kMins, int N>
void settle(const Batch<N>& b, int low, int high, int reach, Choice* c) {
  const int min_reach = kMins ? reach : 0;
  for (int g = 0; g < kSubs; g += kWidth) {
    const Lanes d = load(c->d + g), dmin = load(c->dmin + g), sc0 = load(c->sc + g), mn0 = load(c->mn + g);
    Lanes best = all(kHuge), best_sc = sc0, best_mn = mn0;
    const auto consider = [&](float ds, float dm) {
      const Lanes sc = least(most(sc0 + ds, all(static_cast<float>(low))), all(static_cast<float>(high)));
      const Lanes mn = least(most(mn0 + dm, Lanes{}), all(static_cast<float>(high)));
      const Lanes scale = d * sc, min = dmin * mn, inv = ratio(all(1), scale);
      Lanes error{};
      for (int k = 0; k < N; ++k) {
        const Lanes x = load(b.x[k] + g) + min, r = x - scale * Levels::nearest(x * inv);
        error += load(b.w[k] + g) * r * r;
      }
      const Mask better = error < best;
      best = choose(better, error, best);
      best_sc = choose(better, sc, best_sc);
      best_mn = choose(better, mn, best_mn);
    };
    consider(0, 0);
    for (int i = -reach; i <= reach; ++i) {
      for (int j = -min_reach; j <= min_reach; ++j) {
        if (i != 0 || j != 0) consider(static_cast<float>(i), static_cast<float>(j));
      }
    }
    store(c->error + g, best);
    store(c->sc + g, best_sc);
    store(c->mn + g, best_mn);
  }
}

// Settles the integers, then improves the steps for the codes they lead to and settles again, while that helps.
template <class Levels, bool kMins, int N>
void settle_blocks(const Batch<N>& b, int low, int high, int reach, Choice* c) {
  constexpr int kPer = 256 / N;  // sub-blocks of a block
  settle<Levels, kMins>(b, low, high, reach, c);
  for (int round = 0; round < 2; ++round) {
    Sums s;
    sum_up<Levels>(b, *c, &s);
    Choice next = *c;
    for (int at = 0; at < kSubs; at += kPer) {
      float a = 0, m = 0, o = 0, p = 0, t = 0;  // [a -m; m -o] (change of d, of dmin) = (p, t)
      for (int j = at; j < at + kPer; ++j) {
        a += c->sc[j] * c->sc[j] * s.qq[j];
        m += c->sc[j] * c->mn[j] * s.q[j];
        o += c->mn[j] * c->mn[j] * s.one[j];
        p += c->sc[j] * s.rq[j];
        t += c->mn[j] * s.r[j];
      }
      const float det = a * o - m * m;
      const bool both = kMins && det > 1e-6f * a * o && det > kTiny;
      if (!both && !(a > kTiny)) continue;
      const float d = rounded_f16(c->d[at] + (both ? (p * o - m * t) / det : p / a));
      const float dmin = both ? rounded_f16(c->dmin[at] + (m * p - a * t) / det) : c->dmin[at];
      if (!is_finite(d) || !is_finite(dmin) || (kMins && (d < 0 || dmin < 0))) continue;
      for (int j = at; j < at + kPer; ++j) {
        next.d[j] = d;
        next.dmin[j] = dmin;
      }
    }
    settle<Levels, kMins>(b, low, high, reach, &next);
    bool any = false;
    for (int at = 0; at < kSubs; at += kPer) {
      float before = 0, after = 0;
      for (int j = at; j < at + kPer; ++j) {
        before += c->error[j];
        after += next.error[j];
      }
      if (!(after < before)) continue;
      any = true;
      for (int j = at; j < at + kPer; ++j) {
        c->d[j] = next.d[j];
        c->dmin[j] = next.dmin[j];
        c->sc[j] = next.sc[j];
        c->mn[j] = next.mn[j];
        c->error[j] = next.error[j];
      }
    }
    if (!any) break;
  }
}

inline float nearest_multiple(float x, float step, int low, int high) {
  alignas(64) float out[kWidth];
  store(out,
        round_even(least(most(ratio(all(x), all(step)), all(static_cast<float>(low))), all(static_cast<float>(high)))));
  return out[0];
}

// Blocks of 256 with scales d sc, sc in low .. high. False when a step overflows fp16.
template <class Levels, class Search, int N>
bool fit_scaled(const Batch<N>& b, int low, int high, int reach, Choice* c) {
  constexpr int kPer = 256 / N;
  Scales want;
  fit_scales<Levels, Search>(b, &want);
  for (int at = 0; at < kSubs; at += kPer) {
    const float d = rounded_f16(pick_step(want.scale + at, want.curve + at, kPer, low, high));
    if (!is_finite(d)) return false;
    for (int j = at; j < at + kPer; ++j) {
      c->d[j] = d;
      c->dmin[j] = c->mn[j] = 0;
      c->sc[j] = nearest_multiple(want.scale[j], d, low, high);
    }
  }
  settle_blocks<Levels, false>(b, low, high, reach, c);
  return true;
}

// Blocks of 256 with scales d sc and minima dmin mn, both integers in 0 .. high.
template <int kTop, class Search, int N>
bool fit_lined(const Batch<N>& b, int high, int reach, Choice* c) {
  constexpr int kPer = 256 / N;
  Lines want;
  fit_lines<kTop, Search, false>(b, &want);
  for (int at = 0; at < kSubs; at += kPer) {
    float curve[kPer], min[kPer];
    for (int j = 0; j < kPer; ++j) curve[j] = want.qq[at + j] - want.q[at + j] * want.q[at + j] / want.one[at + j];
    const float d = rounded_f16(pick_step(want.scale + at, curve, kPer, 0, high));
    for (int j = 0; j < kPer; ++j) {  // the minima that go with the scales as they are now
      c->sc[at + j] = nearest_multiple(want.scale[at + j], d, 0, high);
      const float more = (d * c->sc[at + j] - want.scale[at + j]) * want.q[at + j] / want.one[at + j];
      min[j] = want.min[at + j] + more > 0 ? want.min[at + j] + more : 0;
    }
    const float dmin = rounded_f16(pick_step(min, want.one + at, kPer, 0, high));
    if (!is_finite(d) || !is_finite(dmin)) return false;
    for (int j = 0; j < kPer; ++j) {
      c->d[at + j] = d;
      c->dmin[at + j] = dmin;
      c->mn[at + j] = nearest_multiple(min[j], dmin, 0, high);
    }
  }
  settle_blocks<Even<0, kTop>, true>(b, 0, high, reach, c);
  return true;
}

// Blocks of N with one scale: an fp16 of its own each.
template <class Levels, class Search, int N>
bool fit_single(const Batch<N>& b, Choice* c) {
  Scales want;
  fit_scales<Levels, Search>(b, &want);
  for (int j = 0; j < kSubs; ++j) {
    c->d[j] = rounded_f16(want.scale[j]);
    c->sc[j] = 1;
    c->dmin[j] = c->mn[j] = 0;
    if (!is_finite(c->d[j])) return false;
  }
  return true;
}

// Blocks of N with one scale and one offset, -min, of any sign: an fp16 each.
template <int kTop, class Search, int N>
bool fit_single_line(const Batch<N>& b, Choice* c) {
  Lines want;
  fit_lines<kTop, Search, true>(b, &want);
  for (int j = 0; j < kSubs; ++j) {
    c->d[j] = rounded_f16(want.scale[j]);
    c->dmin[j] = rounded_f16(want.min[j]);
    c->sc[j] = c->mn[j] = 1;
    if (!is_finite(c->d[j]) || !is_finite(c->dmin[j])) return false;
  }
  return true;
}

// code[j N + k]: the code of weight k of sub-block j.
template <class Levels, int N>
void final_codes(const Batch<N>& b, const Choice& c, uint8_t* code) {
  for (int g = 0; g < kSubs; g += kWidth) {
    const Lanes scale = load(c.d + g) * load(c.sc + g), min = load(c.dmin + g) * load(c.mn + g);
    const Lanes inv = ratio(all(1), scale);
    for (int k = 0; k < N; ++k) {
      alignas(64) float level[kWidth];
      store(level, Levels::nearest((load(b.x[k] + g) + min) * inv));
      for (int j = 0; j < kWidth; ++j) code[(g + j) * N + k] = Levels::code(level[j]);
    }
  }
}

}  // namespace
}  // namespace pe
