// Element-wise operations, eight lanes at a time. Tails run the scalar definitions of math.h, which are the same
// operations.
#include "kernels/avx2/vec.h"
#include "kernels/kernels.h"
#include "kernels/tiers.h"

namespace pe {
namespace {

float square16(const float* x, size_t n) {
  Lanes16 sum{_mm256_setzero_ps(), _mm256_setzero_ps()};
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + 8);
    sum.a = _mm256_fmadd_ps(a, a, sum.a);
    sum.b = _mm256_fmadd_ps(b, b, sum.b);
  }
  if (i < n) {
    const Tail16 tail(n - i);
    const __m256 a = _mm256_maskload_ps(x + i, tail.a);
    sum.a = keep(sum.a, _mm256_fmadd_ps(a, a, sum.a), tail.a);
    if (n - i > 8) {
      const __m256 b = _mm256_maskload_ps(x + i + 8, tail.b);
      sum.b = keep(sum.b, _mm256_fmadd_ps(b, b, sum.b), tail.b);
    }
  }
  return fold16(sum);
}

// Eight at a time, then one masked group: f(i, mask or all). Masked-off lanes are neither read nor written.
template <class Full, class Part>
inline void for_lanes(size_t n, Full full, Part part) {
  size_t i = 0;
  for (; i + 8 <= n; i += 8) full(i);
  if (i < n) part(i, lanes_below(n - i));
}

void rms_norm(const float* x, const float* w, size_t n, float eps, float* y) {
  const float r = 1.0f / sqrtf(square16(x, n) / static_cast<float>(n) + eps);
  const __m256 r8 = _mm256_set1_ps(r);
  for_lanes(
      n,
      [&](size_t i) {
        _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), r8), _mm256_loadu_ps(w + i)));
      },
      [&](size_t i, __m256i mask) {
        const __m256 scaled = _mm256_mul_ps(_mm256_maskload_ps(x + i, mask), r8);
        _mm256_maskstore_ps(y + i, mask, _mm256_mul_ps(scaled, _mm256_maskload_ps(w + i, mask)));
      });
}

void rotate(float* a, float* b, const float* cs) {
  const float a0 = *a, b0 = *b;
  *a = fmaf(a0, cs[0], -(b0 * cs[1]));
  *b = fmaf(a0, cs[1], b0 * cs[0]);
}

// Pairs (i, i + half).
void rope_split(float* x, size_t half, const float* cs) {
  size_t i = 0;
  for (; i + 8 <= half; i += 8) {
    const __m256 cs0 = _mm256_loadu_ps(cs + 2 * i), cs1 = _mm256_loadu_ps(cs + 2 * i + 8);
    const __m256 low = _mm256_permute2f128_ps(cs0, cs1, 0x20);   // c0 s0 c1 s1 | c4 s4 c5 s5
    const __m256 high = _mm256_permute2f128_ps(cs0, cs1, 0x31);  // c2 s2 c3 s3 | c6 s6 c7 s7
    const __m256 c = _mm256_shuffle_ps(low, high, 0x88);         // c0 c1 c2 c3 | c4 c5 c6 c7
    const __m256 s = _mm256_shuffle_ps(low, high, 0xdd);
    const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + half + i);
    _mm256_storeu_ps(x + i, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)));
    _mm256_storeu_ps(x + half + i, _mm256_fmadd_ps(a, s, _mm256_mul_ps(b, c)));
  }
  for (; i < half; ++i) rotate(x + i, x + half + i, cs + 2 * i);
}

// Pairs (2i, 2i + 1).
void rope_adjacent(float* x, size_t half, const float* cs) {
  size_t i = 0;
  for (; i + 4 <= half; i += 4) {
    const __m256 ab = _mm256_loadu_ps(x + 2 * i), c_s = _mm256_loadu_ps(cs + 2 * i);
    const __m256 s_c = _mm256_permute_ps(c_s, 0xb1);
    const __m256 bs_bc = _mm256_mul_ps(_mm256_movehdup_ps(ab), s_c);
    _mm256_storeu_ps(x + 2 * i, _mm256_fmaddsub_ps(_mm256_moveldup_ps(ab), c_s, bs_bc));  // a c - b s, a s + b c
  }
  for (; i < half; ++i) rotate(x + 2 * i, x + 2 * i + 1, cs + 2 * i);
}

void rope(const RopeArgs& args) {
  for (size_t h = 0; h < args.heads; ++h) {
    float* x = args.x + h * args.stride;
    args.adjacent ? rope_adjacent(x, args.dims / 2, args.cs) : rope_split(x, args.dims / 2, args.cs);
  }
}

void add(const float* a, const float* b, size_t n, float* y) {
  for_lanes(
      n, [&](size_t i) { _mm256_storeu_ps(y + i, _mm256_add_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i))); },
      [&](size_t i, __m256i mask) {
        _mm256_maskstore_ps(y + i, mask,
                            _mm256_add_ps(_mm256_maskload_ps(a + i, mask), _mm256_maskload_ps(b + i, mask)));
      });
}

inline __m256 silu_mul8(__m256 gate, __m256 up) {
  const __m256 e = exp8(_mm256_xor_ps(gate, _mm256_set1_ps(-0.0f)));
  return _mm256_mul_ps(_mm256_div_ps(gate, _mm256_add_ps(_mm256_set1_ps(1.0f), e)), up);
}

void silu_mul(const float* gate, const float* up, size_t n, float* y) {
  for_lanes(
      n, [&](size_t i) { _mm256_storeu_ps(y + i, silu_mul8(_mm256_loadu_ps(gate + i), _mm256_loadu_ps(up + i))); },
      [&](size_t i, __m256i mask) {
        const __m256 product = silu_mul8(_mm256_maskload_ps(gate + i, mask), _mm256_maskload_ps(up + i, mask));
        _mm256_maskstore_ps(y + i, mask, product);
      });
}

void exp_all(const float* x, size_t n, float* y) {
  for_lanes(
      n, [&](size_t i) { _mm256_storeu_ps(y + i, exp8(_mm256_loadu_ps(x + i))); },
      [&](size_t i, __m256i mask) { _mm256_maskstore_ps(y + i, mask, exp8(_mm256_maskload_ps(x + i, mask))); });
}

int all_finite(const float* x, size_t n) {
  const __m256i exponent = _mm256_set1_epi32(0x7f800000);
  __m256i special = _mm256_setzero_si256();  // lanes that met an infinity or a NaN
  const auto look = [&](__m256i bits) {
    special = _mm256_or_si256(special, _mm256_cmpeq_epi32(_mm256_and_si256(bits, exponent), exponent));
  };
  for_lanes(
      n, [&](size_t i) { look(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))); },
      [&](size_t i, __m256i mask) { look(_mm256_castps_si256(_mm256_maskload_ps(x + i, mask))); });
  return _mm256_testz_si256(special, special);
}

}  // namespace

void avx2_ops(KernelTable* table) {
  table->rms_norm = rms_norm;
  table->rope = rope;
  table->add = add;
  table->silu_mul = silu_mul;
  table->exp = exp_all;
  table->all_finite = all_finite;
}

}  // namespace pe
