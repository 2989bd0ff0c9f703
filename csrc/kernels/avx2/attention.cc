// Attention over one chunk of the KV cache, AVX2. Lane sums and chains are those of the scalar kernel.
//
// Many rows (prefill): a tile of keys or values is widened to float once and multiplied with all rows from the first-level
// cache, in register tiles of 3 rows x 2 keys (scores) and 6 rows x 16 dimensions (values): 12 sums in flight hide the
// latency of fma, 10 and 8 loads keep below its 12. Few rows (decode) widen in registers, straight from the cache.
//
// Bounds, and what attention_check --bench measures on one Zen 5 core of 4.2 GHz, 29 GB/s read stream (f16; q8_0):
//   prefill       16 MAC/cycle; exp, folds and merges leave about 13.8 at 4 heads x 128 and 12 at 1 x 64
//                 4 x 128: 13.2; 13.0      1 x 64: 11.8; 11.5
//   1 token       1 x 64: the stream, 35 GB/s; q8_0: 18.9, bound by widening (load, convert, scale for each fma)
//                 4 x 128: 64 fmas, 32 cycles a row: 33 GB/s of f16, 22.2 reached; q8_0: 16 products with the scale more, 40
//                 cycles, 14 GB/s, 10.8 reached
#include "kernels/attention.h"

#include "kernels/avx2/vec.h"
#include "kernels/tiers.h"
#include "kernels/unroll.h"

namespace pe {
namespace {

// ---- eight elements of a row: d + 8 h .. d + 8 h + 7; d: a multiple of 16, h: 0 or 1 ----

struct F32 {
  static constexpr Kv kType = Kv::F32;
  static __m256 at(const uint8_t* row, size_t d, int h) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(row) + d + 8 * h);
  }
};

struct F16 {
  static constexpr Kv kType = Kv::F16;
  static __m256 at(const uint8_t* row, size_t d, int h) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * d) + h));
  }
};

struct Q8_0 {
  static constexpr Kv kType = Kv::Q8_0;
  static __m256 at(const uint8_t* row, size_t d, int h) {  // both halves share the scale's conversion
    const BlockQ8_0* b = reinterpret_cast<const BlockQ8_0*>(row) + d / 32;
    const __m256 scale = _mm256_cvtph_ps(_mm_set1_epi16(static_cast<short>(b->d)));
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(b->qs + d % 32 + 8 * h));
    return _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)));
  }
};

// Widened values: [dimension / 16][kAttnTile][16] floats, so that a register tile reads one after the other.
struct Panels {
  static constexpr Kv kType = Kv::F32;
  static __m256 at(const uint8_t* row, size_t d, int h) { return F32::at(row, d * kAttnTile, h); }
};

template <class T>
inline Lanes16 at16(const uint8_t* row, size_t d) {
  return {T::at(row, d, 0), T::at(row, d, 1)};
}

// Sixteen elements of which only the first n exist, zeros after them. Zeros change at most the sign of a zero score, and
// that reaches nothing: exp(+-0 - max) is the same. Rows of Q8_0 have no such part.
template <class T>
Lanes16 part(const uint8_t* row, size_t d, size_t n) {
  const size_t bytes = kv_row_bytes(T::kType, 1);
  alignas(32) uint8_t copy[64] = {};
  memcpy(copy, row + d * bytes, n * bytes);
  return at16<T>(copy, 0);
}

// Widens a tile: sixteen elements from dimension d of key j go to tile[j * key_stride + d * d_stride].
template <class T>
void widen(const uint8_t* rows, size_t row_bytes, size_t keys, size_t dim, size_t key_stride, size_t d_stride,
           float* tile) {
  for (size_t j = 0; j < keys; ++j, rows += row_bytes, tile += key_stride) {
    const auto put = [&](size_t d, const Lanes16& x) {
      _mm256_store_ps(tile + d * d_stride, x.a);
      _mm256_store_ps(tile + d * d_stride + 8, x.b);
    };
    size_t d = 0;
    for (; d + 16 <= dim; d += 16) put(d, at16<T>(rows, d));
    if (d < dim) put(d, part<T>(rows, d, dim - d));
  }
}

