// The specification of attention over one chunk of the KV cache (kernels.h has the contract).
#include "kernels/kernels.h"
#include "kernels/math.h"
#include "kernels/tiers.h"

namespace pe {
namespace {

// Element d of a row of the cache, by type.
struct F16 {
  static constexpr Kv kType = Kv::F16;
  static float at(const uint8_t* row, size_t d) {
    uint16_t h;
    memcpy(&h, row + 2 * d, sizeof h);
    return f16_to_f32(h);
  }
};
struct F32 {
  static constexpr Kv kType = Kv::F32;
  static float at(const uint8_t* row, size_t d) {
    float x;
    memcpy(&x, row + 4 * d, sizeof x);
    return x;
  }
};
struct Q8_0 {
  static constexpr Kv kType = Kv::Q8_0;
  static float at(const uint8_t* row, size_t d) {
    const BlockQ8_0& b = reinterpret_cast<const BlockQ8_0*>(row)[d / 32];
    return f16_to_f32(b.d) * static_cast<float>(b.qs[d % 32]);
  }
};

void store_f16(const float* x, size_t n, void* dst) {
  uint16_t* out = static_cast<uint16_t*>(dst);
  for (size_t i = 0; i < n; ++i) out[i] = f32_to_f16(x[i]);
}

void store_f32(const float* x, size_t n, void* dst) { memcpy(dst, x, n * sizeof *x); }

void store_q8_0(const float* x, size_t n, void* dst) {
  BlockQ8_0* b = static_cast<BlockQ8_0*>(dst);
  for (; n > 0; n -= 32, x += 32, ++b) {
    uint32_t top = 0;  // magnitudes order like their bits, NaN above infinity
    for (size_t i = 0; i < 32; ++i) {
      const uint32_t u = float_bits(x[i]) & 0x7fffffffu;
      top = u > top ? u : top;
    }
    const bool finite = top < 0x7f800000u;
    const float scale = finite ? bits_float(top) / 127 : bits_float(0x7fc00000);
    const float inv = is_finite(1 / scale) ? 1 / scale : 0;
    for (size_t i = 0; i < 32; ++i) {
      const float a = finite ? fabsf(x[i] * inv) : 0;
      const float whole = floorf(a);
      const float rounded = whole + floorf(2 * (a - whole));
      b->qs[i] = static_cast<int8_t>(x[i] < 0 ? -rounded : rounded);
    }
    b->d = f32_to_f16(scale);
  }
}

template <class T>
void attn_chunk(const AttnArgs& args) {
  const uint8_t* k = static_cast<const uint8_t*>(args.k);
  const uint8_t* v = static_cast<const uint8_t*>(args.v);
  const size_t k_bytes = kv_row_bytes(T::kType, args.head_dim_k), v_bytes = kv_row_bytes(T::kType, args.head_dim_v);
  for (size_t r = 0; r < args.tokens * args.heads; ++r) {
    const size_t t = r / args.heads;
    const float* q = args.q + t * args.q_stride + r % args.heads * args.head_dim_k;
    const size_t keys = args.keys + t < kAttnChunk ? args.keys + t : kAttnChunk;
    float p[kAttnChunk];
    float max = -HUGE_VALF;
    for (size_t j = 0; j < keys; ++j) {
      float lane[16] = {};
      for (size_t d = 0; d < args.head_dim_k; ++d) lane[d % 16] = fmaf(q[d], T::at(k + j * k_bytes, d), lane[d % 16]);
      p[j] = fold16(lane) * args.scale;
      max = p[j] > max ? p[j] : max;  // passes over a NaN, which then spoils sum and acc through its own p
    }
    max += 0.0f;  // a zero maximum is +0, whichever zero came first

    float lane[16] = {};
    for (size_t j = 0; j < keys; ++j) {
      p[j] = exp_f32(p[j] - max);
      lane[j % 16] += p[j];
    }
    float* acc = args.acc + r * args.acc_stride;
    for (size_t d = 0; d < args.head_dim_v; ++d) {
      float a = 0.0f;
      for (size_t j = 0; j < keys; ++j) a = fmaf(p[j], T::at(v + j * v_bytes, d), a);
      acc[d] = a;
    }
    args.m[r] = max;
    args.sum[r] = fold16(lane);
  }
}

void attn_merge(float* m, float* sum, float* acc, float m2, float sum2, const float* acc2, size_t dim) {
  if (m2 > *m) {
    const float c = exp_f32(*m - m2);
    *sum = fmaf(*sum, c, sum2);
    for (size_t d = 0; d < dim; ++d) acc[d] = fmaf(acc[d], c, acc2[d]);
    *m = m2;
  } else {
    const float c = exp_f32(m2 - *m);
    *sum = fmaf(sum2, c, *sum);
    for (size_t d = 0; d < dim; ++d) acc[d] = fmaf(acc2[d], c, acc[d]);
  }
}

void attn_finish(const float* acc, float sum, size_t dim, float* y) {
  const float inverse = 1.0f / sum;
  for (size_t d = 0; d < dim; ++d) y[d] = acc[d] * inverse;
}

}  // namespace

void scalar_attention(KernelTable* table) {
  table->store_kv[static_cast<int>(Kv::F16)] = store_f16;
  table->store_kv[static_cast<int>(Kv::F32)] = store_f32;
  table->store_kv[static_cast<int>(Kv::Q8_0)] = store_q8_0;
  table->attn_chunk[static_cast<int>(Kv::F16)] = attn_chunk<F16>;
  table->attn_chunk[static_cast<int>(Kv::F32)] = attn_chunk<F32>;
  table->attn_chunk[static_cast<int>(Kv::Q8_0)] = attn_chunk<Q8_0>;
  table->attn_merge = attn_merge;
  table->attn_finish = attn_finish;
}

}  // namespace pe
