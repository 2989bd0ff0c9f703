#include "quant/quantise.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "quant/fp16.h"

namespace pe {
namespace {

// Every block function returns false when a scale overflows fp16.

bool fits_f16(uint16_t h) { return (h & 0x7c00) != 0x7c00; }

// Nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
int round_even(float x) { return static_cast<int>((x + 12582912.0f) - 12582912.0f); }

// ---- one scale for 32 weights: the arithmetic of the gguf package, operation by operation, in float32 ----

// 1 / d, where d is so small that the fp16 scale is 0 anyway: 0.
float inverse(float d) {
  const float inv = 1 / d;
  return is_finite(inv) ? inv : 0;
}

// The first of the weights with the largest magnitude.
float extreme(const float* x, int n) {
  float best = x[0];
  for (int k = 1; k < n; ++k) {
    if (std::fabs(x[k]) > std::fabs(best)) best = x[k];
  }
  return best;
}

// Codes 0 .. 2 half - 1 around half: x = d (u - half).
bool codes_around(const float* x, int half, uint16_t* d, uint8_t code[32]) {
  const float scale = extreme(x, 32) / static_cast<float>(-half);
  const float inv = inverse(scale);
  for (int k = 0; k < 32; ++k) {
    const int u = static_cast<int>(x[k] * inv + (static_cast<float>(half) + 0.5f));
    code[k] = static_cast<uint8_t>(std::min(u, 2 * half - 1));
  }
  *d = f32_to_f16(scale);
  return fits_f16(*d);
}

// Codes 0 .. top above the minimum: x = d u + m.
bool codes_above(const float* x, int top, uint16_t* d, uint16_t* m, uint8_t code[32]) {
  const float low = *std::min_element(x, x + 32), high = *std::max_element(x, x + 32);
  const float scale = (high - low) / static_cast<float>(top);
  if (!is_finite(scale)) return false;
  const float inv = inverse(scale);
  for (int k = 0; k < 32; ++k) {
    const int u = static_cast<int>((x[k] - low) * inv + 0.5f);
    code[k] = static_cast<uint8_t>(std::min(u, top));
  }
  *d = f32_to_f16(scale);
  *m = f32_to_f16(low);
  return fits_f16(*d) && fits_f16(*m);
}

void pack_nibbles(const uint8_t code[32], uint8_t qs[16]) {
  for (int k = 0; k < 16; ++k) qs[k] = static_cast<uint8_t>((code[k] & 15) | (code[k + 16] & 15) << 4);
}

void pack_fifth_bits(const uint8_t code[32], uint8_t qh[4]) {
  std::memset(qh, 0, 4);
  for (int k = 0; k < 32; ++k) qh[k / 8] = static_cast<uint8_t>(qh[k / 8] | (code[k] >> 4) << (k % 8));
}

bool quantise(const float* x, BlockQ4_0* b) {
  uint16_t d;
  uint8_t code[32];
  const bool ok = codes_around(x, 8, &d, code);
  b->d = d;
  pack_nibbles(code, b->qs);
  return ok;
}

bool quantise(const float* x, BlockQ5_0* b) {
  uint16_t d;
  uint8_t code[32];
  const bool ok = codes_around(x, 16, &d, code);
  b->d = d;
  pack_nibbles(code, b->qs);
  pack_fifth_bits(code, b->qh);
  return ok;
}

bool quantise(const float* x, BlockQ4_1* b) {
  uint16_t d, m;
  uint8_t code[32];
  if (!codes_above(x, 15, &d, &m, code)) return false;
  b->d = d;
  b->m = m;
  pack_nibbles(code, b->qs);
  return true;
}

bool quantise(const float* x, BlockQ5_1* b) {
  uint16_t d, m;
  uint8_t code[32];
  if (!codes_above(x, 31, &d, &m, code)) return false;
  b->d = d;
  b->m = m;
  pack_nibbles(code, b->qs);
  pack_fifth_bits(code, b->qh);
  return true;
}

bool quantise(const float* x, BlockQ8_0* b) {
  const float scale = std::fabs(extreme(x, 32)) / 127;
  const float inv = inverse(scale);
  for (int k = 0; k < 32; ++k) {  // half away from zero
    const float a = std::fabs(x[k] * inv);
    const float whole = std::floor(a);
    const float rounded = whole + std::floor(2 * (a - whole));
    b->qs[k] = static_cast<int8_t>(x[k] < 0 ? -rounded : rounded);
  }
  b->d = f32_to_f16(scale);
  return fits_f16(b->d);
}

// ---- scales by weighted least squares ----
//
// The weights are rounded with several trial scales; for the codes q that come out, the best scale has a closed form.
// The trial with the least error sum of w (x - scale q)^2 wins. Sums are in double: squares of any float32 fit.

// Codes kLow .. kHigh with evenly spaced values.
template <int kLow, int kHigh>
struct Even {
  static constexpr float kExtreme = kLow;  // the value that the largest weight is given
  static constexpr float kStep = 0.1f;     // between trials, in units of codes
  static constexpr int kTrials = 9;        // on each side
  static int nearest(float v) { return v <= kLow ? kLow : v >= kHigh ? kHigh : round_even(v); }
  static int value(int code) { return code; }
};

struct Iq4 {
  static constexpr float kExtreme = -127;
  static constexpr float kStep = 1;
  static constexpr int kTrials = 8;
  static int nearest(float v) {
    int u = 0;
    while (u < 15 && 2 * v > static_cast<float>(kIq4Values[u] + kIq4Values[u + 1])) ++u;
    return u;
  }
  static int value(int code) { return kIq4Values[code]; }
};

// The scale for x[0 .. n - 1], each error weighted with x^2: large weights matter more.
template <class Levels>
float fit_scale(const float* x, int n) {
  const float top = extreme(x, n);
  if (!is_finite(1 / top)) return 0;
  double best = 0, scale = 0;
  for (int i = -Levels::kTrials; i <= Levels::kTrials; ++i) {
    const float inv = (Levels::kExtreme + Levels::kStep * static_cast<float>(i)) / top;
    if (!is_finite(inv)) return 0;
    double xq = 0, qq = 0;
    for (int k = 0; k < n; ++k) {
      const double v = x[k], q = Levels::value(Levels::nearest(x[k] * inv)), w = v * v;
      xq += w * v * q;
      qq += w * q * q;
    }
    if (qq > 0 && xq * xq > best * qq) {  // the error is a constant less xq^2 / qq
      best = xq * xq / qq;
      scale = xq / qq;
    }
  }
  return static_cast<float>(scale);
}

// x is about scale * u - min with codes u in 0 .. top and min >= 0.
struct Line {
  float scale, min;
};

Line fit_line(const float* x, int n, int top) {
  double energy = 0;
  for (int k = 0; k < n; ++k) energy += static_cast<double>(x[k]) * x[k];
  const double mean = std::sqrt(energy / n);
  const float low = std::min(0.0f, *std::min_element(x, x + n));
  const float range = *std::max_element(x, x + n) - low;
  if (!(range > 0) || !is_finite(static_cast<float>(top) / range)) return {0, -low};
  Line line = {range / static_cast<float>(top), -low};
  double best = HUGE_VAL;
  for (int i = -12; i <= 12; ++i) {
    const float inv = (static_cast<float>(top) + 0.1f * static_cast<float>(i)) / range;
    double w1 = 0, wq = 0, wx = 0, wqq = 0, wqx = 0, wxx = 0;
    for (int k = 0; k < n; ++k) {
      const double v = x[k], w = mean + std::fabs(v);
      const double q = std::clamp(round_even((x[k] - low) * inv), 0, top);
      w1 += w;
      wq += w * q;
      wx += w * v;
      wqq += w * q * q;
      wqx += w * q * v;
      wxx += w * v * v;
    }
    const double det = w1 * wqq - wq * wq;
    if (!(det > 0)) continue;
    double scale = (w1 * wqx - wq * wx) / det;
    double offset = (wqq * wx - wq * wqx) / det;
    if (offset > 0) {  // minima are stored as min >= 0, x = scale q - min
      offset = 0;
      scale = wqx / wqq;
    }
    const double error =
        wxx - 2 * scale * wqx - 2 * offset * wx + scale * scale * wqq + 2 * scale * offset * wq + offset * offset * w1;
    if (scale > 0 && error < best) {
      best = error;
      line = {static_cast<float>(scale), static_cast<float>(-offset)};
    }
  }
  return line;
}

// Integer scales for the sub-blocks: scale[j] is about d * sc[j], sc in low .. high, |low| >= high.
template <int kSubs>
bool integer_scales(const float scale[kSubs], int low, int high, uint16_t* d, int sc[kSubs]) {
  *d = f32_to_f16(extreme(scale, kSubs) / static_cast<float>(low));
  const float inv = inverse(f16_to_f32(*d));
  for (int j = 0; j < kSubs; ++j) sc[j] = std::clamp(round_even(std::clamp(scale[j] * inv, -1e6f, 1e6f)), low, high);
  return fits_f16(*d);
}

// The final codes for the scales as they are in the file. step: d * sc.
template <class Levels>
int code_for(float x, float step) {
  const float inv = inverse(step);
  return Levels::nearest(x * inv);
}

template <class Levels, int kSubs>
bool quantise_scaled(const float* x, int sc_low, int sc_high, uint16_t* d, int sc[kSubs], int code[256]) {
  constexpr int kSize = 256 / kSubs;
  float scale[kSubs];
  for (int j = 0; j < kSubs; ++j) scale[j] = fit_scale<Levels>(x + j * kSize, kSize);
  if (!integer_scales<kSubs>(scale, sc_low, sc_high, d, sc)) return false;
  for (int k = 0; k < 256; ++k) code[k] = code_for<Levels>(x[k], f16_to_f32(*d) * static_cast<float>(sc[k / kSize]));
  return true;
}

template <int kTop, int kSubs>
bool quantise_lines(const float* x, int sc_high, uint16_t* d, uint16_t* dmin, uint8_t sc[kSubs], uint8_t mn[kSubs],
                    uint8_t code[256]) {
  constexpr int kSize = 256 / kSubs;
  float scale[kSubs], min[kSubs];
  for (int j = 0; j < kSubs; ++j) {
    const Line line = fit_line(x + j * kSize, kSize, kTop);
    scale[j] = line.scale;
    min[j] = line.min;
  }
  int s[kSubs], m[kSubs];
  *d = f32_to_f16(*std::max_element(scale, scale + kSubs) / static_cast<float>(sc_high));
  *dmin = f32_to_f16(*std::max_element(min, min + kSubs) / static_cast<float>(sc_high));
  if (!fits_f16(*d) || !fits_f16(*dmin)) return false;
  const float step = f16_to_f32(*d), min_step = f16_to_f32(*dmin);
  const float inv = inverse(step), min_inv = inverse(min_step);
  for (int j = 0; j < kSubs; ++j) {
    s[j] = std::clamp(round_even(std::min(scale[j] * inv, 1e6f)), 0, sc_high);
    m[j] = std::clamp(round_even(std::min(min[j] * min_inv, 1e6f)), 0, sc_high);
    sc[j] = static_cast<uint8_t>(s[j]);
    mn[j] = static_cast<uint8_t>(m[j]);
  }
  for (int k = 0; k < 256; ++k) {
    const int j = k / kSize;
    const float shifted = x[k] + min_step * static_cast<float>(m[j]);
    code[k] = static_cast<uint8_t>(code_for<Even<0, kTop>>(shifted, step * static_cast<float>(s[j])));
  }
  return true;
}

// Codes as pairs of bits (Q2_K, the low part of Q3_K): formats.h.
void pack_crumbs(const uint8_t code[256], uint8_t qs[64]) {
  std::memset(qs, 0, 64);
  for (int k = 0; k < 256; ++k) {
    uint8_t& byte = qs[k / 128 * 32 + k % 32];
    byte = static_cast<uint8_t>(byte | (code[k] & 3) << (k % 128 / 32 * 2));
  }
}

// Codes as nibbles in runs: byte run * c + i holds codes 2 run c + i and 2 run c + run + i.
void pack_runs(const uint8_t* code, int run, uint8_t* qs) {
  for (int i = 0; i < 128; ++i) {
    const int k = i / run * 2 * run + i % run;
    qs[i] = static_cast<uint8_t>((code[k] & 15) | (code[k + run] & 15) << 4);
  }
}

bool quantise(const float* x, BlockQ2_K* b) {
  uint16_t d, dmin;
  uint8_t sc[16], mn[16], code[256];
  if (!quantise_lines<3, 16>(x, 15, &d, &dmin, sc, mn, code)) return false;
  b->d = d;
  b->dmin = dmin;
  for (int j = 0; j < 16; ++j) b->scales[j] = static_cast<uint8_t>(sc[j] | mn[j] << 4);
  pack_crumbs(code, b->qs);
  return true;
}

bool quantise(const float* x, BlockQ3_K* b) {
  uint16_t d;
  int sc[16], code[256];
  if (!quantise_scaled<Even<-4, 3>, 16>(x, -32, 31, &d, sc, code)) return false;
  b->d = d;
  uint8_t u[256];
  std::memset(b->hmask, 0, sizeof b->hmask);
  std::memset(b->scales, 0, sizeof b->scales);
  for (int k = 0; k < 256; ++k) {
    u[k] = static_cast<uint8_t>(code[k] + 4);
    b->hmask[k % 32] = static_cast<uint8_t>(b->hmask[k % 32] | (u[k] >> 2) << (k / 32));
  }
  pack_crumbs(u, b->qs);
  for (int j = 0; j < 16; ++j) {
    const int s = sc[j] + 32;
    b->scales[j % 8] = static_cast<uint8_t>(b->scales[j % 8] | (s & 15) << (j / 8 * 4));
    b->scales[8 + j % 4] = static_cast<uint8_t>(b->scales[8 + j % 4] | (s >> 4) << (j / 4 * 2));
  }
  return true;
}

bool quantise(const float* x, BlockQ4_K* b) {
  uint16_t d, dmin;
  uint8_t sc[8], mn[8], code[256];
  if (!quantise_lines<15, 8>(x, 63, &d, &dmin, sc, mn, code)) return false;
  b->d = d;
  b->dmin = dmin;
  pack_scales_k4(sc, mn, b->scales);
  pack_runs(code, 32, b->qs);
  return true;
}

bool quantise(const float* x, BlockQ5_K* b) {
  uint16_t d, dmin;
  uint8_t sc[8], mn[8], code[256];
  if (!quantise_lines<31, 8>(x, 63, &d, &dmin, sc, mn, code)) return false;
  b->d = d;
  b->dmin = dmin;
  pack_scales_k4(sc, mn, b->scales);
  pack_runs(code, 32, b->qs);
  std::memset(b->qh, 0, sizeof b->qh);
  for (int k = 0; k < 256; ++k) b->qh[k % 32] = static_cast<uint8_t>(b->qh[k % 32] | (code[k] >> 4) << (k / 32));
  return true;
}

bool quantise(const float* x, BlockQ6_K* b) {
  uint16_t d;
  int sc[16], code[256];
  if (!quantise_scaled<Even<-32, 31>, 16>(x, -128, 127, &d, sc, code)) return false;
  b->d = d;
  for (int j = 0; j < 16; ++j) b->scales[j] = static_cast<int8_t>(sc[j]);
  uint8_t u[256];
  std::memset(b->qh, 0, sizeof b->qh);
  for (int k = 0; k < 256; ++k) {
    u[k] = static_cast<uint8_t>(code[k] + 32);
    uint8_t& high = b->qh[k / 128 * 32 + k % 32];
    high = static_cast<uint8_t>(high | (u[k] >> 4) << (k % 128 / 32 * 2));
  }
  pack_runs(u, 64, b->ql);
  return true;
}

bool quantise(const float* x, BlockIQ4_NL* b) {
  b->d = f32_to_f16(fit_scale<Iq4>(x, 32));
  uint8_t code[32];
  for (int k = 0; k < 32; ++k) code[k] = static_cast<uint8_t>(code_for<Iq4>(x[k], f16_to_f32(b->d)));
  pack_nibbles(code, b->qs);
  return fits_f16(b->d);
}

bool quantise(const float* x, BlockIQ4_XS* b) {
  uint16_t d;
  int sc[8], code[256];
  if (!quantise_scaled<Iq4, 8>(x, -32, 31, &d, sc, code)) return false;
  b->d = d;
  uint32_t high = 0;
  std::memset(b->scales_l, 0, sizeof b->scales_l);
  for (int j = 0; j < 8; ++j) {
    const int s = sc[j] + 32;
    b->scales_l[j / 2] = static_cast<uint8_t>(b->scales_l[j / 2] | (s & 15) << (j % 2 * 4));
    high |= static_cast<uint32_t>(s >> 4) << (2 * j);
  }
  b->scales_h = static_cast<uint16_t>(high);
  uint8_t u[256];
  for (int k = 0; k < 256; ++k) u[k] = static_cast<uint8_t>(code[k]);
  pack_runs(u, 16, b->qs);
  return true;
}

// ---- rows ----

template <class Block>
size_t quantise_blocks(const float* x, size_t n, size_t block, void* dst) {
  auto* out = static_cast<Block*>(dst);
  for (size_t at = 0; at < n; at += block, ++out) {
    if (quantise(x + at, out)) continue;
    size_t worst = at;  // the scale overflows because of the largest weight
    for (size_t k = at; k < at + block; ++k) {
      if (std::fabs(x[k]) > std::fabs(x[worst])) worst = k;
    }
    return worst;
  }
  return n;
}

template <class Convert>
size_t narrow(const float* x, size_t n, uint16_t infinity, void* dst, Convert convert) {
  for (size_t k = 0; k < n; ++k) {
    const uint16_t h = convert(x[k]);
    if ((h & 0x7fff) == infinity) return k;
    std::memcpy(static_cast<uint8_t*>(dst) + 2 * k, &h, 2);
  }
  return n;
}

}  // namespace

size_t quantise_row(Format format, const float* x, size_t n, void* dst) {
  for (size_t k = 0; k < n; ++k) {
    if (!is_finite(x[k])) return k;
  }
  switch (format) {
    case Format::F32: std::memcpy(dst, x, 4 * n); return n;
    case Format::F16: return narrow(x, n, 0x7c00, dst, f32_to_f16);
    case Format::BF16: return narrow(x, n, 0x7f80, dst, f32_to_bf16);
#define PE_CASE(name) \
  case Format::name: return quantise_blocks<Block##name>(x, n, format_info(Format::name).block, dst)
      PE_CASE(Q4_0);
      PE_CASE(Q4_1);
      PE_CASE(Q5_0);
      PE_CASE(Q5_1);
      PE_CASE(Q8_0);
      PE_CASE(IQ4_NL);
      PE_CASE(Q2_K);
      PE_CASE(Q3_K);
      PE_CASE(Q4_K);
      PE_CASE(Q5_K);
      PE_CASE(Q6_K);
      PE_CASE(IQ4_XS);
#undef PE_CASE
    default: break;  // can_quantise
  }
  return 0;
}

bool can_quantise(Format format) {
  switch (format) {
    case Format::IQ2_XXS:
    case Format::IQ2_XS:
    case Format::IQ2_S:
    case Format::IQ3_XXS:
    case Format::IQ3_S:
    case Format::IQ1_S:
    case Format::IQ1_M:
    case Format::TQ1_0:
    case Format::TQ2_0:
    case Format::MXFP4: return false;
    default: return true;
  }
}

}  // namespace pe
