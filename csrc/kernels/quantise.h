// The quantisers: float32 weights into the blocks of every format. Compiled once a tier; the bytes are the same.
//   F32, F16, BF16                        round to nearest even
//   Q4_0, Q4_1, Q5_0, Q5_1                byte-identical with the gguf package; with an importance fitted
//   Q8_0                                  byte-identical with the gguf package
//   K-quants, IQ4_NL, IQ4_XS              fitted (kernels/fit.h)
#pragma once

#include <math.h>

#include "kernels/fit.h"
#include "kernels/kernels.h"

namespace pe {
namespace {

// Block functions return false when a scale overflows fp16.

inline bool fits_f16(uint16_t h) { return (h & 0x7c00) != 0x7c00; }

// ---- one scale for 32 weights: the arithmetic of the gguf package, operation by operation, in float32 ----

// 1 / d, where d is so small that the fp16 scale is 0 anyway: 0.
inline float inverse(float d) {
  const float inv = 1 / d;
  return is_finite(inv) ? inv : 0;
}

// The first of 32 weights that is +0 or -0.
inline float first_zero(const float* x) {
  for (int k = 0; k < 32; ++k) {
    if (x[k] == 0) return x[k];
  }
  return 0;
}

// The smallest and the largest of 32 weights, the first of equal ones.
inline void range_of(const float* x, float* low, float* high) {
  Lanes least_of = load(x), most_of = least_of;
  for (int k = kWidth; k < 32; k += kWidth) {
    const Lanes v = load(x + k);
    least_of = least(least_of, v);
    most_of = most(most_of, v);
  }
  alignas(64) float a[kWidth], b[kWidth];
  store(a, least_of);
  store(b, most_of);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      a[i] = a[i + half] < a[i] ? a[i + half] : a[i];
      b[i] = b[i + half] > b[i] ? b[i + half] : b[i];
    }
  }
  *low = a[0] == 0 ? first_zero(x) : a[0];
  *high = b[0] == 0 ? first_zero(x) : b[0];
}

// The first of 32 weights with the largest magnitude.
inline float extreme(const float* x) {
  float low, high;
  range_of(x, &low, &high);
  if (low + high != 0) return low + high > 0 ? high : low;
  for (int k = 0; k < 32; ++k) {
    if (x[k] == low || x[k] == high) return x[k];
  }
  return 0;
}

// Codes 0 .. 2 half - 1 around half: x = d (u - half).
inline bool codes_around(const float* x, int half, uint16_t* d, uint8_t code[32]) {
  const float scale = extreme(x) / static_cast<float>(-half);
  const float inv = inverse(scale);
  const Lanes top = all(static_cast<float>(2 * half - 1));
  for (int k = 0; k < 32; k += kWidth)  // at least 0.49: no weight is larger than the extreme one
    store_codes(code + k, least(load(x + k) * inv + (static_cast<float>(half) + 0.5f), top));
  *d = f32_to_f16(scale);
  return fits_f16(*d);
}

// Codes 0 .. top above the minimum: x = d u + m.
inline bool codes_above(const float* x, int top, uint16_t* d, uint16_t* m, uint8_t code[32]) {
  float low, high;
  range_of(x, &low, &high);
  const float scale = (high - low) / static_cast<float>(top);
  if (!is_finite(scale)) return false;
  const float inv = inverse(scale);
  for (int k = 0; k < 32; k += kWidth)
    store_codes(code + k, least((load(x + k) - low) * inv + 0.5f, all(static_cast<float>(top))));
  *d = f32_to_f16(scale);
  *m = f32_to_f16(low);
  return fits_f16(*d) && fits_f16(*m);
}

inline void pack_nibbles(const uint8_t code[32], uint8_t qs[16]) {
  for (int k = 0; k < 16; ++k) qs[k] = static_cast<uint8_t>((code[k] & 15) | (code[k + 16] & 15) << 4);
}

