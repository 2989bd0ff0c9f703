// Dequantisation for the tiers, of the formats that are written: loops that compilers turn into vectors. The values are those of
// the specification in scalar/linear.cc, bit for bit: d times scale, times code, minus dmin times minimum.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels/kernels.h"
#include "quant/formats.h"
#include "quant/fp16.h"

namespace pe {
namespace {

inline float code_float(int code) { return static_cast<float>(code); }
inline uint32_t word(const uint8_t p[4]) {
  return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16 |
         static_cast<uint32_t>(p[3]) << 24;
}

// The fifth bits of codes k and k + 16, in their place.
inline int fifth(uint32_t high, int k) { return static_cast<int>(high >> k & 1) << 4; }

inline void restore(const BlockQ4_0& b, float* y) {
  const float d = f16_to_f32(b.d);
  for (int k = 0; k < 16; ++k) y[k] = d * code_float((b.qs[k] & 15) - 8);
  for (int k = 0; k < 16; ++k) y[k + 16] = d * code_float((b.qs[k] >> 4) - 8);
}

inline void restore(const BlockQ4_1& b, float* y) {
  const float d = f16_to_f32(b.d), m = f16_to_f32(b.m);
  for (int k = 0; k < 16; ++k) y[k] = d * code_float(b.qs[k] & 15) + m;
  for (int k = 0; k < 16; ++k) y[k + 16] = d * code_float(b.qs[k] >> 4) + m;
}

inline void restore(const BlockQ5_0& b, float* y) {
  const float d = f16_to_f32(b.d);
  const uint32_t high = word(b.qh);
  for (int k = 0; k < 16; ++k) y[k] = d * code_float(((b.qs[k] & 15) | fifth(high, k)) - 16);
  for (int k = 0; k < 16; ++k) y[k + 16] = d * code_float(((b.qs[k] >> 4) | fifth(high, k + 16)) - 16);
}

inline void restore(const BlockQ5_1& b, float* y) {
  const float d = f16_to_f32(b.d), m = f16_to_f32(b.m);
  const uint32_t high = word(b.qh);
  for (int k = 0; k < 16; ++k) y[k] = d * code_float((b.qs[k] & 15) | fifth(high, k)) + m;
  for (int k = 0; k < 16; ++k) y[k + 16] = d * code_float((b.qs[k] >> 4) | fifth(high, k + 16)) + m;
}

inline void restore(const BlockQ8_0& b, float* y) {
  const float d = f16_to_f32(b.d);
  for (int k = 0; k < 32; ++k) y[k] = d * code_float(b.qs[k]);
}

inline void restore(const BlockIQ4_NL& b, float* y) {
  const float d = f16_to_f32(b.d);
  for (int k = 0; k < 16; ++k) y[k] = d * code_float(kIq4Values[b.qs[k] & 15]);
  for (int k = 0; k < 16; ++k) y[k + 16] = d * code_float(kIq4Values[b.qs[k] >> 4]);
}

inline void restore(const BlockQ2_K& b, float* y) {
  const float d = f16_to_f32(b.d), dmin = f16_to_f32(b.dmin);
  for (int j = 0; j < 16; ++j) {
    const float scale = d * code_float(b.scales[j] & 15), min = dmin * code_float(b.scales[j] >> 4);
    const uint8_t* qs = b.qs + j / 8 * 32 + j % 2 * 16;
    const int shift = j % 8 / 2 * 2;
    for (int k = 0; k < 16; ++k) y[16 * j + k] = scale * code_float(qs[k] >> shift & 3) - min;
  }
}

inline void restore(const BlockQ3_K& b, float* y) {
  const float d = f16_to_f32(b.d);
  for (int j = 0; j < 16; ++j) {
    const int low = j < 8 ? b.scales[j] & 15 : b.scales[j - 8] >> 4;
    const int high = b.scales[8 + j % 4] >> (j / 4 * 2) & 3;
    const float scale = d * code_float((low | high << 4) - 32);
    const uint8_t *qs = b.qs + j / 8 * 32 + j % 2 * 16, *hm = b.hmask + j % 2 * 16;
    const int shift = j % 8 / 2 * 2, bit = j / 2;
    for (int k = 0; k < 16; ++k)
      y[16 * j + k] = scale * code_float(((qs[k] >> shift & 3) | (hm[k] >> bit & 1) << 2) - 4);
  }
}

inline void restore(const BlockQ4_K& b, float* y) {
  const float d = f16_to_f32(b.d), dmin = f16_to_f32(b.dmin);
  uint8_t sc[8], mn[8];
  unpack_scales_k4(b.scales, sc, mn);
  for (int j = 0; j < 8; ++j) {
    const float scale = d * code_float(sc[j]), min = dmin * code_float(mn[j]);
    const uint8_t* qs = b.qs + j / 2 * 32;
    const int shift = j % 2 * 4;
    for (int k = 0; k < 32; ++k) y[32 * j + k] = scale * code_float(qs[k] >> shift & 15) - min;
  }
}

inline void restore(const BlockQ5_K& b, float* y) {
  const float d = f16_to_f32(b.d), dmin = f16_to_f32(b.dmin);
  uint8_t sc[8], mn[8];
  unpack_scales_k4(b.scales, sc, mn);
  for (int j = 0; j < 8; ++j) {
    const float scale = d * code_float(sc[j]), min = dmin * code_float(mn[j]);
    const uint8_t* qs = b.qs + j / 2 * 32;
    const int shift = j % 2 * 4;
    for (int k = 0; k < 32; ++k)
      y[32 * j + k] = scale * code_float((qs[k] >> shift & 15) | (b.qh[k] >> j & 1) << 4) - min;
  }
}

inline void restore(const BlockQ6_K& b, float* y) {
  const float d = f16_to_f32(b.d);
  for (int j = 0; j < 16; ++j) {
    const float scale = d * code_float(b.scales[j]);
    const uint8_t *ql = b.ql + j / 8 * 64 + j % 4 * 16, *qh = b.qh + j / 8 * 32 + j % 2 * 16;
    const int low = j % 8 / 4 * 4, high = j % 8 / 2 * 2;
    for (int k = 0; k < 16; ++k)
      y[16 * j + k] = scale * code_float(((ql[k] >> low & 15) | (qh[k] >> high & 3) << 4) - 32);
  }
}

inline void restore(const BlockIQ4_XS& b, float* y) {
  const float d = f16_to_f32(b.d);
  for (int j = 0; j < 8; ++j) {
    const int low = b.scales_l[j / 2] >> (j % 2 * 4) & 15, high = b.scales_h >> (2 * j) & 3;
    const float scale = d * code_float((low | high << 4) - 32);
    const uint8_t* qs = b.qs + 16 * j;
    for (int k = 0; k < 16; ++k) y[32 * j + k] = scale * code_float(kIq4Values[qs[k] & 15]);
    for (int k = 0; k < 16; ++k) y[32 * j + 16 + k] = scale * code_float(kIq4Values[qs[k] >> 4]);
  }
}

template <class Block, int kBlock>
void restore_row(const void* src, size_t n, float* dst) {
  const auto* block = static_cast<const Block*>(src);
  for (size_t at = 0; at < n; at += kBlock) restore(*block++, dst + at);
}

inline void restore_bf16(const void* src, size_t n, float* dst) {
  const auto* p = static_cast<const uint8_t*>(src);
  for (size_t k = 0; k < n; ++k) {
    uint16_t h;
    memcpy(&h, p + 2 * k, 2);
    dst[k] = bf16_to_f32(h);
  }
}

inline void set_dequantisers(KernelTable* table) {
  const auto set = [&](Format format, DequantiseFn fn) { table->dequantise[static_cast<int>(format)] = fn; };
  set(Format::BF16, restore_bf16);
  set(Format::Q4_0, restore_row<BlockQ4_0, 32>);
  set(Format::Q4_1, restore_row<BlockQ4_1, 32>);
  set(Format::Q5_0, restore_row<BlockQ5_0, 32>);
  set(Format::Q5_1, restore_row<BlockQ5_1, 32>);
  set(Format::Q8_0, restore_row<BlockQ8_0, 32>);
  set(Format::IQ4_NL, restore_row<BlockIQ4_NL, 32>);
  set(Format::Q2_K, restore_row<BlockQ2_K, 256>);
  set(Format::Q3_K, restore_row<BlockQ3_K, 256>);
  set(Format::Q4_K, restore_row<BlockQ4_K, 256>);
  set(Format::Q5_K, restore_row<BlockQ5_K, 256>);
  set(Format::Q6_K, restore_row<BlockQ6_K, 256>);
  set(Format::IQ4_XS, restore_row<BlockIQ4_XS, 256>);
}

}  // namespace
}  // namespace pe