// Keeps the compiler from loading x anew for every use: loads would then bound the loop.
inline void in_register(__m256& x) {
#if defined(__GNUC__)
  __asm__("" : "+x"(x));
#else
  static_cast<void>(x);
#endif
}

// ---- scores ----

// The steps of fold16 for several sums at once: two vectors of n-lane sums become one of n/2-lane sums, neighbours of a
// pair meeting in one addition.
inline __m256 halves(__m256 a, __m256 b) {  // lane[i] += lane[i + 4]: a's in the low half, b's in the high
  return _mm256_add_ps(_mm256_blend_ps(a, b, 0xf0), _mm256_permute2f128_ps(a, b, 0x21));
}
inline __m256 quarters(__m256 a, __m256 b) {  // lane[i] += lane[i + 2], in each half: a's two, b's two
  const __m256d c = _mm256_castps_pd(a), d = _mm256_castps_pd(b);
  return _mm256_add_ps(_mm256_castpd_ps(_mm256_blend_pd(c, d, 0xa)), _mm256_castpd_ps(_mm256_shuffle_pd(c, d, 0x5)));
}
inline __m256 eighths(__m256 a, __m256 b) {  // lane[i] += lane[i + 1]: a's and b's by turns
  return _mm256_add_ps(_mm256_blend_ps(a, _mm256_moveldup_ps(b), 0xaa),
                       _mm256_blend_ps(_mm256_movehdup_ps(a), b, 0xaa));
}

// sum[j][r][i] = lanes 8 (h + i) .. of dot16(q[r], *k[j]) for R rows and J keys; H = 2: all lanes, H = 1: half h. dim: a
// multiple of 16.
template <class T, int R, int J, int H>
inline void lanes(const float* q, size_t dim, const uint8_t* const* k, int h, __m256 (*sum)[R][H]) {
  PE_UNROLL
  for (int j = 0; j < J; ++j) {
    PE_UNROLL
    for (int r = 0; r < R; ++r) {
      PE_UNROLL
      for (int i = 0; i < H; ++i) sum[j][r][i] = _mm256_setzero_ps();
    }
  }
  const auto query = [&](int r, size_t d, int half) {
    __m256 x = _mm256_load_ps(q + static_cast<size_t>(r) * dim + d + static_cast<size_t>(8 * half));
    if (J > 1) in_register(x);
    return x;
  };
  for (size_t d = 0; d < dim; d += 16) {
    PE_UNROLL
    for (int i = 0; i < H; ++i) {
      if constexpr (R > 3) {
        __m256 key[J];
        PE_UNROLL
        for (int j = 0; j < J; ++j) key[j] = T::at(k[j], d, h + i);
        PE_UNROLL
        for (int r = 0; r < R; ++r) {
          const __m256 row = query(r, d, h + i);
          PE_UNROLL
          for (int j = 0; j < J; ++j) sum[j][r][i] = _mm256_fmadd_ps(row, key[j], sum[j][r][i]);
        }
      } else {
        __m256 row[R];
        PE_UNROLL
        for (int r = 0; r < R; ++r) row[r] = query(r, d, h + i);
        PE_UNROLL
        for (int j = 0; j < J; ++j) {
          __m256 key = T::at(k[j], d, h + i);
          if (R > 1) in_register(key);
          PE_UNROLL
          for (int r = 0; r < R; ++r) sum[j][r][i] = _mm256_fmadd_ps(row[r], key, sum[j][r][i]);
        }
      }
    }
  }
}

