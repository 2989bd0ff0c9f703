// Vector forms of math.h for AVX2 + FMA + F16C. Private to the objects of this tier.
#pragma once

#include <immintrin.h>

#include "kernels/math.h"

// The unnamed namespace keeps every symbol local, uninlined members included: one compiled for AVX2 must never be
// linked in place of another tier's.
namespace pe {
namespace {

// Ones in the first n lanes of 8, n <= 8.
[[maybe_unused]] inline __m256i lanes_below(size_t n) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), index);
}

// 16 lanes, a: 0 .. 7, b: 8 .. 15.
struct Lanes16 {
  __m256 a, b;
};

[[maybe_unused]] inline float fold16(const Lanes16& x) {
  const __m256 by8 = _mm256_add_ps(x.a, x.b);
  const __m128 by4 = _mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
  const __m128 by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
  return _mm_cvtss_f32(_mm_add_ss(by2, _mm_movehdup_ps(by2)));
}

// A ragged tail of 1 .. 15 elements: which lanes of a and b it touches. Untouched lanes must keep their bits: adding a
// zero would turn -0 into +0.
struct Tail16 {
  __m256i a, b;
  explicit Tail16(size_t n) : a(lanes_below(n < 8 ? n : 8)), b(lanes_below(n > 8 ? n - 8 : 0)) {}
};

[[maybe_unused]] inline __m256 keep(__m256 untouched, __m256 touched, __m256i mask) {
  return _mm256_blendv_ps(untouched, touched, _mm256_castsi256_ps(mask));
}

struct Float8 {
  using Vector = __m256;
  static Vector set(float x) { return _mm256_set1_ps(x); }
  static Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
};

// exp_f32 of each lane.
[[maybe_unused]] inline __m256 exp8(__m256 x) {
  const ExpParts<Float8> parts(x);
  const __m256i e = _mm256_sub_epi32(_mm256_castps_si256(parts.t), _mm256_set1_epi32(kRoundMagicBits));
  const __m256i half = _mm256_srai_epi32(e, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i s1 = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i s2 = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(e, half), bias), 23);
  __m256 y = _mm256_mul_ps(_mm256_mul_ps(parts.p, _mm256_castsi256_ps(s1)), _mm256_castsi256_ps(s2));
  // Outside the range y is noise (a NaN stays a NaN: neither comparison holds).
  const __m256 high = _mm256_cmp_ps(x, _mm256_set1_ps(kExpHigh), _CMP_GT_OQ);
  const __m256 low = _mm256_cmp_ps(x, _mm256_set1_ps(kExpLow), _CMP_LT_OQ);
  y = _mm256_blendv_ps(y, _mm256_set1_ps(HUGE_VALF), high);
  return _mm256_andnot_ps(low, y);
}

}  // namespace
}  // namespace pe
