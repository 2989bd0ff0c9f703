// Checks the operations around the linear layers: every tier against the scalar specification bit for bit, the scalar
// ones against long double arithmetic, the rope angles, and the floating-point environment. Prints a summary; exit
// status 1 on failure. Buffers end at an unmapped page, so that a read or write past the end ends the program.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/fp_env.h"
#include "bits.h"
#include "kernels/kernels.h"
#include "model/angles.h"
#include "runtime/thread_pool.h"

namespace {

using namespace pe;

const size_t kSizes[] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  11, 13, 15,  16,  17,  20,  23,  24,  25,  30,   31,
                         32, 33, 39, 40, 47, 48, 49, 63, 64, 65, 80, 127, 128, 129, 255, 256, 257, 999, 1536, 4096};

// ---- one function per kernel: the same inputs through any table ----

struct Inputs {  // element-wise operands and their results
  std::vector<float> a, b;
};

std::vector<float> run_rms_norm(const KernelTable& k, const Inputs& in, bool in_place) {
  Guarded<float> x(in.a.size()), w(in.b.size(), 0), y(in.a.size());
  x.set(in.a), w.set(in.b);
  float* out = in_place ? x.get() : y.get();
  k.rms_norm(x.get(), w.get(), in.a.size(), 1e-5f, out);
  return (in_place ? x : y).copy();
}

std::vector<float> run_binary(void (*f)(const float*, const float*, size_t, float*), const Inputs& in, int alias) {
  Guarded<float> a(in.a.size()), b(in.b.size()), y(in.a.size());
  a.set(in.a), b.set(in.b);
  Guarded<float>& out = alias == 0 ? y : alias == 1 ? a : b;
  f(a.get(), b.get(), in.a.size(), out.get());
  return out.copy();
}

std::vector<float> run_exp(const KernelTable& k, const std::vector<float>& in) {
  Guarded<float> x(in.size()), y(in.size());
  x.set(in);
  k.exp(x.get(), in.size(), y.get());
  return y.copy();
}

template <class T>
std::vector<T> run_store(const KernelTable& k, Kv type, const std::vector<float>& in) {
  Guarded<float> x(in.size());
  Guarded<T> y(in.size());
  x.set(in);
  k.store_kv[static_cast<int>(type)](x.get(), in.size(), y.get());
  return y.copy();
}

std::vector<uint8_t> run_store_q8_0(const KernelTable& k, const std::vector<float>& in) {
  Guarded<float> x(in.size());
  Guarded<uint8_t> y(kv_row_bytes(Kv::Q8_0, in.size()));
  x.set(in);
  k.store_kv[static_cast<int>(Kv::Q8_0)](x.get(), in.size(), y.get());
  return y.copy();
}

int run_all_finite(const KernelTable& k, const std::vector<float>& in) {
  Guarded<float> x(in.size());
  x.set(in);
  return k.all_finite(x.get(), in.size());
}

struct RopeCase {
  size_t heads, stride, dims;
  bool adjacent;
  std::vector<float> x, cs;  // [heads * stride], [dims]
};

std::vector<float> run_rope(const KernelTable& k, const RopeCase& c) {
  Guarded<float> x(c.x.size()), cs(c.cs.size());
  x.set(c.x), cs.set(c.cs);
  k.rope({x.get(), c.heads, c.stride, c.dims, cs.get(), c.adjacent});
  return x.copy();
}

// ---- every tier equals the scalar one ----

void check_elementwise(const KernelTable& scalar, const KernelTable& tier, const std::string& name) {
  for (const size_t n : kSizes) {
    for (const Values values : kAllValues) {
      const Inputs in{floats(n, values), floats(n, values)};
      const std::string at =
          " " + name + " n=" + std::to_string(n) + " values=" + std::to_string(static_cast<int>(values));
      for (int alias = 0; alias < 3; ++alias) {
        check(same(run_binary(scalar.add, in, alias), run_binary(tier.add, in, alias)), "add" + at);
        check(same(run_binary(scalar.silu_mul, in, alias), run_binary(tier.silu_mul, in, alias)), "silu_mul" + at);
      }
      for (const bool in_place : {false, true}) {
        check(same(run_rms_norm(scalar, in, in_place), run_rms_norm(tier, in, in_place)), "rms_norm" + at);
      }
      check(same(run_exp(scalar, in.a), run_exp(tier, in.a)), "exp" + at);
      check(same(run_store<uint16_t>(scalar, Kv::F16, in.a), run_store<uint16_t>(tier, Kv::F16, in.a)),
            "store_kv F16" + at);
      check(same(run_store<float>(scalar, Kv::F32, in.a), in.a), "store_kv F32" + at);
      if (n % 32 == 0) check(run_store_q8_0(scalar, in.a) == run_store_q8_0(tier, in.a), "store_kv Q8_0" + at);
      check(same(run_store<float>(tier, Kv::F32, in.a), in.a), "store_kv F32" + at);
    }
    // all_finite: one special value at any place must be seen
    std::vector<float> x = floats(n, Values::kWide);
    check(run_all_finite(tier, x) == 1 && run_all_finite(scalar, x) == 1, "all_finite " + name);
    for (size_t i = 0; i < n; i += 1 + n / 40) {
      for (const float odd : {INFINITY, -INFINITY, NAN, -NAN}) {
        std::vector<float> spoilt = x;
        spoilt[i] = odd;
        check(run_all_finite(tier, spoilt) == 0 && run_all_finite(scalar, spoilt) == 0, "all_finite sees " + name);
      }
    }
  }
}