// by8[j][r] = lane[i] + lane[i + 8] of dot16(q[r], *k[j]).
template <class T, int R, int J>
inline void dots(const float* q, size_t dim, const uint8_t* const* k, __m256 (*by8)[R]) {
  if constexpr (R <= 3 || J == 1) {
    __m256 sum[J][R][2];
    lanes<T, R, J, 2>(q, dim, k, 0, sum);
    PE_UNROLL
    for (int j = 0; j < J; ++j) {
      PE_UNROLL
      for (int r = 0; r < R; ++r) by8[j][r] = _mm256_add_ps(sum[j][r][0], sum[j][r][1]);
    }
  } else {  // one half after the other: all sums would not fit the registers
    __m256 low[J][R][1], high[J][R][1];
    lanes<T, R, J, 1>(q, dim, k, 0, low);
    lanes<T, R, J, 1>(q, dim, k, 1, high);
    PE_UNROLL
    for (int j = 0; j < J; ++j) {
      PE_UNROLL
      for (int r = 0; r < R; ++r) by8[j][r] = _mm256_add_ps(low[j][r][0], high[j][r][0]);
    }
  }
}

// s[r][j] = dot16(q[r], k[j]) * scale for R rows, whose scores lie kAttnChunk apart. Up to seven scores past `keys` are
// written; only the rows of the keys are read, in order.
template <class T, int R, class A>
PE_NOINLINE void score(const float* q, size_t dim, const uint8_t* k, size_t row_bytes, size_t keys, float scale,
                       float* s, A& ahead) {
  constexpr int J = R == 1 ? 4 : 2;  // keys of a register tile
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (size_t j = 0; j < keys; j += 8) {
    ahead.step();
    alignas(32) float by4[R][4][8];  // of keys 2 i and 2 i + 1
    for (int i = 0; i < 8; i += J) {
      const uint8_t* key[J];
      for (int n = 0; n < J; ++n) {
        const size_t at = j + static_cast<size_t>(i + n);
        key[n] = k + (at < keys ? at : keys - 1) * row_bytes;
      }
      __m256 by8[J][R];
      dots<T, R, J>(q, dim, key, by8);
      for (int n = 0; n < J; n += 2) {
        for (int r = 0; r < R; ++r) _mm256_store_ps(by4[r][(i + n) / 2], halves(by8[n][r], by8[n + 1][r]));
      }
    }
    for (int r = 0; r < R; ++r) {
      const __m256 even = quarters(_mm256_load_ps(by4[r][0]), _mm256_load_ps(by4[r][2]));
      const __m256 odd = quarters(_mm256_load_ps(by4[r][1]), _mm256_load_ps(by4[r][3]));
      const __m256 by1 = _mm256_permutevar8x32_ps(eighths(even, odd), in_order);
      _mm256_store_ps(s + static_cast<size_t>(r) * kAttnChunk + j, _mm256_mul_ps(by1, _mm256_set1_ps(scale)));
    }
  }
}

// exp_f32 of each lane, for x <= 0 or NaN. Where exp_f32 says 0 at once, so does the last product here: -105 and all
// above it down to exp_f32's limit give less than 2^-150.
inline __m256 exp8_below_0(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-105.0f), x);  // a NaN in the second operand stays
  const ExpParts<Float8> parts(x);
  // The magic's low nine bits, and those of its half, are zero: shifted by 23 they leave n alone.
  const __m256i e = _mm256_castps_si256(parts.t), half = _mm256_srai_epi32(e, 1),
                one = _mm256_castps_si256(_mm256_set1_ps(1));
  const __m256i s1 = _mm256_add_epi32(_mm256_slli_epi32(half, 23), one);
  const __m256i s2 = _mm256_add_epi32(_mm256_slli_epi32(_mm256_sub_epi32(e, half), 23), one);
  return _mm256_mul_ps(_mm256_mul_ps(parts.p, _mm256_castsi256_ps(s1)), _mm256_castsi256_ps(s2));
}

