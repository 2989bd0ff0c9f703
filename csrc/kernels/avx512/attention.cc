// Attention over one chunk of the KV cache, AVX-512: the contract's sixteen lanes are one register. kernels/attention.h has
// the loops around. Merging, finishing and storing are memory's work: those of the tier below stay.
//
// Register tiles: scores of 4 rows x 4 keys, 8 loads for 16 fmas, whose 16 sums are folded together; values of 6 rows x 64
// dimensions, 10 loads for 24 fmas (4 x 64 straight from the cache). Two loads and two fmas of 512 bits a cycle.
//
// Bounds, and what attention_check --bench measures on one Zen 5 core of 4.2 GHz, 29 GB/s read stream (f16; q8_0):
//   prefill       32 MAC/cycle; for 48 rows exp, widening and merges take a tenth, folds as much at 64 dimensions
//                 4 x 128: 25.1; 24.4 (78 %)      1 x 64: 21.4; 21.0 (67 %)
//   1 token       f16: the stream. 4 x 128: 35 GB/s      1 x 64: 38 GB/s, above what the plain loop reads
//                 q8_0, 4 x 128: a row of 136 bytes is 32 fmas and 8 products with the scale, which the contract wants
//                 exact before the fma: 20 cycles, 28 GB/s; 19.2 (68 %): the other pipes have six operations for each
//                 sixteen codes      1 x 64: 27 GB/s
//   4 tokens      4 x 128: 16 rows, fma: 16.8 GB/s of f16, 8.9 of q8_0; 11.3 (67 %); 6.0      1 x 64: 29.7; 15.7 GB/s
#include "kernels/attention.h"

#include "kernels/avx512/vec.h"
#include "kernels/tiers.h"

namespace pe {
namespace {

// ---- elements of a row of the cache: kParts registers of 16 from dimension d (a multiple of 16 kParts) on ----

struct F32 {
  static constexpr Kv kType = Kv::F32;
  static constexpr int kParts = 1;
  static PE_INLINE void at(const uint8_t* row, size_t d, __m512* x) { x[0] = _mm512_loadu_ps(row + 4 * d); }
  static PE_INLINE void part(const uint8_t* row, size_t d, __mmask16 mask, __m512* x) {
    x[0] = _mm512_maskz_loadu_ps(mask, row + 4 * d);
  }
};

struct F16 {
  static constexpr Kv kType = Kv::F16;
  static constexpr int kParts = 1;
  static PE_INLINE void at(const uint8_t* row, size_t d, __m512* x) {
    x[0] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 2 * d)));
  }
  static PE_INLINE void part(const uint8_t* row, size_t d, __mmask16 mask, __m512* x) {
    x[0] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, row + 2 * d));
  }
};

struct Q8_0 {
  static constexpr Kv kType = Kv::Q8_0;
  static constexpr int kParts = 2;
  static PE_INLINE void at(const uint8_t* row, size_t d, __m512* x) {
    const BlockQ8_0* b = reinterpret_cast<const BlockQ8_0*>(row) + d / 32;
    const __m512 scale = _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(b->d)));
    const __m128i* codes = reinterpret_cast<const __m128i*>(b->qs);
    for (int i = 0; i < 2; ++i)
      x[i] = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(codes + i))));
  }
  static PE_INLINE void part(const uint8_t*, size_t, __mmask16, __m512*) {}  // rows are whole blocks
};

// ---- scores ----

// Lane 4 k + m of the result: the sum of the lanes of x[k + 4 m], in the order of fold16. Each step makes one register of
// n-lane sums from two of 2 n.
PE_INLINE __m512 fold16(const __m512* x) {
  __m512 by8[8], by4[4];
  PE_UNROLL
  for (int i = 0; i < 8; ++i) {
    const __m512 a = x[2 * i], b = x[2 * i + 1];
    by8[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
  }
  PE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512 a = by8[2 * i], b = by8[2 * i + 1];
    by4[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  __m512 by2[2];
  PE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const __m512d a = _mm512_castps_pd(by4[2 * i]), b = _mm512_castps_pd(by4[2 * i + 1]);
    by2[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_mask_blend_pd(0xaa, a, b)),
                           _mm512_castpd_ps(_mm512_shuffle_pd(a, b, 0x55)));
  }
  return _mm512_add_ps(_mm512_shuffle_ps(by2[0], by2[1], 0x88), _mm512_shuffle_ps(by2[0], by2[1], 0xdd));
}
constexpr int fold_slot(int lane) { return lane / 4 + lane % 4 * 4; }  // which of x comes out in a lane

// ---- values ----

