// Vector forms of math.h for AVX-512. Private to the objects of this tier.
#pragma once

#include <immintrin.h>

#include "kernels/math.h"
#include "kernels/unroll.h"

namespace pe {
namespace {

// Keeps the compiler from loading x anew for every use: loads would then bound the loop.
PE_INLINE void in_register(__m512& x) {
#if defined(__GNUC__)
  __asm__("" : "+v"(x));
#else
  static_cast<void>(x);
#endif
}

PE_INLINE float fold16(__m512 x) {
  const __m256 by8 = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 by4 = _mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
  const __m128 by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
  return _mm_cvtss_f32(_mm_add_ss(by2, _mm_movehdup_ps(by2)));
}

struct Float16 {
  using Vector = __m512;
  static PE_INLINE Vector set(float x) { return _mm512_set1_ps(x); }
  static PE_INLINE Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  static PE_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
};

// exp_f32 of each lane, for x <= 0 or NaN. The scaling rounds once, as exp_f32's two products do. -105 and all above it
// down to exp_f32's limit give less than 2^-150, which is 0.
PE_INLINE __m512 exp16_below_0(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-105.0f), x);  // a NaN in the second operand stays
  const ExpParts<Float16> e(x);
  return _mm512_scalef_ps(e.p, e.n);
}

}  // namespace
}  // namespace pe