// p[0 .. n) from scores to weights: exp(p - max). Returns sum16 of the weights; *max is the maximum.
float weigh(float* p, size_t n, float* max) {
  __m256 tops[4];  // of their own, so that one maximum need not wait for the one before
  for (__m256& t : tops) t = _mm256_set1_ps(-HUGE_VALF);
  size_t j = 0;
  // a NaN in the first operand is passed over
  for (; j + 32 <= n; j += 32) {
    for (size_t i = 0; i < 4; ++i) tops[i] = _mm256_max_ps(_mm256_load_ps(p + j + 8 * i), tops[i]);
  }
  __m256 top = _mm256_max_ps(_mm256_max_ps(tops[0], tops[1]), _mm256_max_ps(tops[2], tops[3]));
  for (; j + 8 <= n; j += 8) top = _mm256_max_ps(_mm256_load_ps(p + j), top);
  if (j < n) {
    const __m256i mask = lanes_below(n - j);
    top = keep(top, _mm256_max_ps(_mm256_maskload_ps(p + j, mask), top), mask);
  }
  __m128 top4 = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
  top4 = _mm_max_ps(top4, _mm_movehl_ps(top4, top4));
  *max = _mm_cvtss_f32(_mm_max_ss(top4, _mm_movehdup_ps(top4))) + 0.0f;

  const __m256 max8 = _mm256_set1_ps(*max);
  Lanes16 sum{_mm256_setzero_ps(), _mm256_setzero_ps()};
  const auto weigh8 = [&](size_t i, __m256* lanes) {
    const __m256 e = exp8_below_0(_mm256_sub_ps(_mm256_loadu_ps(p + i), max8));
    _mm256_storeu_ps(p + i, e);
    *lanes = _mm256_add_ps(*lanes, e);
  };
  const auto weigh_part = [&](size_t i, size_t count, __m256* lanes) {
    const __m256i mask = lanes_below(count);
    const __m256 e = exp8_below_0(_mm256_sub_ps(_mm256_maskload_ps(p + i, mask), max8));
    _mm256_maskstore_ps(p + i, mask, e);
    *lanes = keep(*lanes, _mm256_add_ps(*lanes, e), mask);
  };
  for (j = 0; j + 16 <= n; j += 16) {
    weigh8(j, &sum.a);
    weigh8(j + 8, &sum.b);
  }
  if (j + 8 <= n) {
    weigh8(j, &sum.a);
    if (j + 8 < n) weigh_part(j + 8, n - j - 8, &sum.b);
  } else if (j < n) {
    weigh_part(j, n - j, &sum.a);
  }
  return fold16(sum);
}

// ---- values ----