// Bit 4 of each code. Of eight bytes of 0 or 1 the product has the sum of byte k shifted by k as its highest byte.
inline void pack_fifth_bits(const uint8_t code[32], uint8_t qh[4]) {
  for (int i = 0; i < 4; ++i) {
    uint64_t eight;
    memcpy(&eight, code + 8 * i, 8);
    qh[i] = static_cast<uint8_t>((eight >> 4 & 0x0101010101010101u) * 0x0102040810204080u >> 56);
  }
}

inline bool plain(const float* x, BlockQ4_0* b) {
  uint16_t d;
  uint8_t code[32];
  const bool ok = codes_around(x, 8, &d, code);
  b->d = d;
  pack_nibbles(code, b->qs);
  return ok;
}

inline bool plain(const float* x, BlockQ5_0* b) {
  uint16_t d;
  uint8_t code[32];
  const bool ok = codes_around(x, 16, &d, code);
  b->d = d;
  pack_nibbles(code, b->qs);
  pack_fifth_bits(code, b->qh);
  return ok;
}

inline bool plain(const float* x, BlockQ4_1* b) {
  uint16_t d, m;
  uint8_t code[32];
  if (!codes_above(x, 15, &d, &m, code)) return false;
  b->d = d;
  b->m = m;
  pack_nibbles(code, b->qs);
  return true;
}

inline bool plain(const float* x, BlockQ5_1* b) {
  uint16_t d, m;
  uint8_t code[32];
  if (!codes_above(x, 31, &d, &m, code)) return false;
  b->d = d;
  b->m = m;
  pack_nibbles(code, b->qs);
  pack_fifth_bits(code, b->qh);
  return true;
}

// The largest magnitude of n weights, n a multiple of 32.
inline float largest_magnitude(const float* x, size_t n) {
  Lanes top{};
  for (size_t k = 0; k < n; k += kWidth) top = most(top, magnitude(load(x + k)));
  alignas(64) float lane[kWidth];
  store(lane, top);
  float best = 0;
  for (int j = 0; j < kWidth; ++j) best = lane[j] > best ? lane[j] : best;
  return best;
}

inline bool plain(const float* x, BlockQ8_0* b) {
  const float scale = largest_magnitude(x, 32) / 127;
  const float inv = inverse(scale);
  alignas(64) float code[32];
  for (int k = 0; k < 32; k += kWidth) {  // half away from zero
    const Lanes v = load(x + k) * inv, a = magnitude(v), near = round_even(a);
    const Lanes whole = choose(near > a, near - 1.0f, near);
    const Lanes rounded = choose(a - whole >= all(0.5f), whole + 1.0f, whole);
    store(code + k, choose(v < Lanes{}, -rounded, rounded));
  }
  for (int k = 0; k < 32; ++k) b->qs[k] = static_cast<int8_t>(code[k]);
  b->d = f32_to_f16(scale);
  return fits_f16(b->d);
}

// Codes as pairs of bits (Q2_K, the low part of Q3_K): formats.h.
inline void pack_crumbs(const uint8_t code[256], uint8_t qs[64]) {
  memset(qs, 0, 64);
  for (int k = 0; k < 256; ++k) {
    uint8_t& byte = qs[k / 128 * 32 + k % 32];
    byte = static_cast<uint8_t>(byte | (code[k] & 3) << (k % 128 / 32 * 2));
  }
}

// Codes as nibbles in runs: byte run * c + i holds codes 2 run c + i and 2 run c + run + i.
inline void pack_runs(const uint8_t* code, int run, uint8_t* qs) {
  for (int i = 0; i < 128; ++i) {
    const int k = i / run * 2 * run + i % run;
    qs[i] = static_cast<uint8_t>((code[k] & 15) | (code[k + run] & 15) << 4);
  }
}

// ---- packing what has been fitted: sub-blocks from `at` on, their codes ----

inline void pack(const Choice& c, int at, const uint8_t* code, BlockQ4_0* b) {
  b->d = f32_to_f16(c.d[at]);
  pack_nibbles(code, b->qs);
}

inline void pack(const Choice& c, int at, const uint8_t* code, BlockQ4_1* b) {
  b->d = f32_to_f16(c.d[at]);
  b->m = f32_to_f16(-c.dmin[at]);
  pack_nibbles(code, b->qs);
}