void check_rope(const KernelTable& scalar, const KernelTable& tier, const std::string& name) {
  for (size_t dims : {2, 4, 6, 8, 10, 14, 16, 18, 30, 32, 34, 48, 64, 80, 96, 128, 160, 256}) {
    for (const Values values : kAllValues) {
      for (const bool adjacent : {false, true}) {
        RopeCase c{1 + below(4), dims + below(9), dims, adjacent, {}, floats(dims, values)};
        c.x = floats(c.heads * c.stride, values);
        const std::vector<float> expected = run_rope(scalar, c);
        check(same(expected, run_rope(tier, c)), "rope " + name + " dims=" + std::to_string(dims));
        for (size_t h = 0; h < c.heads; ++h) {
          for (size_t i = dims; i < c.stride; ++i) {
            check(same(expected[h * c.stride + i], c.x[h * c.stride + i]), "rope leaves values past dims");
          }
        }
      }
    }
  }
}

// ---- the specification against long double arithmetic ----

double worst_exp = 0;

void check_exp(const KernelTable& k, const std::string& name) {
  std::vector<float> x;
  for (uint32_t u = 0; u < 0xff800000u; u += 9973) x.push_back(bits_float(u));  // all exponents, both signs
  for (float f = -105; f < 89.5f; f += 0x1.3p-9f) x.push_back(f);
  for (const float edge : {0x1.62e42ep6f, -0x1.9fe368p6f, -87.336544f}) {
    float below_edge = edge, above_edge = edge;
    for (int i = 0; i < 200; ++i) {
      x.push_back(below_edge), x.push_back(above_edge);
      below_edge = std::nextafter(below_edge, -INFINITY), above_edge = std::nextafter(above_edge, INFINITY);
    }
  }
  const std::vector<float> y = run_exp(k, x);
  for (size_t i = 0; i < x.size(); ++i) {
    const long double exact = expl(static_cast<long double>(x[i]));
    if (x[i] != x[i]) {
      check(y[i] != y[i], "exp of NaN is NaN " + name);
    } else if (x[i] > 0x1.62e42ep6f) {
      check(y[i] == INFINITY, "exp overflows to infinity " + name);
    } else if (x[i] < -0x1.9fe368p6f) {
      check(float_bits(y[i]) == 0, "exp underflows to +0 " + name);
    } else {
      int e;
      frexpl(exact, &e);
      const double error = static_cast<double>(fabsl(y[i] - exact) / ldexpl(1, std::max(e, -125) - 24));
      worst_exp = std::max(worst_exp, error);
      check(error <= 1, "exp within 1 ulp at " + std::to_string(x[i]) + " " + name);
    }
  }
  const std::vector<float> special = run_exp(k, {0.0f, -0.0f, INFINITY, -INFINITY, NAN});
  check(special[0] == 1 && special[1] == 1 && special[2] == INFINITY && float_bits(special[3]) == 0 &&
            special[4] != special[4],
        "exp of the special values " + name);
}

