// Attention over one chunk of the KV cache, AVX2. The chunk is walked in tiles of keys small enough for the first-level
// cache; up to four query heads share every key and value they read, so that memory is read once for a group of heads
// and fp16 is widened once for four of them. Lane sums and chains are those of the scalar kernel.
#include "kernels/avx2/vec.h"
#include "kernels/kernels.h"
#include "kernels/tiers.h"

namespace pe {
namespace {

constexpr size_t kHeads = 8;  // heads whose scores are held at once: 8 * 256 floats of stack
constexpr size_t kTile = 32;  // keys of a tile: 8 KiB of fp16 at 128 dimensions

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

// The first n of 8 elements, zeros after them; nothing beyond them is read.
inline __m256 load_part(const float* p, size_t n) { return _mm256_maskload_ps(p, lanes_below(n)); }
inline __m256 load_part(const uint16_t* p, size_t n) {
  alignas(16) uint16_t part[8] = {};
  for (size_t i = 0; i < n; ++i) part[i] = p[i];
  return load8(part);
}

inline float widen(float x) { return x; }
inline float widen(uint16_t x) { return _cvtsh_ss(x); }

// s[h][j] = dot16(q[h], k[j]) * scale for H heads and J keys.
template <int H, int J, class T>
inline void scores(const float* q, size_t q_stride, const T* k, size_t dim, float scale, float* s) {
  Lanes16 sum[H][J];
  for (int h = 0; h < H; ++h) {
    for (int j = 0; j < J; ++j) sum[h][j] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  }
  size_t d = 0;
  for (; d + 16 <= dim; d += 16) {
    for (int j = 0; j < J; ++j) {
      const __m256 ka = load8(k + j * dim + d), kb = load8(k + j * dim + d + 8);
      for (int h = 0; h < H; ++h) {
        sum[h][j].a = _mm256_fmadd_ps(_mm256_loadu_ps(q + h * q_stride + d), ka, sum[h][j].a);
        sum[h][j].b = _mm256_fmadd_ps(_mm256_loadu_ps(q + h * q_stride + d + 8), kb, sum[h][j].b);
      }
    }
  }
  if (d < dim) {
    const size_t rest = dim - d, in_a = rest < 8 ? rest : 8, in_b = rest - in_a;
    const Tail16 tail(rest);
    for (int j = 0; j < J; ++j) {
      const __m256 ka = load_part(k + j * dim + d, in_a);
      const __m256 kb = in_b > 0 ? load_part(k + j * dim + d + 8, in_b) : _mm256_setzero_ps();
      for (int h = 0; h < H; ++h) {
        const float* qh = q + h * q_stride + d;
        Lanes16& lanes = sum[h][j];
        lanes.a = keep(lanes.a, _mm256_fmadd_ps(_mm256_maskload_ps(qh, tail.a), ka, lanes.a), tail.a);
        if (in_b > 0) lanes.b = keep(lanes.b, _mm256_fmadd_ps(_mm256_maskload_ps(qh + 8, tail.b), kb, lanes.b), tail.b);
      }
    }
  }
  for (int h = 0; h < H; ++h) {
    for (int j = 0; j < J; ++j) {
      s[h * kAttnChunk + j] = fold16(sum[h][j]) * scale;
    }
  }
}

template <int H, class T>
void score_tile(const float* q, size_t q_stride, const T* k, size_t keys, size_t dim, float scale, float* s) {
  constexpr int J = 4 / H;  // H * J * 2 sums in flight hide the latency of fma
  size_t j = 0;
  for (; j + J <= keys; j += J) scores<H, J>(q, q_stride, k + j * dim, dim, scale, s + j);
  for (; j < keys; ++j) scores<H, 1>(q, q_stride, k + j * dim, dim, scale, s + j);
}

// acc[h][0 .. 8 W) continued over a tile of keys, H heads. v and acc point at the first of these dimensions.
template <int H, int W, class T>
inline void values(const float* p, const T* v, size_t keys, size_t dim, bool first, float* acc, size_t acc_stride) {
  __m256 sum[H][W];
  for (int h = 0; h < H; ++h) {
    for (int w = 0; w < W; ++w) sum[h][w] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(acc + h * acc_stride + 8 * w);
  }
  for (size_t j = 0; j < keys; ++j) {
    __m256 row[W];
    for (int w = 0; w < W; ++w) row[w] = load8(v + j * dim + 8 * w);
    for (int h = 0; h < H; ++h) {
      const __m256 weight = _mm256_broadcast_ss(p + h * kAttnChunk + j);
      for (int w = 0; w < W; ++w) sum[h][w] = _mm256_fmadd_ps(weight, row[w], sum[h][w]);
    }
  }
  for (int h = 0; h < H; ++h) {
    for (int w = 0; w < W; ++w) _mm256_storeu_ps(acc + h * acc_stride + 8 * w, sum[h][w]);
  }
}

template <int H, class T>
void value_tile(const float* p, const T* v, size_t keys, size_t dim, bool first, float* acc, size_t acc_stride) {
  constexpr int W = 8 / H;  // H * W chains in flight
  size_t d = 0;
  for (; d + 8 * W <= dim; d += 8 * W) values<H, W>(p, v + d, keys, dim, first, acc + d, acc_stride);
  for (; d + 8 <= dim; d += 8) values<H, 1>(p, v + d, keys, dim, first, acc + d, acc_stride);
  for (; d < dim; ++d) {
    for (int h = 0; h < H; ++h) {
      float a = first ? 0.0f : acc[h * acc_stride + d];
      for (size_t j = 0; j < keys; ++j) a = fmaf(p[h * kAttnChunk + j], widen(v[j * dim + d]), a);
      acc[h * acc_stride + d] = a;
    }
  }
}

// Reads every line of a tile in order. The columns value_tile walks are too narrow for the hardware to see a stream;
// this it sees (from memory, four heads of 128: 10 us a chunk instead of 18; prefetch instructions gave 14).
inline void touch(const void* tile, size_t bytes) {
  const volatile char* p = static_cast<const volatile char*>(tile);
  for (size_t i = 0; i < bytes; i += 64) static_cast<void>(p[i]);
}

// Calls f(Count<N>(), first head) with the heads in groups of N = 4, 2 and 1.
template <int N>
struct Count {
  static constexpr int value = N;
};

template <class F>
inline void for_heads(size_t heads, F f) {
  size_t h = 0;
  for (; h + 4 <= heads; h += 4) f(Count<4>(), h);
  if (h + 2 <= heads) f(Count<2>(), h), h += 2;
  if (h < heads) f(Count<1>(), h);
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

// T: float, or uint16_t for fp16
template <class T>
void attn_chunk(const AttnArgs& args) {
  const T* k = static_cast<const T*>(args.k);
  const T* v = static_cast<const T*>(args.v);
  alignas(32) float p[kHeads * kAttnChunk];
  for (size_t h0 = 0; h0 < args.heads; h0 += kHeads) {
    const size_t heads = args.heads - h0 < kHeads ? args.heads - h0 : kHeads;
    for (size_t j = 0; j < args.keys; j += kTile) {
      const size_t keys = args.keys - j < kTile ? args.keys - j : kTile;
      for_heads(heads, [&](auto count, size_t h) {
        score_tile<count.value>(args.q + (h0 + h) * args.q_stride, args.q_stride, k + j * args.head_dim_k, keys,
                                args.head_dim_k, args.scale, p + h * kAttnChunk + j);
      });
    }
    for (size_t h = 0; h < heads; ++h) {
      args.sum[h0 + h] = weigh(p + h * kAttnChunk, args.keys, args.m + h0 + h);
    }
    for (size_t j = 0; j < args.keys; j += kTile) {
      const size_t keys = args.keys - j < kTile ? args.keys - j : kTile;
      touch(v + j * args.head_dim_v, keys * args.head_dim_v * sizeof(T));
      for_heads(heads, [&](auto count, size_t h) {
        value_tile<count.value>(p + h * kAttnChunk + j, v + j * args.head_dim_v, keys, args.head_dim_v, j == 0,
                                args.acc + (h0 + h) * args.acc_stride, args.acc_stride);
      });
    }
  }
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

}  // namespace

void avx2_attention(KernelTable* table) {
  table->store_kv[static_cast<int>(Kv::F16)] = store_f16;
  table->attn_chunk[static_cast<int>(Kv::F16)] = attn_chunk<uint16_t>;
  table->attn_chunk[static_cast<int>(Kv::F32)] = attn_chunk<float>;
  table->attn_merge = attn_merge;
  table->attn_finish = attn_finish;
}

}  // namespace pe