inline void pack(const Choice& c, int at, const uint8_t* code, BlockQ5_0* b) {
  b->d = f32_to_f16(c.d[at]);
  pack_nibbles(code, b->qs);
  pack_fifth_bits(code, b->qh);
}

inline void pack(const Choice& c, int at, const uint8_t* code, BlockQ5_1* b) {
  b->d = f32_to_f16(c.d[at]);
  b->m = f32_to_f16(-c.dmin[at]);
  pack_nibbles(code, b->qs);
  pack_fifth_bits(code, b->qh);
}

inline void pack(const Choice& c, int at, const uint8_t* code, BlockIQ4_NL* b) {
  b->d = f32_to_f16(c.d[at]);
  pack_nibbles(code, b->qs);
}

inline void pack(const Choice& c, int at, const uint8_t* code, BlockQ2_K* b) {
  b->d = f32_to_f16(c.d[at]);
  b->dmin = f32_to_f16(c.dmin[at]);
  for (int j = 0; j < 16; ++j)
    b->scales[j] = static_cast<uint8_t>(static_cast<int>(c.sc[at + j]) | static_cast<int>(c.mn[at + j]) << 4);
  pack_crumbs(code, b->qs);
}

inline void pack(const Choice& c, int at, const uint8_t* u, BlockQ3_K* b) {
  b->d = f32_to_f16(c.d[at]);
  memset(b->hmask, 0, sizeof b->hmask);
  memset(b->scales, 0, sizeof b->scales);
  for (int k = 0; k < 256; ++k) b->hmask[k % 32] = static_cast<uint8_t>(b->hmask[k % 32] | (u[k] >> 2) << (k / 32));
  pack_crumbs(u, b->qs);
  for (int j = 0; j < 16; ++j) {
    const int s = static_cast<int>(c.sc[at + j]) + 32;
    b->scales[j % 8] = static_cast<uint8_t>(b->scales[j % 8] | (s & 15) << (j / 8 * 4));
    b->scales[8 + j % 4] = static_cast<uint8_t>(b->scales[8 + j % 4] | (s >> 4) << (j / 4 * 2));
  }
}

template <class Block>
void pack_lines(const Choice& c, int at, const uint8_t* code, Block* b) {
  uint8_t sc[8], mn[8];
  for (int j = 0; j < 8; ++j) {
    sc[j] = static_cast<uint8_t>(c.sc[at + j]);
    mn[j] = static_cast<uint8_t>(c.mn[at + j]);
  }
  b->d = f32_to_f16(c.d[at]);
  b->dmin = f32_to_f16(c.dmin[at]);
  pack_scales_k4(sc, mn, b->scales);
  pack_runs(code, 32, b->qs);
}

inline void pack(const Choice& c, int at, const uint8_t* code, BlockQ4_K* b) { pack_lines(c, at, code, b); }

inline void pack(const Choice& c, int at, const uint8_t* code, BlockQ5_K* b) {
  pack_lines(c, at, code, b);
  memset(b->qh, 0, sizeof b->qh);
  for (int k = 0; k < 256; ++k) b->qh[k % 32] = static_cast<uint8_t>(b->qh[k % 32] | (code[k] >> 4) << (k / 32));
}

inline void pack(const Choice& c, int at, const uint8_t* u, BlockQ6_K* b) {
  b->d = f32_to_f16(c.d[at]);
  for (int j = 0; j < 16; ++j) b->scales[j] = static_cast<int8_t>(c.sc[at + j]);
  memset(b->qh, 0, sizeof b->qh);
  for (int k = 0; k < 256; ++k) {
    uint8_t& high = b->qh[k / 128 * 32 + k % 32];
    high = static_cast<uint8_t>(high | (u[k] >> 4) << (k % 128 / 32 * 2));
  }
  pack_runs(u, 64, b->ql);
}