// acc[r][d .. d + 16 P) of R rows.
template <class T, int R, int P, class A>
PE_NOINLINE void panel(const float* p, const size_t* end, const uint8_t* v, size_t row_bytes, size_t d, bool first,
                       float* acc, size_t acc_stride, A& ahead) {
  __m512 sum[R][P];
  PE_UNROLL
  for (int r = 0; r < R; ++r) {
    PE_UNROLL
    for (int i = 0; i < P; ++i) {
      const float* from = acc + static_cast<size_t>(r) * acc_stride + d + static_cast<size_t>(16 * i);
      sum[r][i] = first ? _mm512_setzero_ps() : _mm512_load_ps(from);
    }
  }
  size_t j = 0;
  while (j < end[0]) {
    ahead.step();
    const size_t stop = j + 4 < end[0] ? j + 4 : end[0];
    for (; j < stop; ++j, v += row_bytes) {
      __m512 x[P];
      PE_UNROLL
      for (int i = 0; i < P; i += T::kParts) T::at(v, d + static_cast<size_t>(16 * i), x + i);
      PE_UNROLL
      for (int r = 0; r < R; ++r) {
        const __m512 weight = _mm512_set1_ps(p[static_cast<size_t>(r) * kAttnChunk + j]);
        PE_UNROLL
        for (int i = 0; i < P; ++i) sum[r][i] = _mm512_fmadd_ps(weight, x[i], sum[r][i]);
      }
    }
  }
  for (; j < end[R - 1]; ++j, v += row_bytes) {  // the diagonal
    __m512 x[P];
    PE_UNROLL
    for (int i = 0; i < P; i += T::kParts) T::at(v, d + static_cast<size_t>(16 * i), x + i);
    PE_UNROLL
    for (int r = 0; r < R; ++r) {
      const __mmask16 sees = j < end[r] ? 0xffff : 0;
      const __m512 weight = _mm512_set1_ps(p[static_cast<size_t>(r) * kAttnChunk + j]);
      PE_UNROLL
      for (int i = 0; i < P; ++i) sum[r][i] = _mm512_mask3_fmadd_ps(weight, x[i], sum[r][i], sees);
    }
  }
  PE_UNROLL
  for (int r = 0; r < R; ++r) {
    PE_UNROLL
    for (int i = 0; i < P; ++i)
      _mm512_store_ps(acc + static_cast<size_t>(r) * acc_stride + d + static_cast<size_t>(16 * i), sum[r][i]);
  }
}

struct Kernels {
  static constexpr size_t kFew = 4;
  static constexpr int kScoreRows = 4, kValueRows = 6, kDirectRows = 4;
  static constexpr size_t kDirectSteps = 8;
  using WideKeys = F32;
  using WideValues = F32;
  static size_t value_stride(size_t dim) { return dim * sizeof(float); }

  template <class T>
  static void widen(const uint8_t* rows, size_t row_bytes, size_t n, size_t dim, float* tile) {
    constexpr size_t kStep = 16 * T::kParts;
    for (size_t j = 0; j < n; ++j, rows += row_bytes, tile += pad16(dim)) {
      __m512 x[T::kParts];
      size_t d = 0;
      for (; d + kStep <= dim; d += kStep) {
        T::at(rows, d, x);
        for (int i = 0; i < T::kParts; ++i) _mm512_store_ps(tile + d + 16 * i, x[i]);
      }
      if (d == dim) continue;
      T::part(rows, d, static_cast<__mmask16>((1u << (dim - d)) - 1), x);
      _mm512_store_ps(tile + d, x[0]);
    }
  }
  template <class T>
  static void widen_keys(const uint8_t* rows, size_t row_bytes, size_t n, size_t dim, float* tile) {
    widen<T>(rows, row_bytes, n, dim, tile);
  }
  template <class T>
  static void widen_values(const uint8_t* rows, size_t row_bytes, size_t n, size_t dim, float* tile) {
    widen<T>(rows, row_bytes, n, dim, tile);
  }

