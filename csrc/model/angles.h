// Rotary position embedding: frequencies and the table of cosines and sines, in double precision made of plain
// additions, multiplications and divisions only, so that every platform gets the same bits. No libm.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace pe {

enum class RopeScaling { kNone, kLinear, kYarn };

// How positions become angles. Everything is a count or a ratio, without unit.
struct RopeSpec {
  size_t dims = 0;        // rotated values of a head, even
  double base = 10000.0;  // "theta", > 0; not 1 with YaRN
  RopeScaling scaling = RopeScaling::kNone;
  double factor = 1.0;      // context extension, > 0; kLinear and kYarn
  double orig_ctx = 0.0;    // positions the model was trained on, > 0; kYarn
  double beta_fast = 32.0;  // kYarn: turns over orig_ctx from which a pair keeps its frequency
  double beta_slow = 1.0;   // kYarn: turns up to which a pair is fully interpolated
  double attn_scale = 1.0;  // multiplies cos and sin (YaRN's effective attention scale)
  // [dims / 2], frequency i is divided by factor i (rope_freqs.weight); may be null
  const float* freq_factors = nullptr;
};

// [dims / 2] radians per position: base^(-2i / dims), relative error < 1e-14, then scaled as the spec says.
// Throws Error kFormat "rope" when a parameter is out of range or a frequency is not finite and positive.
std::vector<double> rope_inv_freq(const RopeSpec& spec);

// YaRN's attention scale for a context extension: 0.1 ln(factor) + 1, and 1 when factor <= 1.
double yarn_attn_scale(double factor);

// out[n][dims / 2][2] = cos, sin of (position * inv_freq[i]), times attn_scale, for positions p0 .. p0 + n - 1. The
// product, the cosine and the scale are taken in double and rounded to float once.
void rope_angles(std::span<const double> inv_freq, double attn_scale, uint64_t p0, size_t n, float* out);

// Sine and cosine of x radians. |x| <= 2^29: error < 1e-15; beyond, or not a number: both NaN.
struct SinCos {
  double sin, cos;
};
SinCos sin_cos(double x);

// Natural logarithm of a positive normal number, relative error < 1e-15 except near 1, where the absolute error is <
// 1e-15.
double natural_log(double x);

}  // namespace pe
