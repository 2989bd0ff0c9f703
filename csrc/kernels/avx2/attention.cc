// Attention over one chunk of the KV cache, AVX2. Lane sums and chains are those of the scalar kernel.
//
// Many rows (prefill): a tile of keys or values is widened to float once and multiplied with all rows from the first-level
// cache, in register tiles of 3 rows x 2 keys (scores) and 6 rows x 16 dimensions (values): 12 sums in flight hide the
// latency of fma, 10 and 8 loads keep below its 12. Few rows (decode) widen in registers, straight from the cache.
#include "kernels/avx2/vec.h"
#include "kernels/kernels.h"
#include "kernels/tiers.h"

namespace pe {
namespace {

constexpr size_t kFew = 4;  // rows that do not pay for widening a tile through memory

// ---- sixteen elements, d .. d + 15, of a row ----

struct F32 {
  static constexpr Kv kType = Kv::F32;
  static Lanes16 at(const uint8_t* row, size_t d) {
    const float* p = reinterpret_cast<const float*>(row) + d;
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
  }
};

struct F16 {
  static constexpr Kv kType = Kv::F16;
  static Lanes16 at(const uint8_t* row, size_t d) {
    const __m128i* p = reinterpret_cast<const __m128i*>(row + 2 * d);
    return {_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128(p + 1))};
  }
};

struct Q8_0 {
  static constexpr Kv kType = Kv::Q8_0;
  static __m256 codes(const int8_t* q) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q))));
  }
  static Lanes16 at(const uint8_t* row, size_t d) {
    const BlockQ8_0* b = reinterpret_cast<const BlockQ8_0*>(row) + d / 32;
    const __m256 scale = _mm256_cvtph_ps(_mm_set1_epi16(static_cast<short>(b->d)));
    const int8_t* q = b->qs + d % 32;
    return {_mm256_mul_ps(scale, codes(q)), _mm256_mul_ps(scale, codes(q + 8))};
  }
};

// Widened values: [dimension / 16][kAttnTile][16] floats, so that a register tile reads one after the other.
struct Panels {
  static Lanes16 at(const uint8_t* row, size_t d) { return F32::at(row, d * kAttnTile); }
};

// Sixteen elements of which only the first n exist, zeros after them. Zeros change at most the sign of a zero score, and
// that reaches nothing: exp(+-0 - max) is the same. Rows of Q8_0 have no such part.
template <class T>
Lanes16 part(const uint8_t* row, size_t d, size_t n) {
  const size_t bytes = kv_row_bytes(T::kType, 1);
  alignas(32) uint8_t copy[64] = {};
  memcpy(copy, row + d * bytes, n * bytes);
  return T::at(copy, 0);
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
    for (; d + 16 <= dim; d += 16) put(d, T::at(rows, d));
    if (d < dim) put(d, part<T>(rows, d, dim - d));
  }
}

// ---- rows in groups of at most N, known at compile time ----

template <int N>
struct Count {
  static constexpr int value = N;
};

template <int N, class F>
inline void rest(size_t n, size_t r, F f) {
  if constexpr (N > 0) {
    if (n == N) {
      f(Count<N>(), r);
    } else {
      rest<N - 1>(n, r, f);
    }
  }
}

// f(Count, first row) over all rows: groups of N, then what is left.
template <int N, class F>
inline void for_groups(size_t rows, F f) {
  size_t r = 0;
  for (; r + N <= rows; r += N) f(Count<N>(), r);
  rest<N - 1>(rows - r, r, f);
}

// ---- scores ----

