// The table of kernels: every inner loop of the engine, one struct of function pointers.
//
// The functions in scalar/ are the specification. Another tier is correct when every byte it writes equals theirs (any
// NaN equals any NaN). docs/numerics.md holds the argument, this header the contract.
//
// Kernels start no threads, allocate nothing, throw nothing, use no STL. All pointers are to disjoint memory unless
// said otherwise. Rows of weights are as they lie in the file: no alignment beyond 1 byte may be assumed for them (F32 rows
// included), and no byte past the last row may be read. Activations and outputs are aligned to 4 bytes.
//
// Arithmetic all tiers share
//   fma          one rounding, explicit; the compiler never contracts (-ffp-contract=off).
//   dot16        float dot product over n: 16 lanes by index mod 16, lane = fma(a, b, lane), starting at +0, indices
//                ascending; a ragged tail touches only its own lanes. Then lanes are folded 8, 4, 2, 1:
//                lane[i] += lane[i + h] for i < h. sum16 is the same with lane += x.
//   rounding     to nearest, ties to even, everywhere. Default floating-point environment, denormals kept.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "quant/formats.h"

namespace pe {

inline constexpr int kActs = 3;

// ---- activation rows ----
//
// One row of n activations, quantised once and shared by every linear operation that reads it. Memory of a row:
//   Act::F32    float x[n]
//   Act::Q32    int8_t q[n], float scale[n / 32],  int16_t sum[n / 8], sum16[n / 16], sum32[n / 32]    n: a multiple of 32
//   Act::Q256   int8_t q[n], float scale[n / 256], int16_t sum[n / 8], sum16[n / 16], sum32[n / 32]    n: a multiple of 256
// each part padded to a multiple of 64 bytes, in that order. Each 16 values have two sums: sum[2 i] adds the q[16 i + j]
// with j mod 4 in {0, 1}, sum[2 i + 1] those with j mod 4 in {2, 3}: where a kernel that adds products of neighbours in
// int16 lanes starts those lanes. sum16[i] and sum32[i] add q[16 i ..] and q[32 i ..]: what an offset of the codes and
// the minima of a sub-block are multiplied with. A row starts at a multiple of 64 bytes. Quantising a block of
// activations x:
//   amax = max |x| (a NaN anywhere makes the block a NaN block)
//   amax == 0, or so small that 127 / amax overflows (amax < 127 / FLT_MAX): scale 0, all q 0
//   amax infinite or NaN:                                                    scale NaN, all q 0
//   otherwise scale = amax / 127, inv = 127 / amax, q = round(x * inv) limited to -127..127
// so |q| <= 127 always.

struct ActLayout {
  size_t scale_at;  // byte offset of scale[]
  size_t sum_at;    // byte offset of sum[]
  size_t sum16_at;  // of sum16[]
  size_t sum32_at;  // of sum32[]
  size_t bytes;     // of a whole row, a multiple of 64
};

static inline size_t pad64(size_t n) { return (n + 63) & ~static_cast<size_t>(63); }

static inline size_t act_block(Act act) { return act == Act::F32 ? 1 : act == Act::Q32 ? 32 : 256; }

static inline ActLayout act_layout(Act act, size_t n) {
  if (act == Act::F32) return {0, 0, 0, 0, pad64(4 * n)};
  const size_t block = act_block(act);
  const size_t scale_at = pad64(n);
  const size_t sum_at = scale_at + pad64(4 * (n / block));
  const size_t sum16_at = sum_at + pad64(2 * (n / 8));
  const size_t sum32_at = sum16_at + pad64(2 * (n / 16));
  return {scale_at, sum_at, sum16_at, sum32_at, sum32_at + pad64(2 * (n / 32))};
}

// ---- linear: y[t][r] = sum over k of W[r][k] * x[t][k] ----
//
// Quantised formats. For each block of the weights (32 or 256 of them) the integer sums are exact; then one float chain per
// output runs over the blocks in ascending order, starting at acc = +0. d, m, dmin: the block's fp16 scales as float;
// a = the activation block's scale; I, S: int32 converted to float with one rounding. sum(q) below is over the activations.
//   Q4_0  codes u-8        Q5_0  codes u-16      Q8_0  codes      IQ4_NL, MXFP4  codes from a table; d = 2^(e-128) for MXFP4
//           acc = fma(d * a, I, acc)                          I = sum(code * q)
//   Q4_1, Q5_1: as above with unsigned codes, then acc = fma(m * a, S, acc), S = sum(q)
//   Q6_K, Q3_K, IQ4_XS: acc = fma(d * a, I, acc)              I = sum over sub-blocks of scale_j * sum(code * q)
//   Q2_K, Q4_K, Q5_K: acc = fma(d * a, I, acc), then acc = fma(-(dmin * a), M, acc), M = sum over sub-blocks of min_j * sum(q)
//   IQ1_*, IQ2_*, IQ3_*, TQ1_0, TQ2_0: acc = fma(D * a, I, acc), I as for Q6_K with scale_j = 2 sc_j + 1 (1 for TQ) and the
//           codes of formats.h; D = d times the power of two that stands there, exactly: d/8 for IQ1 and IQ2, d/4 for
//           IQ3_XXS, d for IQ3_S and TQ. |I| < 2^26
// F32, F16, BF16: dot16 of the exactly widened weights and the float activations.
// The answer for (t, r) never depends on which other rows or tokens are computed in the same call.

struct LinearArgs {
  const void* w;    // first row
  size_t w_stride;  // bytes from row to row
  size_t rows;      // >= 1
  size_t cols;      // a multiple of the format's block
  const void* x;    // first activation row (layout above, of the format's Act)
  size_t x_stride;  // bytes from token to token, a multiple of 64
  size_t tokens;    // >= 1
  float* y;         // y[t * y_stride + r]
  size_t y_stride;  // floats from token to token
};
using LinearFn = void (*)(const LinearArgs&);

using QuantiseActFn = void (*)(const float* x, size_t n, void* row);   // Act::F32: a plain copy
using DequantiseFn = void (*)(const void* src, size_t n, float* dst);  // one row, n a multiple of the block
// One row of n finite weights (n a multiple of the block) into bytes_per_row(format, n) bytes at dst. importance: NULL, or
// for each weight what its squared error counts, in 1e-6 .. 1e6. What is written always decodes to finite values; the
// rules are in kernels/quantise.h. Returns n; otherwise the index of a weight that cannot be stored - the first that is NaN
// or infinite, or one so large that its value or its block's scale would overflow in the file - and dst holds nothing of use.
using QuantiseFn = size_t (*)(const float* x, const float* importance, size_t n, void* dst);

// ---- the rest of a decoder block ----

// y[i] = (x[i] * r) * w[i], r = 1 / sqrtf(dot16(x, x) / n + eps). y may be x. w lies in the file: at any address.
using RmsNormFn = void (*)(const float* x, const float* w, size_t n, float eps, float* y);

// Rotates `heads` vectors of `head_dim` floats lying `stride` floats apart, in place. cs: cos, sin interleaved [dims / 2][2].
// Pair i is (2i, 2i + 1) when adjacent, (i, i + dims / 2) otherwise; values past dims stay. For a pair (a, b):
//   a' = fma(a, cos, -(b * sin)), b' = fma(a, sin, b * cos)
struct RopeArgs {
  float* x;
  size_t heads, stride, dims;
  const float* cs;
  bool adjacent;
};
using RopeFn = void (*)(const RopeArgs&);

using AddFn = void (*)(const float* a, const float* b, size_t n, float* y);  // y = a + b; y may be a or b
using SiluMulFn = void (*)(const float* gate, const float* up, size_t n,
                           float* y);                        // y = gate / (1 + exp(-gate)) * up; y may alias
using ExpFn = void (*)(const float* x, size_t n, float* y);  // the engine's own exp, see math.h

// How the KV cache stores a head's keys (or values) of one position: a row of head_dim elements.
//   F16   rounded to nearest even, overflow to infinity
//   F32   as they are
//   Q8_0  BlockQ8_0 of 32 (head_dim: a multiple of 32): amax = max |x|, scale = amax / 127, inv = 1 / scale (0 when that is
//         infinite), q = x * inv rounded half away from zero, d = scale as fp16: the bytes kernels/quantise.h writes. A block
//         with a NaN or an infinity: d NaN, all q 0, so that the damage is seen. Read back as float(d) * q, which is exact.
enum class Kv : int { F16, F32, Q8_0 };
inline constexpr int kKvs = 3;

static constexpr size_t kv_row_bytes(Kv type, size_t head_dim) {
  return type == Kv::Q8_0 ? head_dim / 32 * sizeof(BlockQ8_0) : head_dim * (type == Kv::F16 ? 2 : 4);
}

using StoreKvFn = void (*)(const float* x, size_t n, void* dst);  // one row

// One chunk of keys for the queries of consecutive tokens and the heads that share a KV head: row r = t * heads + h is token
// t's query of head h, and sees n = min(keys + t, kAttnChunk) keys. Keys and values of consecutive positions are consecutive
// rows of the cache, widened exactly; those up to the last token's are readable. For each row:
//   s[j] = dot16(q[r], k[j]) * scale             j = 0 .. n - 1
//   m = max s[j];  p[j] = exp(s[j] - m);  sum = sum16(p);  acc[d] = chain over ascending j of fma(p[j], v[j][d], acc[d]) from +0
// written to m[r], sum[r], acc[r * acc_stride + d]. max starts at -infinity and passes over a NaN (which spoils sum and acc
// through its own p); a maximum of zero is +0. What a row gets never depends on the other rows of the call.
inline constexpr size_t kAttnChunk = 256;  // positions; chunks are aligned to absolute positions
inline constexpr size_t kAttnRows = 48;    // rows of a call that widening a tile pays for; fewer are slower
struct AttnArgs {
  const float* q;  // q + t * q_stride + h * head_dim_k
  size_t tokens, heads, q_stride;
  const void* k;  // [keys][kv_row_bytes(head_dim_k)]
  const void* v;  // [keys][kv_row_bytes(head_dim_v)]
  size_t keys;    // of the first token, 1 .. kAttnChunk
  size_t head_dim_k, head_dim_v;
  float scale;
  float* acc;         // 64-byte aligned
  size_t acc_stride;  // a multiple of 16; floats of a row past head_dim_v may be overwritten
  float* m;
  float* sum;
  float* work;  // attn_work(head_dim_k, head_dim_v) floats of this call's own, 64-byte aligned
};
using AttnChunkFn = void (*)(const AttnArgs&);

inline constexpr size_t kAttnTile = 32;  // keys widened at once: 16 KiB at 128 dimensions
static constexpr size_t pad16(size_t n) { return (n + 15) / 16 * 16; }
// q [kAttnRows][head_dim_k], weights [kAttnRows][kAttnChunk], a tile of keys or values
static constexpr size_t attn_work(size_t head_dim_k, size_t head_dim_v) {
  const size_t k = pad16(head_dim_k), v = pad16(head_dim_v);
  return kAttnRows * (k + kAttnChunk) + kAttnTile * (k > v ? k : v);
}

// Folds one more chunk (m2, sum2, acc2) into a running (m, sum, acc), chunks ascending:
//   m2 > m:    c = exp(m - m2): sum = fma(sum, c, sum2), acc = fma(acc, c, acc2), m = m2
//   otherwise: c = exp(m2 - m): sum = fma(sum2, c, sum), acc = fma(acc2, c, acc)
using AttnMergeFn = void (*)(float* m, float* sum, float* acc, float m2, float sum2, const float* acc2, size_t dim);
// y[d] = acc[d] * (1 / sum)
using AttnFinishFn = void (*)(const float* acc, float sum, size_t dim, float* y);

// Squares over n values in float32, in 16 lanes by index mod 16 and then halves: of what is lost, x - y, and of x itself.
using LossFn = void (*)(const float* x, const float* y, size_t n, float* error, float* energy);

// 1 when all n values are finite.
using AllFiniteFn = int (*)(const float* x, size_t n);

struct KernelTable {
  LinearFn linear[kFormats];
  size_t
      linear_rows;  // of a matrix, that a call with many tokens wants: so often an activation is used once it is in the cache
  DequantiseFn dequantise[kFormats];
  QuantiseFn quantise[kFormats];  // NULL where can_quantise says no
  LossFn loss;
  QuantiseActFn quantise_act[kActs];
  RmsNormFn rms_norm;
  RopeFn rope;
  AddFn add;
  SiluMulFn silu_mul;
  ExpFn exp;
  StoreKvFn store_kv[kKvs];
  AttnChunkFn attn_chunk[kKvs];
  AttnMergeFn attn_merge;
  AttnFinishFn attn_finish;
  AllFiniteFn all_finite;
};

// ---- tiers ----

// In ascending order of preference. A tier that is not compiled in, or that the processor lacks, keeps the one below.
enum class Tier : int { kScalar, kAvx2, kAvx512, kCount };
inline constexpr int kTiers = static_cast<int>(Tier::kCount);

const char* tier_name(Tier tier);           // "scalar", "avx2", "avx512"
bool tier_available(Tier tier);             // compiled in, and the processor and operating system have it
const KernelTable* kernels_for(Tier tier);  // nullptr when not available
// The best available tier, or the one named by PYENGINE_ISA. nullptr, with *wanted set to that name, when it names a tier
// that is unknown or absent. The environment is read once.
const KernelTable* kernels_active(Tier* tier, const char** wanted);

}  // namespace pe
