// The specification of the element-wise operations of a decoder block (kernels.h has the contract, math.h the exp).
#include "kernels/kernels.h"
#include "kernels/math.h"
#include "kernels/tiers.h"

namespace pe {
namespace {

float dot16(const float* a, const float* b, size_t n) {
  float lane[16] = {};
  for (size_t i = 0; i < n; ++i) lane[i % 16] = fmaf(a[i], b[i], lane[i % 16]);
  return fold16(lane);
}

// w lies in the file and may be at any address.
float load(const float* w, size_t i) {
  float x;
  memcpy(&x, reinterpret_cast<const char*>(w) + i * sizeof x, sizeof x);
  return x;
}

void rms_norm(const float* x, const float* w, size_t n, float eps, float* y) {
  const float r = 1.0f / sqrtf(dot16(x, x, n) / static_cast<float>(n) + eps);
  for (size_t i = 0; i < n; ++i) y[i] = x[i] * r * load(w, i);
}

void rope(const RopeArgs& args) {
  const size_t half = args.dims / 2;
  const size_t step = args.adjacent ? 2 : 1;      // from pair to pair
  const size_t apart = args.adjacent ? 1 : half;  // from the first of a pair to the second
  for (size_t h = 0; h < args.heads; ++h) {
    for (size_t i = 0; i < half; ++i) {
      float* a = args.x + h * args.stride + i * step;
      float* b = a + apart;
      const float c = args.cs[2 * i], s = args.cs[2 * i + 1];
      const float a0 = *a, b0 = *b;
      *a = fmaf(a0, c, -(b0 * s));
      *b = fmaf(a0, s, b0 * c);
    }
  }
}

void add(const float* a, const float* b, size_t n, float* y) {
  for (size_t i = 0; i < n; ++i) y[i] = a[i] + b[i];
}

void silu_mul(const float* gate, const float* up, size_t n, float* y) {
  for (size_t i = 0; i < n; ++i) y[i] = silu_mul_f32(gate[i], up[i]);
}

void exp_all(const float* x, size_t n, float* y) {
  for (size_t i = 0; i < n; ++i) y[i] = exp_f32(x[i]);
}

int all_finite(const float* x, size_t n) {
  int finite = 1;
  for (size_t i = 0; i < n; ++i) finite &= is_finite(x[i]);
  return finite;
}

}  // namespace

void scalar_ops(KernelTable* table) {
  table->rms_norm = rms_norm;
  table->rope = rope;
  table->add = add;
  table->silu_mul = silu_mul;
  table->exp = exp_all;
  table->all_finite = all_finite;
}

}  // namespace pe
