// Half-precision and bfloat16 as bits, exact on every machine: no hardware conversion, no dependence on the
// floating-point environment. Widening is exact; narrowing rounds to nearest, ties to even, and overflows to infinity.
// NaN: stays a NaN with its sign, becomes quiet, and keeps the payload bits that fit. Callers compare NaNs as equal.
#pragma once

#include <stdint.h>
#include <string.h>

namespace pe {

static inline uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

static inline float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

// True for everything but NaN and infinities.
static inline bool is_finite(float x) { return (float_bits(x) & 0x7f800000u) != 0x7f800000u; }

static inline float bf16_to_f32(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

static inline uint16_t f32_to_bf16(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline float f16_to_f32(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31;
  const uint32_t fraction = h & 0x3ff;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | (fraction << 13) | (fraction ? 0x400000u : 0));
  if (exponent != 0) return bits_float(sign | ((exponent + 112) << 23) | (fraction << 13));
  // Zero or denormal: fraction * 2^-24. 2^-1 + fraction * 2^-24 has the fraction as its low bits, exactly.
  return bits_float(sign | float_bits(bits_float(0x3f000000u | fraction) - 0.5f));
}

static inline uint16_t f32_to_f16(float x) {
  const uint32_t u = float_bits(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00 | ((a >> 13) & 0x3ff));
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above: infinity
  if (a >= 0x38800000u) {  // normal: rebias the exponent by 112, round 13 bits away; a carry may raise the exponent
    return static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xfff + ((a >> 13) & 1)) >> 13));
  }
  if (a <= 0x33000000u) return sign;  // 2^-25 and below: zero (the tie goes to even)
  // Denormal: multiples of 2^-24. The significand m has 24 bits and weighs 2^(e - 150).
  const uint32_t m = (a & 0x7fffffu) | 0x800000u;
  const uint32_t shift = 126 - (a >> 23);  // 14 .. 24
  const uint32_t half = 1u << (shift - 1);
  return static_cast<uint16_t>(sign | ((m + half - 1 + ((m >> shift) & 1)) >> shift));
}

}  // namespace pe