void check_norm_and_silu(const KernelTable& k) {
  for (const size_t n : kSizes) {
    const Inputs in{floats(n, Values::kPlain), floats(n, Values::kPlain)};
    const std::vector<float> y = run_rms_norm(k, in, false), z = run_binary(k.silu_mul, in, 0);
    long double square = 0;
    for (const float x : in.a) square += static_cast<long double>(x) * x;
    const long double r = 1 / sqrtl(square / n + 1e-5L);
    for (size_t i = 0; i < n; ++i) {
      check(near(y[i], in.a[i] * r * in.b[i], 1e-6L * (fabsl(in.a[i] * r) + 1e-3L)), "rms_norm by long double");
      const long double g = in.a[i] * 20.0L;
      const float gate = static_cast<float>(g);
      float out;
      k.silu_mul(&gate, &in.b[i], 1, &out);
      check(near(out, gate / (1 + expl(-gate)) * in.b[i], 1e-6L * (fabsl(gate) + 1e-30L)), "silu_mul by long double");
      check(z[i] == z[i], "silu_mul of plain values");
    }
    // weights at an odd address, as a file may have them
    Guarded<uint8_t> bytes(4 * n, 1);
    std::memcpy(bytes.get(), in.b.data(), 4 * n);
    std::vector<float> odd(n);
    k.rms_norm(in.a.data(), reinterpret_cast<const float*>(bytes.get()), n, 1e-5f, odd.data());
    check(same(odd, y), "rms_norm with weights at an odd address");
  }
}

void check_rope_formula(const KernelTable& k) {
  for (const bool adjacent : {false, true}) {
    const size_t dims = 20;
    RopeCase c{2, 24, dims, adjacent, floats(48, Values::kPlain), floats(dims, Values::kPlain)};
    const std::vector<float> y = run_rope(k, c);
    for (size_t h = 0; h < c.heads; ++h) {
      for (size_t i = 0; i < dims / 2; ++i) {
        const size_t a = h * c.stride + (adjacent ? 2 * i : i), b = adjacent ? a + 1 : a + dims / 2;
        const long double cosine = c.cs[2 * i], sine = c.cs[2 * i + 1];
        check(near(y[a], c.x[a] * cosine - c.x[b] * sine, 2e-7L), "rope, first of a pair");
        check(near(y[b], c.x[a] * sine + c.x[b] * cosine, 2e-7L), "rope, second of a pair");
      }
    }
  }
}

// The cache's Q8_0 rows are those of the weights' quantiser; a block that is not finite is NaN as a whole.
void check_store_q8_0(const KernelTable& k) {
  for (const size_t n : {32, 64, 96, 128, 256}) {
    for (const Values values : kAllValues) {
      for (int round = 0; round < 20; ++round) {
        std::vector<float> x = floats(n, values);
        if (round == 0) std::fill(x.begin(), x.end(), below(2) ? 0.0f : -0.0f);
        if (round == 1) std::fill(x.begin(), x.end(), 0x1.8p-149f);
        for (size_t i = 0; i < n; i += 32) {
          const std::vector<float> block(x.begin() + static_cast<long>(i), x.begin() + static_cast<long>(i) + 32);
          const std::vector<uint8_t> got = run_store_q8_0(k, block);
          std::vector<uint8_t> expected(sizeof(BlockQ8_0));
          if (std::all_of(block.begin(), block.end(), is_finite)) {
            kernels_for(Tier::kScalar)
                ->quantise[static_cast<int>(Format::Q8_0)](block.data(), nullptr, 32, expected.data());
          } else {
            expected[0] = 0x00, expected[1] = 0x7e;
          }
          check(got == expected, "store_kv Q8_0 equals the quantiser");
        }
      }
    }
  }
}

// ---- rope angles ----

double worst_sincos = 0, worst_frequency = 0;

void check_sin_cos() {
  for (int i = 0; i < 300000; ++i) {
    const double x =
        i < 2000 ? (i - 1000) * 0x1.921fb54442d18p-1  // multiples of pi/4, the worst places
                 : std::ldexp(static_cast<double>(random_bits()) - 0x1p31, -31 - 20 + static_cast<int>(below(46)));
    const SinCos got = sin_cos(x);
    const double error =
        std::max(static_cast<double>(fabsl(got.sin - sinl(x))), static_cast<double>(fabsl(got.cos - cosl(x))));
    worst_sincos = std::max(worst_sincos, error);
    check(error < 1e-15, "sin_cos of " + std::to_string(x));
  }
  for (const double x : {0x1p29 * 1.0001, -1e300, static_cast<double>(INFINITY), static_cast<double>(NAN)}) {
    check(sin_cos(x).sin != sin_cos(x).sin && sin_cos(x).cos != sin_cos(x).cos, "sin_cos beyond its range is NaN");
  }
  for (int i = 0; i < 20000; ++i) {
    const double x = std::ldexp(1.0 + random_bits() * 0x1p-32, static_cast<int>(below(2000)) - 1000);
    const long double exact = logl(x);
    check(near(natural_log(x), exact, 1e-15L * std::max(1.0L, fabsl(exact))), "natural_log of " + std::to_string(x));
  }
}