inline void pack(const Choice& c, int at, const uint8_t* u, BlockIQ4_XS* b) {
  b->d = f32_to_f16(c.d[at]);
  uint32_t high = 0;
  memset(b->scales_l, 0, sizeof b->scales_l);
  for (int j = 0; j < 8; ++j) {
    const int s = static_cast<int>(c.sc[at + j]) + 32;
    b->scales_l[j / 2] = static_cast<uint8_t>(b->scales_l[j / 2] | (s & 15) << (j % 2 * 4));
    high |= static_cast<uint32_t>(s >> 4) << (2 * j);
  }
  b->scales_h = static_cast<uint16_t>(high);
  pack_runs(u, 16, b->qs);
}

// ---- what each format tries ----

struct SearchQ4 {  // scales: ends of the range for the largest weight; lines: parts of the range cut off at both ends
  static constexpr float kLow = -9, kHigh = 8.5f, kStep = 0.25f;
  static constexpr int kTrials = 12;
};
struct SearchQ5 {
  static constexpr float kLow = -17, kHigh = 16.5f, kStep = 0.25f;
  static constexpr int kTrials = 14;
};
struct SearchQ3 {
  static constexpr float kLow = -5, kHigh = 4.4f, kStep = 0.15f;
  static constexpr int kTrials = 14;
};
struct SearchQ6 {
  static constexpr float kLow = -33, kHigh = 32, kStep = 0.25f;
  static constexpr int kTrials = 12;
};
struct SearchIq4 {
  static constexpr float kLow = -135, kHigh = 125, kStep = 4;
  static constexpr int kTrials = 12;
};
struct SearchLine2 {
  static constexpr float kFirst = -0.1f, kStep = 0.12f;
  static constexpr int kTrials = 5;
};
struct SearchLine4 {
  static constexpr float kFirst = -0.04f, kStep = 0.04f;
  static constexpr int kTrials = 4;
};
struct SearchOffset4 {  // for offsets of any sign
  static constexpr float kFirst = -0.04f, kStep = 0.015f;
  static constexpr int kTrials = 10;
};
struct SearchOffset5 {
  static constexpr float kFirst = -0.03f, kStep = 0.01f;
  static constexpr int kTrials = 10;
};
struct SearchLine5 {
  static constexpr float kFirst = -0.03f, kStep = 0.025f;
  static constexpr int kTrials = 5;
};

template <int N>
bool fit(const Batch<N>& b, Choice* c, uint8_t* code, const BlockQ4_0*) {
  const bool ok = fit_single<Even<-8, 7>, SearchQ4>(b, c);
  final_codes<Even<-8, 7>>(b, *c, code);
  return ok;
}
template <int N>
bool fit(const Batch<N>& b, Choice* c, uint8_t* code, const BlockQ5_0*) {
  const bool ok = fit_single<Even<-16, 15>, SearchQ5>(b, c);
  final_codes<Even<-16, 15>>(b, *c, code);
  return ok;
}
template <int N>
bool fit(const Batch<N>& b, Choice* c, uint8_t* code, const BlockIQ4_NL*) {
  const bool ok = fit_single<Iq4, SearchIq4>(b, c);
  final_codes<Iq4>(b, *c, code);
  return ok;
}
template <int N>
bool fit(const Batch<N>& b, Choice* c, uint8_t* code, const BlockQ4_1*) {
  const bool ok = fit_single_line<15, SearchOffset4>(b, c);
  final_codes<Even<0, 15>>(b, *c, code);
  return ok;
}
template <int N>
bool fit(const Batch<N>& b, Choice* c, uint8_t* code, const BlockQ5_1*) {
  const bool ok = fit_single_line<31, SearchOffset5>(b, c);
  final_codes<Even<0, 31>>(b, *c, code);
  return ok;
}
template <int N>
bool fit(const Batch<N>& b, Choice* c, uint8_t* code, const BlockQ2_K*) {
  const bool ok = fit_lined<3, SearchLine2>(b, 15, 1, c);
  final_codes<Even<0, 3>>(b, *c, code);
  return ok;
}
template <int N>
bool fit(const Batch<N>& b, Choice* c, uint8_t* code, const BlockQ3_K*) {
  const bool ok = fit_scaled<Even<-4, 3>, SearchQ3>(b, -32, 31, 1, c);
  final_codes<Even<-4, 3>>(b, *c, code);
  return ok;
}
template <int N>
bool fit(const Batch<N>& b, Choice* c, uint8_t* code, const BlockQ4_K*) {
  const bool ok = fit_lined<15, SearchLine4>(b, 63, 1, c);
  final_codes<Even<0, 15>>(b, *c, code);
  return ok;
}
template <int N>
bool fit(const Batch<N>& b, Choice* c, uint8_t* code, const BlockQ5_K*) {
  const bool ok = fit_lined<31, SearchLine5>(b, 63, 1, c);
  final_codes<Even<0, 31>>(b, *c, code);
  return ok;
}
template <int N>
bool fit(const Batch<N>& b, Choice* c, uint8_t* code, const BlockQ6_K*) {
  const bool ok = fit_scaled<Even<-32, 31>, SearchQ6>(b, -128, 127, 1, c);
  final_codes<Even<-32, 31>>(b, *c, code);
  return ok;
}
template <int N>
bool fit(const Batch<N>& b, Choice* c, uint8_t* code, const BlockIQ4_XS*) {
  const bool ok = fit_scaled<Iq4, SearchIq4>(b, -32, 31, 1, c);
  final_codes<Iq4>(b, *c, code);
  return ok;
}

