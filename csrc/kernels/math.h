// The engine's own exp and the shared shape of float reductions, as defined operations: the same bits on every tier.
// Private to kernel objects (everything is static); the vector forms live beside the kernels of each tier.
//
// exp(x), float:
//   x is NaN          NaN
//   x > kExpHigh      +inf    (kExpHigh is the largest float whose exp is finite: 88.72283)
//   x < kExpLow       +0      (kExpLow = -103.97208: below it exp(x) < 2^-150, which rounds to 0)
//   otherwise         n = round(x log2 e), ties to even, by adding and taking away 1.5 * 2^23
//                     r = x - n ln 2 in two fma steps (kLn2High has 15 significant bits: the first step is exact), |r|
//                     <= 0.3467
//                     p = 1 + r (1 + r (c2 + r (c3 + r (c4 + r (c5 + r c6))))), Horner, each step one fma
//                     (p * 2^(n >> 1)) * 2^(n - (n >> 1)): the first product is exact, so a denormal result rounds once
//                     more and no other result does
// The polynomial is the minimax of the relative error on |r| <= ln 2 / 2 with c0 = c1 = 1 (Remez exchange in 200-bit
// arithmetic); coefficients were rounded to float from low to high degree, the rest fitted again after each. Its error
// is 3.2e-9 = 0.05 ulp; over all floats the whole function stays within 1 ulp (tests/kernels/ops_check.cc).
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "quant/fp16.h"

namespace pe {

static constexpr float kExpHigh = 0x1.62e42ep6f;
static constexpr float kExpLow = -0x1.9fe368p6f;
static constexpr float kLog2E = 0x1.715476p0f;
static constexpr float kLn2High = 0x1.62e4p-1f;
static constexpr float kLn2Low = 0x1.7f7d1cp-20f;  // ln 2 - kLn2High
static constexpr float kRoundMagic = 0x1.8p23f;    // adding it leaves round(x) in the low bits, |x| < 2^22
static constexpr int32_t kRoundMagicBits = 0x4b400000;
static constexpr float kExpC2 = 0x1.fffffcp-2f;
static constexpr float kExpC3 = 0x1.55548cp-3f;
static constexpr float kExpC4 = 0x1.555858p-5f;
static constexpr float kExpC5 = 0x1.123dep-7f;
static constexpr float kExpC6 = 0x1.6ac74ep-10f;

// 2^n, -126 <= n <= 127
[[maybe_unused]] static inline float power_of_two(int32_t n) {
  return bits_float(static_cast<uint32_t>(n + 127) << 23);
}

[[maybe_unused]] static inline float exp_f32(float x) {
  if (!(x >= kExpLow)) return x < kExpLow ? 0.0f : x + x;  // x + x: a quiet NaN
  if (x > kExpHigh) return HUGE_VALF;
  const float t = fmaf(x, kLog2E, kRoundMagic);
  const float n = t - kRoundMagic;
  float r = fmaf(n, -kLn2High, x);
  r = fmaf(n, -kLn2Low, r);
  float p = fmaf(kExpC6, r, kExpC5);
  p = fmaf(p, r, kExpC4);
  p = fmaf(p, r, kExpC3);
  p = fmaf(p, r, kExpC2);
  p = fmaf(p, r, 1.0f);
  p = fmaf(p, r, 1.0f);
  const int32_t e = static_cast<int32_t>(float_bits(t)) - kRoundMagicBits;  // -150 .. 128
  const int32_t half = e >> 1;
  return p * power_of_two(half) * power_of_two(e - half);
}

// The same of a vector, except its range: exp(x) = p * 2^n, and t, whose bits are kRoundMagicBits + n. V: a vector type with
// set(float), sub and fma.
template <class V>
struct ExpParts {
  typename V::Vector t, n, p;

  explicit ExpParts(typename V::Vector x)
      : t(V::fma(x, V::set(kLog2E), V::set(kRoundMagic))), n(V::sub(t, V::set(kRoundMagic))) {
    auto r = V::fma(n, V::set(-kLn2High), x);
    r = V::fma(n, V::set(-kLn2Low), r);
    p = V::fma(V::set(kExpC6), r, V::set(kExpC5));
    p = V::fma(p, r, V::set(kExpC4));
    p = V::fma(p, r, V::set(kExpC3));
    p = V::fma(p, r, V::set(kExpC2));
    p = V::fma(p, r, V::set(1.0f));
    p = V::fma(p, r, V::set(1.0f));
  }
};

// gate / (1 + exp(-gate)) * up
[[maybe_unused]] static inline float silu_mul_f32(float gate, float up) { return gate / (1.0f + exp_f32(-gate)) * up; }

// The sum of 16 lanes by halves: lane[i] += lane[i + 8], then 4, 2, 1. Destroys the lanes.
[[maybe_unused]] static inline float fold16(float lane[16]) {
  for (size_t h = 8; h > 0; h /= 2) {
    for (size_t i = 0; i < h; ++i) lane[i] += lane[i + h];
  }
  return lane[0];
}

}  // namespace pe