// The second to last steps of fold16 for eight keys at once: x[8 j + i] holds lane[i] + lane[i + 8] of key j. Neighbours of a
// pair meet in one addition, so a vector of n-lane sums becomes half a vector of n/2-lane sums.
inline __m256 fold_keys(const float* x) {
  const auto halves = [](__m256 a, __m256 b) {  // lane[i] += lane[i + 4]: a in the low half, b in the high
    return _mm256_add_ps(_mm256_blend_ps(a, b, 0xf0), _mm256_permute2f128_ps(a, b, 0x21));
  };
  const auto quarters = [](__m256 a, __m256 b) {  // lane[i] += lane[i + 2]
    const __m256d c = _mm256_castps_pd(a), d = _mm256_castps_pd(b);
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_blend_pd(c, d, 0xa)), _mm256_castpd_ps(_mm256_shuffle_pd(c, d, 0x5)));
  };
  __m256 v[4];
  for (int j = 0; j < 4; ++j) v[j] = halves(_mm256_load_ps(x + 8 * j), _mm256_load_ps(x + 8 * j + 32));
  const __m256 even = quarters(v[0], v[2]), odd = quarters(v[1], v[3]);
  return _mm256_add_ps(_mm256_blend_ps(even, _mm256_moveldup_ps(odd), 0xaa),
                       _mm256_blend_ps(_mm256_movehdup_ps(even), odd, 0xaa));
}

// x[64 r + 8 j + i] = lane[i] + lane[i + 8] of dot16(q[r], k[j]) for R rows and J keys. dim: a multiple of 16.
template <class T, int R, int J>
inline void dots(const float* q, size_t dim, const uint8_t* k, size_t row_bytes, float* x) {
  Lanes16 sum[R][J];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < J; ++j) sum[r][j] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  }
  for (size_t d = 0; d < dim; d += 16) {
    for (int j = 0; j < J; ++j) {
      const Lanes16 key = T::at(k + static_cast<size_t>(j) * row_bytes, d);
      for (int r = 0; r < R; ++r) {
        const float* row = q + static_cast<size_t>(r) * dim + d;
        sum[r][j].a = _mm256_fmadd_ps(_mm256_load_ps(row), key.a, sum[r][j].a);
        sum[r][j].b = _mm256_fmadd_ps(_mm256_load_ps(row + 8), key.b, sum[r][j].b);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < J; ++j) _mm256_store_ps(x + 64 * r + 8 * j, _mm256_add_ps(sum[r][j].a, sum[r][j].b));
  }
}

// s[r][j] = dot16(q[r], k[j]) * scale for R rows, whose scores lie kAttnChunk apart. Up to seven scores past `keys` are
// written; only the rows of the keys are read.
template <class T, int R>
inline void score(const float* q, size_t dim, const uint8_t* k, size_t row_bytes, size_t keys, float scale, float* s) {
  constexpr int J = R == 1 ? 4 : R <= 3 ? 2 : 1;
  for (size_t j = 0; j < keys; j += 8, k += 8 * row_bytes) {
    alignas(32) float x[R * 64];
    const size_t n = keys - j < 8 ? keys - j : 8;
    size_t i = 0;
    for (; i + J <= n; i += J) dots<T, R, J>(q, dim, k + i * row_bytes, row_bytes, x + 8 * i);
    for (; i < n; ++i) dots<T, R, 1>(q, dim, k + i * row_bytes, row_bytes, x + 8 * i);
    for (; i < 8; ++i) {
      for (size_t r = 0; r < R; ++r) _mm256_store_ps(x + 64 * r + 8 * i, _mm256_setzero_ps());
    }
    for (int r = 0; r < R; ++r) {
      _mm256_store_ps(s + static_cast<size_t>(r) * kAttnChunk + j,
                      _mm256_mul_ps(fold_keys(x + 64 * r), _mm256_set1_ps(scale)));
    }
  }
}

