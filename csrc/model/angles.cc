#include "model/angles.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <string>

#include "base/error.h"

// Every function here uses +, -, *, / on doubles and moves of bits. With contraction off these are the same operations
// everywhere; an fma or a libm call would make the table depend on the platform's C library.

namespace pe {
namespace {

constexpr double kRoundMagic = 0x1.8p52;  // adding it rounds to an integer, ties to even, |x| < 2^51
constexpr double kLn2 = 0x1.62e42fefa39efp-1;
constexpr double kPi = 0x1.921fb54442d18p+1;

// 1 / n!: one rounding each, for 18! < 2^53.
constexpr std::array<double, 19> kTaylor = [] {
  std::array<double, 19> c{};
  double factorial = 1;
  for (int n = 0; n < 19; ++n) c[n] = 1 / (factorial *= n == 0 ? 1 : n);
  return c;
}();

// -1022 .. 1023
double power_of_two(int64_t n) { return std::bit_cast<double>(static_cast<uint64_t>(n + 1023) << 52); }

// x = mantissa * 2^exponent, mantissa in [sqrt(1/2), sqrt(2)); x positive and normal.
struct Parts {
  double mantissa;
  int64_t exponent;
};

Parts split(double x) {
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  Parts parts{std::bit_cast<double>((bits & 0xfffffffffffff) | 0x3ff0000000000000),
              static_cast<int64_t>(bits >> 52) - 1023};
  if (parts.mantissa > 0x1.6a09e667f3bcdp+0) parts = {parts.mantissa / 2, parts.exponent + 1};
  return parts;
}

// ln m for m in [sqrt(1/2), sqrt(2)): 2 artanh(s) = 2 (s + s^3/3 + s^5/5 + ..), s = (m - 1) / (m + 1), |s| < 0.1716.
// Stops after s^25 / 25: what is left is below 1e-21.
double log_mantissa(double m) {
  const double s = (m - 1) / (m + 1);
  const double s2 = s * s;
  double sum = 1.0 / 25;
  for (int k = 23; k >= 1; k -= 2) sum = sum * s2 + 1.0 / k;
  return 2 * s * sum;
}

// e^r for |r| <= 0.35: the Taylor series up to r^14 / 14!; what is left is below 2e-19.
double exp_small(double r) {
  double sum = kTaylor[14];
  for (int n = 13; n >= 0; --n) sum = sum * r + kTaylor[n];
  return sum;
}

// base^(-numerator / denominator). The exponent of 2 is split before anything is rounded: with base = m 2^e,
//   numerator * log2(base) / denominator = whole + (rest + numerator * log2(m)) / denominator
// whole and rest from an integer division, so the rounding error stays near 3e-16 whatever the size of the result.
double negative_power(double base, uint64_t numerator, uint64_t denominator) {
  const Parts parts = split(base);
  const int64_t scaled = parts.exponent * static_cast<int64_t>(numerator);
  const int64_t whole = scaled / static_cast<int64_t>(denominator);
  const int64_t rest = scaled % static_cast<int64_t>(denominator);
  const double log2_m = log_mantissa(parts.mantissa) / kLn2;
  const double y =
      -(static_cast<double>(rest) + static_cast<double>(numerator) * log2_m) / static_cast<double>(denominator);
  const double n = (y + kRoundMagic) - kRoundMagic;
  const int64_t exponent = static_cast<int64_t>(n) - whole;  // |base| < 2^1024 and numerator < denominator: fits
  return exp_small((y - n) * kLn2) * power_of_two(std::max<int64_t>(exponent, -1022));
}

// pi / 2 in four parts, the first three of 24 bits: k * part is exact for k < 2^29.
constexpr double kHalfPi[4] = {0x1.921fb4p+0, 0x1.4442dp-24, 0x1.846988p-48, 0x1.8cc51701b839ap-72};

// sin r for |r| <= pi/4 + 2^-20: Taylor up to r^17 / 17!; what is left is below 1e-19.
double sin_small(double r) {
  const double r2 = r * r;
  double sum = kTaylor[17];
  for (int n = 15; n >= 1; n -= 2) sum = kTaylor[n] - sum * r2;
  return r * sum;
}

// cos r, the same range: Taylor up to r^18 / 18!; what is left is below 4e-21.
double cos_small(double r) {
  const double r2 = r * r;
  double sum = kTaylor[18];
  for (int n = 16; n >= 0; n -= 2) sum = kTaylor[n] - sum * r2;
  return sum;
}

[[noreturn]] void bad(const char* what, double value) {
  throw Error(Status::kFormat, "rope", std::string("rotary embedding: ") + what + ", found " + std::to_string(value),
              "rope");
}

bool positive_normal(double x) {
  return x >= std::numeric_limits<double>::min() && x <= std::numeric_limits<double>::max();
}

void check(const RopeSpec& spec) {
  if (spec.dims < 2 || spec.dims % 2 != 0 || spec.dims > (1 << 20)) {
    bad("the number of dimensions must be even, 2 to 1048576", static_cast<double>(spec.dims));
  }
  if (!positive_normal(spec.base)) bad("the base must be a positive finite number", spec.base);
  if (spec.scaling != RopeScaling::kNone && !positive_normal(spec.factor))
    bad("the scaling factor must be positive", spec.factor);
  if (spec.scaling == RopeScaling::kYarn) {
    if (spec.base == 1.0) bad("YaRN needs a base other than 1", spec.base);
    if (!positive_normal(spec.orig_ctx)) bad("YaRN needs the original context length", spec.orig_ctx);
    if (!positive_normal(spec.beta_fast)) bad("YaRN's beta_fast must be positive", spec.beta_fast);
    if (!positive_normal(spec.beta_slow)) bad("YaRN's beta_slow must be positive", spec.beta_slow);
  }
}

// YaRN (arXiv 2309.00071, as published configurations use it): pairs that turn more than beta_fast times over the
// original context keep their frequency, pairs that turn less than beta_slow times are interpolated, with a linear ramp
// between.
void yarn(const RopeSpec& spec, std::vector<double>& inv_freq) {
  const double dims = static_cast<double>(spec.dims);
  const auto pair_turning = [&](double turns) {
    return dims * natural_log(spec.orig_ctx / (turns * 2 * kPi)) / (2 * natural_log(spec.base));
  };
  const double low = std::max(std::floor(pair_turning(spec.beta_fast)), 0.0);
  const double high = std::min(std::ceil(pair_turning(spec.beta_slow)), dims - 1);
  const double width = std::max(0.001, high - low);
  for (size_t i = 0; i < inv_freq.size(); ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / width, 0.0, 1.0);
    inv_freq[i] = inv_freq[i] / spec.factor * ramp + inv_freq[i] * (1 - ramp);
  }
}

}  // namespace