long double yarn_by_long_double(const RopeSpec& spec, size_t i) {
  const long double base = spec.base, dims = static_cast<long double>(spec.dims), pi = acosl(-1.0L);
  const auto turn = [&](long double beta) { return dims * logl(spec.orig_ctx / (beta * 2 * pi)) / (2 * logl(base)); };
  const long double low = std::max(floorl(turn(spec.beta_fast)), 0.0L);
  const long double high = std::min(ceill(turn(spec.beta_slow)), dims - 1);
  const long double ramp = std::clamp((i - low) / std::max(0.001L, high - low), 0.0L, 1.0L);
  const long double plain = powl(base, -2.0L * i / dims);
  return plain / spec.factor * ramp + plain * (1 - ramp);
}

void check_frequencies() {
  const auto compare = [](long double got, long double exact, const char* what) {
    const double error = static_cast<double>(fabsl(got / exact - 1));
    worst_frequency = std::max(worst_frequency, error);
    check(error < 1e-14, what);
  };
  for (const size_t dims : {2, 64, 80, 96, 128, 160, 256}) {
    std::vector<float> factors(dims / 2);
    for (float& f : factors) f = 4.5f + 3.5f * uniform();
    for (const double base : {10000.0, 500000.0, 1e6, 1e7, 1.5, 1e-3, 8e18}) {
      RopeSpec plain;
      plain.dims = dims, plain.base = base;
      RopeSpec linear = plain, divided = plain, yarn = plain;
      linear.scaling = RopeScaling::kLinear, linear.factor = 4;
      divided.freq_factors = factors.data();
      yarn.scaling = RopeScaling::kYarn, yarn.factor = 4, yarn.orig_ctx = 32768;
      const std::vector<double> f[] = {rope_inv_freq(plain), rope_inv_freq(linear), rope_inv_freq(divided),
                                       rope_inv_freq(yarn)};
      for (size_t i = 0; i < dims / 2; ++i) {
        const long double exact = powl(base, -2.0L * i / dims);
        compare(f[0][i], exact, "frequency");
        compare(f[1][i], exact / 4, "frequency, linear scaling");
        compare(f[2][i], exact / factors[i], "frequency, divided by factors");
        compare(f[3][i], yarn_by_long_double(yarn, i), "frequency, YaRN");
      }
    }
  }
  // Qwen3 with YaRN 4.0 over 32768, theta 1e6, 128 dims. Ramp from 23 to 40: ln(32768 / 64 pi) * 128 / (2 ln 1e6) =
  // 23.6, ln(32768 / 2 pi) * 128 / (2 ln 1e6) = 39.6.
  RopeSpec qwen;
  qwen.dims = 128, qwen.base = 1e6, qwen.scaling = RopeScaling::kYarn, qwen.factor = 4, qwen.orig_ctx = 32768;
  const std::vector<double> f = rope_inv_freq(qwen);
  for (size_t i = 0; i < 64; ++i) {
    const double plain = std::pow(1e6, -2.0 * static_cast<double>(i) / 128), ratio = f[i] / plain;
    const double expected = i <= 23 ? 1.0 : i >= 40 ? 0.25 : 1.0 - 0.75 * (static_cast<double>(i) - 23) / 17;
    check(std::fabs(ratio - expected) < 1e-12, "YaRN ramp of Qwen3 at pair " + std::to_string(i));
  }
  check(std::fabs(yarn_attn_scale(4) - 1.1386294361119891) < 1e-15 && yarn_attn_scale(1) == 1 &&
            yarn_attn_scale(0.5) == 1,
        "yarn_attn_scale");
}

void check_angles() {
  RopeSpec spec;
  spec.dims = 128, spec.base = 500000;
  const std::vector<double> f = rope_inv_freq(spec);
  for (const uint64_t p0 : {0ull, 1ull, 255ull, 131071ull, 1ull << 20, (1ull << 24) - 3}) {
    const size_t n = 3;
    Guarded<float> out(n * spec.dims);
    rope_angles(f, 1.25, p0, n, out.get());
    for (size_t t = 0; t < n; ++t) {
      for (size_t i = 0; i < f.size(); ++i) {
        const long double angle = static_cast<double>(p0 + t) * f[i];
        const float* cs = out.get() + t * spec.dims + 2 * i;
        check(near(cs[0], cosl(angle) * 1.25L, 0x1p-24L * 1.01L), "rope_angles: cosine");
        check(near(cs[1], sinl(angle) * 1.25L, 0x1p-24L * 1.01L), "rope_angles: sine");
      }
    }
    std::vector<float> one(spec.dims);  // a row does not depend on the rows asked with it
    rope_angles(f, 1.25, p0 + 2, 1, one.data());
    check(std::memcmp(one.data(), out.get() + 2 * spec.dims, spec.dims * sizeof(float)) == 0,
          "rope_angles: rows alone");
  }
}