// acc[r][d .. d + 16 P) continued over a tile of keys, of which row r sees the first end[r] (ascending). acc starts at +0
// in the first tile.
template <class T, int R, int P, class A>
PE_NOINLINE void panel(const float* p, const size_t* end, const uint8_t* v, size_t row_bytes, size_t d, bool first,
                       float* acc, size_t acc_stride, A& ahead) {
  Lanes16 sum[R][P];
  PE_UNROLL
  for (int r = 0; r < R; ++r) {
    PE_UNROLL
    for (int i = 0; i < P; ++i) {
      const float* from = acc + static_cast<size_t>(r) * acc_stride + d + static_cast<size_t>(16 * i);
      sum[r][i].a = first ? _mm256_setzero_ps() : _mm256_load_ps(from);
      sum[r][i].b = first ? _mm256_setzero_ps() : _mm256_load_ps(from + 8);
    }
  }
  size_t j = 0;
  while (j < end[0]) {
    ahead.step();
    const size_t stop = j + 8 < end[0] ? j + 8 : end[0];
    for (; j < stop; ++j, v += row_bytes) {
      Lanes16 row[P];
      PE_UNROLL
      for (int i = 0; i < P; ++i) row[i] = at16<T>(v, d + static_cast<size_t>(16 * i));
      PE_UNROLL
      for (int r = 0; r < R; ++r) {
        const __m256 weight = _mm256_broadcast_ss(p + static_cast<size_t>(r) * kAttnChunk + j);
        PE_UNROLL
        for (int i = 0; i < P; ++i) {
          sum[r][i].a = _mm256_fmadd_ps(weight, row[i].a, sum[r][i].a);
          sum[r][i].b = _mm256_fmadd_ps(weight, row[i].b, sum[r][i].b);
        }
      }
    }
  }
  for (; j < end[R - 1]; ++j, v += row_bytes) {  // the diagonal
    PE_UNROLL
    for (int i = 0; i < P; ++i) {
      const Lanes16 row = at16<T>(v, d + static_cast<size_t>(16 * i));
      PE_UNROLL
      for (int r = 0; r < R; ++r) {
        const __m256i sees = _mm256_set1_epi32(j < end[r] ? -1 : 0);
        const __m256 weight = _mm256_broadcast_ss(p + static_cast<size_t>(r) * kAttnChunk + j);
        sum[r][i].a = keep(sum[r][i].a, _mm256_fmadd_ps(weight, row.a, sum[r][i].a), sees);
        sum[r][i].b = keep(sum[r][i].b, _mm256_fmadd_ps(weight, row.b, sum[r][i].b), sees);
      }
    }
  }
  PE_UNROLL
  for (int r = 0; r < R; ++r) {
    PE_UNROLL
    for (int i = 0; i < P; ++i) {
      float* to = acc + static_cast<size_t>(r) * acc_stride + d + static_cast<size_t>(16 * i);
      _mm256_store_ps(to, sum[r][i].a);
      _mm256_store_ps(to + 8, sum[r][i].b);
    }
  }
}

struct Kernels {
  static constexpr size_t kFew = 4;
  static constexpr int kScoreRows = 3, kValueRows = 6, kDirectRows = 4;
  static constexpr size_t kDirectSteps = kAttnTile / 8;
  using WideKeys = F32;
  using WideValues = Panels;
  static size_t value_stride(size_t) { return 16 * sizeof(float); }

  template <class T>
  static void widen_keys(const uint8_t* rows, size_t row_bytes, size_t n, size_t dim, float* tile) {
    widen<T>(rows, row_bytes, n, dim, pad16(dim), 1, tile);
  }
  template <class T>
  static void widen_values(const uint8_t* rows, size_t row_bytes, size_t n, size_t dim, float* tile) {
    widen<T>(rows, row_bytes, n, dim, 16, kAttnTile, tile);
  }
  template <class T, int R, class A>
  static void score(const float* q, size_t dim, const uint8_t* k, size_t row_bytes, size_t keys, float scale, float* s,
                    A& ahead) {
    pe::score<T, R>(q, dim, k, row_bytes, keys, scale, s, ahead);
  }
  static float weigh(float* p, size_t n, float* max) { return pe::weigh(p, n, max); }

  template <class T, int R, class A>
  static void values(const float* p, const size_t* end, const uint8_t* v, size_t row_bytes, size_t dim, bool first,
                     float* acc, size_t acc_stride, A& ahead) {
    constexpr int P = R <= 2 ? 2 : 1;
    size_t d = 0;
    for (; d + 16 * P <= dim; d += 16 * P) panel<T, R, P>(p, end, v, row_bytes, d, first, acc, acc_stride, ahead);
    for (; d < dim; d += 16) panel<T, R, 1>(p, end, v, row_bytes, d, first, acc, acc_stride, ahead);
  }
};

// y[d] = fma(a[d], c, b[d]); y may be a or b.
void scale_add(const float* a, float c, const float* b, size_t dim, float* y) {
  const __m256 c8 = _mm256_set1_ps(c);
  size_t d = 0;
  for (; d + 8 <= dim; d += 8) {
    _mm256_storeu_ps(y + d, _mm256_fmadd_ps(_mm256_loadu_ps(a + d), c8, _mm256_loadu_ps(b + d)));
  }
  for (; d < dim; ++d) y[d] = fmaf(a[d], c, b[d]);
}