double natural_log(double x) {
  const Parts parts = split(x);
  return static_cast<double>(parts.exponent) * kLn2 + log_mantissa(parts.mantissa);
}

SinCos sin_cos(double x) {
  if (!(x >= -0x1p29 && x <= 0x1p29)) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    return {nan, nan};
  }
  const double k = (x * (2 / kPi) + kRoundMagic) - kRoundMagic;
  double r = x;
  for (const double part : kHalfPi) r -= k * part;
  const double s = sin_small(r), c = cos_small(r);
  switch (static_cast<int64_t>(k) & 3) {
    case 0: return {s, c};
    case 1: return {c, -s};
    case 2: return {-s, -c};
    default: return {-c, s};
  }
}

double yarn_attn_scale(double factor) { return factor <= 1 ? 1.0 : 0.1 * natural_log(factor) + 1.0; }

std::vector<double> rope_inv_freq(const RopeSpec& spec) {
  check(spec);
  std::vector<double> inv_freq(spec.dims / 2);
  for (size_t i = 0; i < inv_freq.size(); ++i) inv_freq[i] = negative_power(spec.base, 2 * i, spec.dims);
  if (spec.scaling == RopeScaling::kYarn) yarn(spec, inv_freq);
  for (size_t i = 0; i < inv_freq.size(); ++i) {
    if (spec.scaling == RopeScaling::kLinear) inv_freq[i] /= spec.factor;
    if (spec.freq_factors) inv_freq[i] /= spec.freq_factors[i];
    if (!positive_normal(inv_freq[i])) bad("every frequency must be positive and finite", inv_freq[i]);
  }
  return inv_freq;
}

void rope_angles(std::span<const double> inv_freq, double attn_scale, uint64_t p0, size_t n, float* out) {
  for (size_t t = 0; t < n; ++t) {
    const double position = static_cast<double>(p0 + t);
    for (const double f : inv_freq) {
      const SinCos a = sin_cos(position * f);
      *out++ = static_cast<float>(a.cos * attn_scale);
      *out++ = static_cast<float>(a.sin * attn_scale);
    }
  }
}

}  // namespace pe