void check_bad_specs() {
  std::vector<float> factors(32, 1.0f);
  const auto refused = [&](auto spoil) {
    RopeSpec spec;
    spec.dims = 64, spec.orig_ctx = 4096, spec.freq_factors = factors.data();
    spoil(spec);
    try {
      rope_inv_freq(spec);
      return false;
    } catch (const Error& e) {
      return e.status == Status::kFormat && std::strcmp(e.code, "rope") == 0;
    }
  };
  check(!refused([](RopeSpec&) {}), "a good spec is taken");
  check(refused([](RopeSpec& s) { s.dims = 0; }), "dims 0");
  check(refused([](RopeSpec& s) { s.dims = 63; }), "odd dims");
  check(refused([](RopeSpec& s) { s.base = 0; }), "base 0");
  check(refused([](RopeSpec& s) { s.base = -1; }), "negative base");
  check(refused([](RopeSpec& s) { s.base = NAN; }), "base NaN");
  check(refused([](RopeSpec& s) { s.base = INFINITY; }), "infinite base");
  check(refused([](RopeSpec& s) { s.scaling = RopeScaling::kLinear, s.factor = 0; }), "factor 0");
  check(refused([](RopeSpec& s) { s.scaling = RopeScaling::kYarn, s.orig_ctx = 0; }), "YaRN without its context");
  check(refused([](RopeSpec& s) { s.scaling = RopeScaling::kYarn, s.base = 1; }), "YaRN with base 1");
  for (const float odd : {0.0f, -1.0f, NAN, INFINITY}) {
    factors[5] = odd;
    check(refused([](RopeSpec&) {}), "a factor that is not positive and finite");
  }
}

// ---- floating-point environment ----

// Puts the thread into an environment no kernel could keep its bits in: flush to zero and, where known, round toward
// zero.
void spoil_environment() {
#if defined(__x86_64__)
  _mm_setcsr(0x1f80 | 0x8000 | 0x0040 | 0x6000);
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(uint64_t{3} << 22 | uint64_t{1} << 24));
#endif
}

bool keeps_denormals_and_rounds_to_nearest() {
  volatile float tiny = 0x1p-126f, half = 0.5f, one = 1.0f, bit = 0x1.8p-24f;
  return float_bits(tiny * half) == float_bits(0x1p-127f) && one + bit == 0x1.000002p0f;
}

void check_environment() {
  const FpEnv restore_at_the_end;
  spoil_environment();
  check(!keeps_denormals_and_rounds_to_nearest(),
        "the spoilt environment is spoilt (or the check below proves nothing)");
  {
    const FpEnv environment;
    check(keeps_denormals_and_rounds_to_nearest(), "FpEnv sets the default environment");
  }
  check(!keeps_denormals_and_rounds_to_nearest(), "FpEnv restores the caller's");

  ThreadPool pool(3);  // started by a thread that flushes
  std::atomic<int> good{0};
  for (int i = 0; i < 50; ++i) {
    pool.run(3, [&](Team&) { good += keeps_denormals_and_rounds_to_nearest(); });
  }
  check(good == 150, "every thread of a run has the default environment");
  check(!keeps_denormals_and_rounds_to_nearest(), "run restores the caller's environment");
}

}  // namespace

int main() {
  const KernelTable& scalar = *kernels_for(Tier::kScalar);
  std::string tiers = tier_name(Tier::kScalar);
  check_exp(scalar, "scalar");
  check_norm_and_silu(scalar);
  check_rope_formula(scalar);
  check_store_q8_0(scalar);
  for (int i = 1; i < kTiers; ++i) {
    const KernelTable* tier = kernels_for(static_cast<Tier>(i));
    if (!tier) continue;
    const std::string name = tier_name(static_cast<Tier>(i));
    tiers += ", " + name;
    check_elementwise(scalar, *tier, name);
    check_rope(scalar, *tier, name);
    check_exp(*tier, name);
    check_norm_and_silu(*tier);
  }
  check_sin_cos();
  check_frequencies();
  check_angles();
  check_bad_specs();
  check_environment();
  std::printf("tiers: %s\n", tiers.c_str());
  std::printf("exp: %.3f ulp; sin, cos: %.2e; frequencies: %.2e relative\n", worst_exp, worst_sincos, worst_frequency);
  std::printf("ops_check: %ld checks, %ld failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