void attn_merge(float* m, float* sum, float* acc, float m2, float sum2, const float* acc2, size_t dim) {
  if (m2 > *m) {
    const float c = exp_f32(*m - m2);
    *sum = fmaf(*sum, c, sum2);
    scale_add(acc, c, acc2, dim, acc);
    *m = m2;
  } else {
    const float c = exp_f32(m2 - *m);
    *sum = fmaf(sum2, c, *sum);
    scale_add(acc2, c, acc, dim, acc);
  }
}

void attn_finish(const float* acc, float sum, size_t dim, float* y) {
  const float inverse = 1.0f / sum;
  const __m256 inverse8 = _mm256_set1_ps(inverse);
  size_t d = 0;
  for (; d + 8 <= dim; d += 8) _mm256_storeu_ps(y + d, _mm256_mul_ps(_mm256_loadu_ps(acc + d), inverse8));
  for (; d < dim; ++d) y[d] = acc[d] * inverse;
}

void store_f16(const float* x, size_t n, void* dst) {
  uint16_t* out = static_cast<uint16_t*>(dst);
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), h);
  }
  for (; i < n; ++i) out[i] = f32_to_f16(x[i]);
}

void store_q8_0(const float* x, size_t n, void* dst) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  BlockQ8_0* b = static_cast<BlockQ8_0*>(dst);
  for (; n > 0; n -= 32, x += 32, ++b) {
    // As integers magnitudes order like floats, with NaN above infinity: one maximum finds all.
    __m256i top8 = _mm256_setzero_si256();
    for (int i = 0; i < 32; i += 8) {
      top8 = _mm256_max_epi32(top8, _mm256_castps_si256(_mm256_and_ps(_mm256_loadu_ps(x + i), magnitude)));
    }
    __m128i top = _mm_max_epi32(_mm256_castsi256_si128(top8), _mm256_extracti128_si256(top8, 1));
    top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4e));
    const uint32_t amax = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(top, _mm_shuffle_epi32(top, 0xb1))));
    const bool finite = amax < 0x7f800000u;
    const float scale = finite ? bits_float(amax) / 127 : bits_float(0x7fc00000);
    const float inv = is_finite(1 / scale) ? 1 / scale : 0;
    __m256i q[4];
    for (int i = 0; i < 4; ++i) {
      const __m256 v = _mm256_loadu_ps(x + 8 * i);
      const __m256 a = _mm256_and_ps(_mm256_mul_ps(v, _mm256_set1_ps(inv)), magnitude);
      const __m256 whole = _mm256_floor_ps(a), fraction = _mm256_sub_ps(a, whole);
      const __m256 rounded = _mm256_add_ps(whole, _mm256_floor_ps(_mm256_add_ps(fraction, fraction)));
      q[i] = _mm256_sign_epi32(_mm256_cvttps_epi32(rounded), _mm256_castps_si256(v));
    }
    __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(b->qs), finite ? bytes : _mm256_setzero_si256());
    b->d = f32_to_f16(scale);
  }
}

}  // namespace

void avx2_attention(KernelTable* table) {
  table->store_kv[static_cast<int>(Kv::F16)] = store_f16;
  table->store_kv[static_cast<int>(Kv::Q8_0)] = store_q8_0;
  table->attn_chunk[static_cast<int>(Kv::F16)] = attn_chunk<Kernels, F16>;
  table->attn_chunk[static_cast<int>(Kv::F32)] = attn_chunk<Kernels, F32>;
  table->attn_chunk[static_cast<int>(Kv::Q8_0)] = attn_chunk<Kernels, Q8_0>;
  table->attn_merge = attn_merge;
  table->attn_finish = attn_finish;
}

}  // namespace pe