// p[0 .. n) from scores to weights: exp(p - max). Returns sum16 of the weights; *max is the maximum.
float weigh(float* p, size_t n, float* max) {
  __m256 top = _mm256_set1_ps(-HUGE_VALF);
  size_t j = 0;
  // a NaN in the first operand is passed over
  for (; j + 8 <= n; j += 8) top = _mm256_max_ps(_mm256_loadu_ps(p + j), top);
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
    const __m256 e = exp8(_mm256_sub_ps(_mm256_loadu_ps(p + i), max8));
    _mm256_storeu_ps(p + i, e);
    *lanes = _mm256_add_ps(*lanes, e);
  };
  const auto weigh_part = [&](size_t i, size_t count, __m256* lanes) {
    const __m256i mask = lanes_below(count);
    const __m256 e = exp8(_mm256_sub_ps(_mm256_maskload_ps(p + i, mask), max8));
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
template <class T, int R, int P>
inline void values(const float* p, const size_t* end, const uint8_t* v, size_t row_bytes, size_t d, bool first,
                   float* acc, size_t acc_stride) {
  Lanes16 sum[R][P];
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < P; ++i) {
      const float* from = acc + static_cast<size_t>(r) * acc_stride + d + static_cast<size_t>(16 * i);
      sum[r][i].a = first ? _mm256_setzero_ps() : _mm256_load_ps(from);
      sum[r][i].b = first ? _mm256_setzero_ps() : _mm256_load_ps(from + 8);
    }
  }
  size_t j = 0;
  for (; j < end[0]; ++j, v += row_bytes) {
    Lanes16 row[P];
    for (int i = 0; i < P; ++i) row[i] = T::at(v, d + static_cast<size_t>(16 * i));
    for (int r = 0; r < R; ++r) {
      const __m256 weight = _mm256_broadcast_ss(p + static_cast<size_t>(r) * kAttnChunk + j);
      for (int i = 0; i < P; ++i) {
        sum[r][i].a = _mm256_fmadd_ps(weight, row[i].a, sum[r][i].a);
        sum[r][i].b = _mm256_fmadd_ps(weight, row[i].b, sum[r][i].b);
      }
    }
  }
  for (; j < end[R - 1]; ++j, v += row_bytes) {  // the diagonal
    for (int i = 0; i < P; ++i) {
      const Lanes16 row = T::at(v, d + static_cast<size_t>(16 * i));
      for (int r = 0; r < R; ++r) {
        if (j >= end[r]) continue;
        const __m256 weight = _mm256_broadcast_ss(p + static_cast<size_t>(r) * kAttnChunk + j);
        sum[r][i].a = _mm256_fmadd_ps(weight, row.a, sum[r][i].a);
        sum[r][i].b = _mm256_fmadd_ps(weight, row.b, sum[r][i].b);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < P; ++i) {
      float* to = acc + static_cast<size_t>(r) * acc_stride + d + static_cast<size_t>(16 * i);
      _mm256_store_ps(to, sum[r][i].a);
      _mm256_store_ps(to + 8, sum[r][i].b);
    }
  }
}

template <class T, int R>
inline void value(const float* p, const size_t* end, const uint8_t* v, size_t row_bytes, size_t d, size_t dim,
                  bool first, float* acc, size_t acc_stride) {
  constexpr int P = R == 1 ? 4 : R == 2 ? 2 : 1;
  for (; d + 16 * P <= dim; d += 16 * P) values<T, R, P>(p, end, v, row_bytes, d, first, acc, acc_stride);
  for (; d < dim; d += 16) values<T, R, 1>(p, end, v, row_bytes, d, first, acc, acc_stride);
}

// ---- a chunk ----

// Reads every line of a tile in order. The columns of a register tile are too narrow for the hardware to see a stream;
// this it sees (from memory, four heads of 128: 10 us a chunk instead of 18; prefetch instructions gave 14).
inline void touch(const uint8_t* tile, size_t bytes) {
  const volatile uint8_t* p = tile;
  for (size_t i = 0; i < bytes; i += 64) static_cast<void>(p[i]);
}

inline void prefetch(const uint8_t* p, const uint8_t* end) {
  for (; p < end; p += 64) _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}

