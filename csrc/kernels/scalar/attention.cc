// The specification of attention over one chunk of the KV cache (kernels.h has the contract).
#include "kernels/kernels.h"
#include "kernels/math.h"
#include "kernels/tiers.h"

namespace pe {
namespace {

float widen(float x) { return x; }
float widen(uint16_t x) { return f16_to_f32(x); }

void store_f16(const float* x, size_t n, void* dst) {
  uint16_t* out = static_cast<uint16_t*>(dst);
  for (size_t i = 0; i < n; ++i) out[i] = f32_to_f16(x[i]);
}

void store_f32(const float* x, size_t n, void* dst) { memcpy(dst, x, n * sizeof *x); }

// T: float, or uint16_t for fp16
template <class T>
void attn_chunk(const AttnArgs& args) {
  const T* k = static_cast<const T*>(args.k);
  const T* v = static_cast<const T*>(args.v);
  for (size_t h = 0; h < args.heads; ++h) {
    const float* q = args.q + h * args.q_stride;
    float p[kAttnChunk];
    float max = -HUGE_VALF;
    for (size_t j = 0; j < args.keys; ++j) {
      float lane[16] = {};
      for (size_t d = 0; d < args.head_dim_k; ++d) {
        lane[d % 16] = fmaf(q[d], widen(k[j * args.head_dim_k + d]), lane[d % 16]);
      }
      p[j] = fold16(lane) * args.scale;
      max = p[j] > max ? p[j] : max;  // passes over a NaN, which then spoils sum and acc through its own p
    }
    max += 0.0f;  // a zero maximum is +0, whichever zero came first

    float lane[16] = {};
    for (size_t j = 0; j < args.keys; ++j) {
      p[j] = exp_f32(p[j] - max);
      lane[j % 16] += p[j];
    }
    float* acc = args.acc + h * args.acc_stride;
    for (size_t d = 0; d < args.head_dim_v; ++d) {
      float a = 0.0f;
      for (size_t j = 0; j < args.keys; ++j) a = fmaf(p[j], widen(v[j * args.head_dim_v + d]), a);
      acc[d] = a;
    }
    args.m[h] = max;
    args.sum[h] = fold16(lane);
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
  table->attn_chunk[static_cast<int>(Kv::F16)] = attn_chunk<uint16_t>;
  table->attn_chunk[static_cast<int>(Kv::F32)] = attn_chunk<float>;
  table->attn_merge = attn_merge;
  table->attn_finish = attn_finish;
}

}  // namespace pe