// ---- rows ----

// The largest of the weights that made a scale overflow.
inline size_t largest(const float* x, size_t from, size_t to) {
  size_t worst = from;
  for (size_t k = from; k < to; ++k) {
    if (fabsf(x[k]) > fabsf(x[worst])) worst = k;
  }
  return worst;
}

constexpr float kLargest = 4e8f;  // no format stores more: 65504 x 128 x 32 in Q6_K

// How much more large weights count (Batch::favour_large). For Q4_K that costs 0.6 % of RMSE and takes 8 % off the
// divergence of the trained model where such weights matter, for Q5_1 with importance 0.3 % and 20 % of another's; the
// other models change by the width of a draw. Q2_K, Q3_K and Q5_K lose by it, the rest does not care (docs/quantisers.md).
template <class Block>
constexpr float kFavour = 0;
template <>
constexpr float kFavour<BlockQ4_K> = 0.5f;
template <>
constexpr float kFavour<BlockQ5_1> = 0.3f;

// N weights share an (integer) scale; a block holds kBlock. Sixteen sub-blocks at a time.
template <class Block, int N, int kBlock>
size_t fit_row(const float* x, const float* importance, size_t n, void* dst) {
  constexpr size_t kWeights = N * kSubs;
  auto* out = static_cast<Block*>(dst);
  Batch<N> batch;
  for (size_t at = 0; at < n; at += kWeights) {
    const size_t size = n - at < kWeights ? n - at : kWeights;
    if (!(largest_magnitude(x + at, size) <= kLargest)) return largest(x, at, at + size);
    batch.fill(x + at, importance != nullptr ? importance + at : nullptr, size / N);
    if constexpr (kFavour<Block> > 0) batch.favour_large(kFavour<Block>);
    Choice choice;
    uint8_t code[kWeights];
    if (!fit(batch, &choice, code, static_cast<const Block*>(nullptr))) return largest(x, at, at + size);
    for (size_t done = 0; done < size; done += kBlock) pack(choice, static_cast<int>(done / N), code + done, out++);
  }
  return n;
}

template <class Block>
size_t plain_row(const float* x, size_t n, void* dst) {
  auto* out = static_cast<Block*>(dst);
  for (size_t at = 0; at < n; at += 32, ++out) {
    if (!plain(x + at, out)) return largest(x, at, at + 32);
  }
  return n;
}

// As plain_row, but fitted where there is an importance to fit to.
template <class Block>
size_t simple_row(const float* x, const float* importance, size_t n, void* dst) {
  return importance != nullptr ? fit_row<Block, 32, 32>(x, importance, n, dst) : plain_row<Block>(x, n, dst);
}