// Rows r0 .. r0 + rows of the call, at most kAttnRows.
template <class T, bool kDirect>
void block(const AttnArgs& args, size_t r0, size_t rows) {
  const size_t dim_k = pad16(args.head_dim_k), dim_v = pad16(args.head_dim_v);
  float* const q = args.work;                      // [rows][dim_k], zero-padded
  float* const p = q + kAttnRows * dim_k;          // [rows][kAttnChunk]
  float* const tile = p + kAttnRows * kAttnChunk;  // [kAttnTile][dim]
  float* const acc = args.acc + r0 * args.acc_stride;
  size_t n[kAttnRows];  // keys of each row
  for (size_t r = 0; r < rows; ++r) {
    const size_t t = (r0 + r) / args.heads;
    const float* from = args.q + t * args.q_stride + (r0 + r) % args.heads * args.head_dim_k;
    for (size_t d = 0; d < dim_k; d += 16) {
      const size_t left = args.head_dim_k - d;
      const uint8_t* bytes = reinterpret_cast<const uint8_t*>(from + d);
      const Lanes16 x = left >= 16 ? F32::at(bytes, 0) : part<F32>(bytes, 0, left);
      _mm256_store_ps(q + r * dim_k + d, x.a);
      _mm256_store_ps(q + r * dim_k + d + 8, x.b);
    }
    n[r] = args.keys + t < kAttnChunk ? args.keys + t : kAttnChunk;
  }
  const size_t keys = n[rows - 1];

  const uint8_t* k = static_cast<const uint8_t*>(args.k);
  const size_t k_bytes = kv_row_bytes(T::kType, args.head_dim_k);
  for (size_t j = 0; j < keys; j += kAttnTile, k += kAttnTile * k_bytes) {
    const size_t in_tile = keys - j < kAttnTile ? keys - j : kAttnTile;
    if constexpr (!kDirect) widen<T>(k, k_bytes, in_tile, args.head_dim_k, dim_k, 1, tile);
    for_groups<kDirect ? 4 : 3>(rows, [&](auto count, size_t r) {
      constexpr int R = decltype(count)::value;
      const size_t last = n[r + R - 1];
      if (last <= j) return;
      const size_t seen = last - j < in_tile ? last - j : in_tile;
      if constexpr (kDirect) {
        score<T, R>(q + r * dim_k, dim_k, k, k_bytes, seen, args.scale, p + r * kAttnChunk + j);
      } else {
        score<F32, R>(q + r * dim_k, dim_k, reinterpret_cast<const uint8_t*>(tile), 4 * dim_k, seen, args.scale,
                      p + r * kAttnChunk + j);
      }
    });
  }
  for (size_t r = 0; r < rows; ++r) args.sum[r0 + r] = weigh(p + r * kAttnChunk, n[r], args.m + r0 + r);

  const uint8_t* v = static_cast<const uint8_t*>(args.v);
  const size_t v_bytes = kv_row_bytes(T::kType, args.head_dim_v);
  for (size_t j = 0; j < keys; j += kAttnTile, v += kAttnTile * v_bytes) {
    const size_t in_tile = keys - j < kAttnTile ? keys - j : kAttnTile;
    if constexpr (kDirect) {
      touch(v, in_tile * v_bytes);
    } else {
      widen<T>(v, v_bytes, in_tile, args.head_dim_v, 16, kAttnTile, tile);
    }
    size_t end[kAttnRows];
    for (size_t r = 0; r < rows; ++r) end[r] = n[r] <= j ? 0 : n[r] - j < in_tile ? n[r] - j : in_tile;
    const auto each = [&](size_t d0, size_t d1) {
      for_groups<kDirect ? 4 : 6>(rows, [&](auto count, size_t r) {
        constexpr int R = decltype(count)::value;
        if (end[r + R - 1] == 0) return;
        float* to = acc + r * args.acc_stride;
        const float* weights = p + r * kAttnChunk + j;
        if constexpr (kDirect) {
          value<T, R>(weights, end + r, v, v_bytes, d0, d1, j == 0, to, args.acc_stride);
        } else {
          value<Panels, R>(weights, end + r, reinterpret_cast<const uint8_t*>(tile), 64, d0, d1, j == 0, to,
                           args.acc_stride);
        }
      });
    };
    each(0, dim_v);
  }
}

template <class T>
void attn_chunk(const AttnArgs& args) {
  const size_t rows = args.tokens * args.heads;
  const bool direct = rows <= kFew && args.head_dim_k % 16 == 0 && args.head_dim_v % 16 == 0;
  if (direct) return block<T, true>(args, 0, rows);
  for (size_t r = 0; r < rows; r += kAttnRows) block<T, false>(args, r, rows - r < kAttnRows ? rows - r : kAttnRows);
}

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
  table->attn_chunk[static_cast<int>(Kv::F16)] = attn_chunk<F16>;
  table->attn_chunk[static_cast<int>(Kv::F32)] = attn_chunk<F32>;
  table->attn_chunk[static_cast<int>(Kv::Q8_0)] = attn_chunk<Q8_0>;
  table->attn_merge = attn_merge;
  table->attn_finish = attn_finish;
}

}  // namespace pe