  template <class T, int R, class A>
  static PE_NOINLINE void score(const float* q, size_t dim, const uint8_t* k, size_t row_bytes, size_t keys,
                                float scale, float* s, A& ahead) {
    constexpr int J = R == 1 ? 16 : R == 2 ? 8 : 4;  // keys of a register tile
    constexpr int N = T::kParts;
    for (size_t j = 0; j < keys; j += J) {
      __m512 sum[16];
      PE_UNROLL
      for (__m512& x : sum) x = _mm512_setzero_ps();
      PE_UNROLL
      for (int g = 0; g < J; g += 4) {  // four keys at a time: a stretch of memory
        ahead.step();
        const uint8_t* key[4];
        PE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const size_t at = j + static_cast<size_t>(g + i);
          key[i] = k + (at < keys ? at : keys - 1) * row_bytes;
        }
        for (size_t d = 0; d < dim; d += 16 * N) {
          __m512 row[R][N];
          PE_UNROLL
          for (int r = 0; r < R; ++r) {
            PE_UNROLL
            for (int n = 0; n < N; ++n) {
              row[r][n] = _mm512_load_ps(q + static_cast<size_t>(r) * dim + d + static_cast<size_t>(16 * n));
              in_register(row[r][n]);
            }
          }
          PE_UNROLL
          for (int i = 0; i < 4; ++i) {
            __m512 x[N];
            T::at(key[i], d, x);
            PE_UNROLL
            for (int n = 0; n < N; ++n) {
              in_register(x[n]);
              PE_UNROLL
              for (int r = 0; r < R; ++r) {
                __m512& to = sum[fold_slot(r * J + g + i)];
                to = _mm512_fmadd_ps(row[r][n], x[n], to);
              }
            }
          }
        }
      }
      const __m512 all = _mm512_mul_ps(fold16(sum), _mm512_set1_ps(scale));
      if constexpr (R == 1) {
        _mm512_storeu_ps(s + j, all);
      } else if constexpr (R == 2) {
        _mm256_storeu_ps(s + j, _mm512_castps512_ps256(all));
        _mm256_storeu_ps(s + kAttnChunk + j, _mm512_extractf32x8_ps(all, 1));
      } else {
        _mm_storeu_ps(s + j, _mm512_castps512_ps128(all));
        _mm_storeu_ps(s + kAttnChunk + j, _mm512_extractf32x4_ps(all, 1));
        _mm_storeu_ps(s + 2 * kAttnChunk + j, _mm512_extractf32x4_ps(all, 2));
        if (R > 3) _mm_storeu_ps(s + 3 * kAttnChunk + j, _mm512_extractf32x4_ps(all, 3));
      }
    }
  }

  static float weigh(float* p, size_t n, float* max) {
    const size_t whole = n / 16 * 16;
    const __mmask16 left = static_cast<__mmask16>((1u << n % 16) - 1);
    __m512 tops[4];  // of their own, so that one maximum need not wait for the one before
    PE_UNROLL
    for (__m512& t : tops) t = _mm512_set1_ps(-HUGE_VALF);
    size_t j = 0;
    // a NaN in the first operand is passed over
    for (; j + 64 <= n; j += 64) {
      PE_UNROLL
      for (size_t i = 0; i < 4; ++i) tops[i] = _mm512_max_ps(_mm512_load_ps(p + j + 16 * i), tops[i]);
    }
    __m512 top = _mm512_max_ps(_mm512_max_ps(tops[0], tops[1]), _mm512_max_ps(tops[2], tops[3]));
    for (; j < whole; j += 16) top = _mm512_max_ps(_mm512_load_ps(p + j), top);
    top = _mm512_mask_max_ps(top, left, _mm512_load_ps(p + whole), top);
    *max = _mm512_reduce_max_ps(top) + 0.0f;

    const __m512 max16 = _mm512_set1_ps(*max);
    __m512 sum = _mm512_setzero_ps();
    for (j = 0; j < whole; j += 16) {
      const __m512 e = exp16_below_0(_mm512_sub_ps(_mm512_load_ps(p + j), max16));
      _mm512_store_ps(p + j, e);
      sum = _mm512_add_ps(sum, e);
    }
    if (left != 0) {
      const __m512 e = exp16_below_0(_mm512_sub_ps(_mm512_load_ps(p + j), max16));
      _mm512_store_ps(p + j, e);
      sum = _mm512_mask_add_ps(sum, left, sum, e);
    }
    return fold16(sum);
  }

  template <class T, int R, class A>
  static void values(const float* p, const size_t* end, const uint8_t* v, size_t row_bytes, size_t dim, bool first,
                     float* acc, size_t acc_stride, A& ahead) {
    constexpr int P = R <= 2 ? 8 : 4;
    size_t d = 0;
    for (; d + 16 * P <= dim; d += 16 * P) panel<T, R, P>(p, end, v, row_bytes, d, first, acc, acc_stride, ahead);
    if constexpr (P > 4) {
      for (; d + 64 <= dim; d += 64) panel<T, R, 4>(p, end, v, row_bytes, d, first, acc, acc_stride, ahead);
    }
    for (; d < dim; d += 16 * T::kParts) panel<T, R, T::kParts>(p, end, v, row_bytes, d, first, acc, acc_stride, ahead);
  }
};

}  // namespace

void avx512_attention(KernelTable* table) {
  table->attn_chunk[static_cast<int>(Kv::F16)] = attn_chunk<Kernels, F16>;
  table->attn_chunk[static_cast<int>(Kv::F32)] = attn_chunk<Kernels, F32>;
  table->attn_chunk[static_cast<int>(Kv::Q8_0)] = attn_chunk<Kernels, Q8_0>;
}

}  // namespace pe