inline size_t first_not_finite(const float* x, size_t n) {
  uint32_t any = 0;
  for (size_t k = 0; k < n; ++k) any |= is_finite(x[k]) ? 0u : 1u;
  for (size_t k = 0; any && k < n; ++k) {
    if (!is_finite(x[k])) return k;
  }
  return n;
}

template <class Convert>
size_t narrow(const float* x, size_t n, uint16_t infinity, void* dst, Convert convert) {
  for (size_t k = 0; k < n; ++k) {
    const uint16_t h = convert(x[k]);
    if ((h & 0x7fff) == infinity) return k;
    memcpy(static_cast<uint8_t*>(dst) + 2 * k, &h, 2);
  }
  return n;
}

template <Format kFormat>
size_t quantise(const float* x, const float* importance, size_t n, void* dst) {
  if (const size_t bad = first_not_finite(x, n); bad != n) return bad;
  switch (kFormat) {
    case Format::F32: memcpy(dst, x, 4 * n); return n;
    case Format::F16: return narrow(x, n, 0x7c00, dst, f32_to_f16);
    case Format::BF16: return narrow(x, n, 0x7f80, dst, f32_to_bf16);
    case Format::Q4_0: return simple_row<BlockQ4_0>(x, importance, n, dst);
    case Format::Q4_1: return simple_row<BlockQ4_1>(x, importance, n, dst);
    case Format::Q5_0: return simple_row<BlockQ5_0>(x, importance, n, dst);
    case Format::Q5_1: return simple_row<BlockQ5_1>(x, importance, n, dst);
    case Format::Q8_0: return plain_row<BlockQ8_0>(x, n, dst);
    case Format::IQ4_NL: return fit_row<BlockIQ4_NL, 32, 32>(x, importance, n, dst);
    case Format::Q2_K: return fit_row<BlockQ2_K, 16, 256>(x, importance, n, dst);
    case Format::Q3_K: return fit_row<BlockQ3_K, 16, 256>(x, importance, n, dst);
    case Format::Q4_K: return fit_row<BlockQ4_K, 32, 256>(x, importance, n, dst);
    case Format::Q5_K: return fit_row<BlockQ5_K, 32, 256>(x, importance, n, dst);
    case Format::Q6_K: return fit_row<BlockQ6_K, 16, 256>(x, importance, n, dst);
    case Format::IQ4_XS: return fit_row<BlockIQ4_XS, 32, 256>(x, importance, n, dst);
    default: break;  // can_quantise
  }
  return 0;
}

inline void loss(const float* x, const float* y, size_t n, float* error, float* energy) {
  constexpr int kParts = kSubs / kWidth;
  Lanes lost[kParts] = {}, all_of[kParts] = {};
  size_t k = 0;
  for (; k + kSubs <= n; k += kSubs) {
    for (int i = 0; i < kParts; ++i) {
      const Lanes a = load(x + k + static_cast<size_t>(i) * kWidth),
                  r = a - load(y + k + static_cast<size_t>(i) * kWidth);
      lost[i] += r * r;
      all_of[i] += a * a;
    }
  }
  alignas(64) float e[kSubs], g[kSubs];
  for (int i = 0; i < kParts; ++i) {
    store(e + i * kWidth, lost[i]);
    store(g + i * kWidth, all_of[i]);
  }
  for (int i = 0; k < n; ++k, ++i) {
    const float r = x[k] - y[k];
    e[i] += r * r;
    g[i] += x[k] * x[k];
  }
  for (int half = kSubs / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      e[i] += e[i + half];
      g[i] += g[i + half];
    }
  }
  *error = e[0];
  *energy = g[0];
}

inline void set_quantisers(KernelTable* table) {
  table->loss = loss;
#define PE_FORMAT(name, id, block, bytes, act) \
  table->quantise[static_cast<int>(Format::name)] = can_quantise(Format::name) ? quantise<Format::name> : nullptr;
#include "quant/formats.def"
#undef PE_FORMAT
}

}  // namespace
}  // namespace pe
