// Compares the linear kernels of every tier with the scalar ones, bit for bit (any NaN equals any NaN).
//
//   kernel_check [--shapes N] [--seed S] [--tier NAME] [--format NAME]     exit status 1 on any difference
//   kernel_check --bench [--tier NAME] [--format NAME] [--threads N]       speed instead of equality
//
// Weights and activations end at an unmapped page, so that a read past the end is a crash. Weights are ordinary ones,
// random bytes (scales that are NaN, infinite, denormal), and blocks with every code at its extreme; activations are
// ordinary, +-127 in all the patterns that drive integer sums to their bounds, and blocks with NaN, infinity,
// denormals.
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/kernels.h"
#include "quant/fp16.h"
#include "speed.h"

namespace {

using namespace pe;
using Rng = std::mt19937_64;

size_t below(Rng& rng, size_t n) { return rng() % n; }
size_t between(Rng& rng, size_t low, size_t high) { return low + below(rng, high - low + 1); }

// `size` bytes whose last byte is followed by an unmapped page.
class Guarded {
 public:
  explicit Guarded(size_t size) : size_(size) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t whole = (size + page - 1) / page * page;
    mapped_ = whole + page;
    base_ = static_cast<uint8_t*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + whole, page, PROT_NONE) != 0) {
      std::perror("mmap");
      std::exit(2);
    }
    data_ = base_ + whole - size;
  }
  ~Guarded() { munmap(base_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* base_;
  uint8_t* data_;
  size_t size_, mapped_;
};

bool same(float a, float b) { return float_bits(a) == float_bits(b) || (a != a && b != b); }

// Where the fp16 scales of a block lie; -1: none.
struct ScalesAt {
  int first, second;
};
ScalesAt scales_at(Format format) {
  switch (format) {
    case Format::Q2_K: return {80, 82};
    case Format::Q3_K: return {108, -1};
    case Format::Q6_K: return {208, -1};
    case Format::TQ1_0: return {52, -1};
    case Format::TQ2_0: return {64, -1};
    case Format::Q4_1:
    case Format::Q5_1:
    case Format::Q4_K:
    case Format::Q5_K: return {0, 2};
    case Format::F32:
    case Format::F16:
    case Format::BF16:
    case Format::IQ1_M:  // set_scale
    case Format::MXFP4: return {-1, -1};
    default: return {0, -1};
  }
}

// Gives a block ordinary scales.
void set_scales(Rng& rng, Format format, std::normal_distribution<float>& normal, uint8_t* block) {
  const ScalesAt d = scales_at(format);
  for (const int offset : {d.first, d.second}) {
    const uint16_t h = f32_to_f16(0.01f * normal(rng));
    if (offset >= 0) std::memcpy(block + offset, &h, 2);
  }
  if (format == Format::MXFP4) block[0] = static_cast<uint8_t>(between(rng, 110, 130));
  if (format == Format::IQ1_M) {  // four bits in the top of each of four words
    const uint16_t h = f32_to_f16(0.01f * normal(rng));
    for (int i = 0; i < 4; ++i) {
      uint8_t& top = block[48 + 2 * i + 1];
      top = static_cast<uint8_t>((top & 15) | ((h >> (4 * i)) & 15) << 4);
    }
  }
}

size_t quantise(Tier tier, Format format, const std::vector<float>& row, const float* importance, uint8_t* dst) {
  return kernels_for(tier)->quantise[static_cast<int>(format)](row.data(), importance, row.size(), dst);
}

// ---- inputs ----

enum class Weights { kOrdinary, kHostile, kSane, kExtreme, kCount };

void fill_weights(Rng& rng, Weights kind, Format format, size_t cols, size_t stride, Guarded* w) {
  const FormatInfo& info = format_info(format);
  const size_t row_bytes = bytes_per_row(format, cols), rows = (w->size() - row_bytes) / stride + 1;
  std::normal_distribution<float> normal;
  std::vector<float> row(cols);
  static constexpr uint8_t kBytes[] = {0x00, 0xff, 0x0f, 0xf0, 0x80, 0x7f, 0x88};
  const uint8_t fixed = kBytes[below(rng, sizeof kBytes)];
  for (size_t i = 0; i < w->size(); ++i) {
    const bool flip = kind == Weights::kExtreme && fixed == 0x88;  // 0x00 and 0xff mixed at random
    w->data()[i] = kind != Weights::kExtreme ? static_cast<uint8_t>(rng()) : flip ? (rng() & 1 ? 0xff : 0) : fixed;
  }
  for (size_t r = 0; r < rows; ++r) {
    uint8_t* at = w->data() + r * stride;
    if (kind == Weights::kOrdinary && can_quantise(format)) {
      for (float& x : row) x = 0.02f * normal(rng);
      if (quantise(Tier::kScalar, format, row, nullptr, at) != cols) std::abort();
    } else if (kind != Weights::kHostile) {
      for (size_t b = 0; b < cols / info.block; ++b) set_scales(rng, format, normal, at + b * info.bytes);
    }
  }
}

float activation(Rng& rng, int pattern, size_t k, std::normal_distribution<float>& normal) {
  switch (pattern) {
    case 0: return 1;
    case 1: return -1;
    case 2: return k % 4 < 2 ? 1.0f : -1.0f;
    case 3: return k % 4 < 2 ? -1.0f : 1.0f;
    case 4: return k % 32 < 16 ? 1.0f : -1.0f;
    case 5: return rng() & 1 ? 1.0f : -1.0f;
    case 6: return 3e-39f * normal(rng);
    case 7: return 1e38f * normal(rng);
    case 8: return below(rng, 300) == 0 ? bits_float(static_cast<uint32_t>(rng())) : normal(rng);
    case 9: return 0;
    case 10: return -1.4e-45f;  // products that underflow to -0
    default: return normal(rng);
  }
}

struct Report {
  size_t checks = 0, failures = 0;
  void fail(const std::string& what) {
    if (++failures <= 20) std::printf("DIFFERENT %s\n", what.c_str());
  }
};

std::string name(Tier tier, Format format) { return std::string(tier_name(tier)) + " " + format_info(format).name; }

// ---- equality ----

void check_act(const KernelTable& want, const KernelTable& got, Act act, const std::vector<float>& x, uint8_t* row,
               const std::string& what, Report* report) {
  const ActLayout at = act_layout(act, x.size());
  std::vector<uint8_t> other(at.bytes + 64);
  uint8_t* mine = other.data() + (64 - reinterpret_cast<uintptr_t>(other.data()) % 64) % 64;
  std::memset(row, 0, at.bytes);
  want.quantise_act[static_cast<int>(act)](x.data(), x.size(), row);
  got.quantise_act[static_cast<int>(act)](x.data(), x.size(), mine);
  ++report->checks;
  const size_t block = act == Act::Q32 ? 32 : 256;
  bool equal = std::memcmp(row, mine, act == Act::F32 ? 4 * x.size() : x.size()) == 0;
  if (act != Act::F32) {
    equal = equal && std::memcmp(row + at.sum_at, mine + at.sum_at, 2 * (x.size() / 8)) == 0;
    equal = equal && std::memcmp(row + at.sum16_at, mine + at.sum16_at, 2 * (x.size() / 16)) == 0;
    equal = equal && std::memcmp(row + at.sum32_at, mine + at.sum32_at, 2 * (x.size() / 32)) == 0;
    for (size_t b = 0; b < x.size() / block; ++b) {
      const auto* a = reinterpret_cast<const float*>(row + at.scale_at);
      equal = equal && same(a[b], reinterpret_cast<const float*>(mine + at.scale_at)[b]);
    }
  }
  if (!equal) report->fail(what + " quantise_act");
}

void check_dequantise(const KernelTable& want, const KernelTable& got, Format format, const uint8_t* w, size_t cols,
                      const std::string& what, Report* report) {
  std::vector<float> a(cols), b(cols);
  want.dequantise[static_cast<int>(format)](w, cols, a.data());
  got.dequantise[static_cast<int>(format)](w, cols, b.data());
  ++report->checks;
  for (size_t k = 0; k < cols; ++k) {
    if (!same(a[k], b[k])) return report->fail(what + " dequantise, weight " + std::to_string(k));
  }
}

// A row as weights may be: ordinary, with outliers, tiny, of many magnitudes, constant, one-sided.
std::vector<float> row_to_quantise(Rng& rng, size_t cols) {
  std::normal_distribution<float> normal;
  std::vector<float> x(cols);
  const size_t pattern = below(rng, 10);
  const float size = std::exp2(static_cast<float>(below(rng, 60)) - 50);
  for (float& v : x) {
    const float n = normal(rng);
    v = pattern == 0   ? 1e-42f * n
        : pattern == 1 ? n * std::exp2(static_cast<float>(below(rng, 100)) - 90)
        : pattern == 2 ? size
        : pattern == 3 ? -size * std::fabs(n)
        : pattern == 4 ? below(rng, 20) == 0 ? 50 * size * n : size * n
        : pattern == 5 ? (below(rng, 3) ? 0.0f : size * n)
        : pattern == 6 ? (below(rng, 2) ? 0.0f : -0.0f)                       // the sign of a minimum of zero
        : pattern == 7 ? size * static_cast<float>(below(rng, 5)) - 2 * size  // equally large of both signs
                       : size * n;
  }
  return x;
}

// What a quantised row lost: the same bits on every tier, and close to the sums in double.
void check_loss(Tier tier, Format format, const std::vector<float>& x, const uint8_t* packed, const std::string& what,
                Report* report) {
  const KernelTable &want = *kernels_for(Tier::kScalar), &got = *kernels_for(tier);
  std::vector<float> y(x.size());
  want.dequantise[static_cast<int>(format)](packed, x.size(), y.data());
  float a[2], b[2];
  want.loss(x.data(), y.data(), x.size(), &a[0], &a[1]);
  got.loss(x.data(), y.data(), x.size(), &b[0], &b[1]);
  double error = 0, energy = 0;
  for (size_t k = 0; k < x.size(); ++k) {
    const double r = static_cast<double>(x[k]) - static_cast<double>(y[k]);
    error += r * r;
    energy += static_cast<double>(x[k]) * static_cast<double>(x[k]);
  }
  ++report->checks;
  const auto near = [](float v, double exact) {  // squares of tiny weights underflow
    return std::fabs(static_cast<double>(v) - exact) <= 1e-5 * exact + 1e-40;
  };
  if (!same(a[0], b[0]) || !same(a[1], b[1]) || !near(b[0], error) || !near(b[1], energy)) report->fail(what + " loss");
}

void check_quantise(Rng& rng, Tier tier, Format format, size_t cols, const std::string& what, Report* report) {
  const std::vector<float> x = row_to_quantise(rng, cols);
  std::vector<float> importance(cols);
  for (float& w : importance) w = std::exp(static_cast<float>(below(rng, 2000)) / 100 - 10);
  for (const float* w : {static_cast<const float*>(nullptr), static_cast<const float*>(importance.data())}) {
    std::vector<uint8_t> expected(bytes_per_row(format, cols)), actual(expected);
    const size_t want = quantise(Tier::kScalar, format, x, w, expected.data());
    const size_t got = quantise(tier, format, x, w, actual.data());
    ++report->checks;
    if (want != got || (want == cols && expected != actual))
      report->fail(what + (w ? " quantise, weighted" : " quantise"));
    if (want == cols) check_loss(tier, format, x, expected.data(), what, report);
  }
}

void check_shape(Rng& rng, Tier tier, Format format, size_t shape, Report* report) {
  const KernelTable& want = *kernels_for(Tier::kScalar);
  const KernelTable& got = *kernels_for(tier);
  const FormatInfo& info = format_info(format);
  const bool many = below(rng, 16) == 0;
  const bool tall = many && below(rng, 3) == 0;  // more rows than any kernel takes at once
  const size_t rows = tall ? between(rng, 120, 300) : between(rng, 1, many ? 20 : 40);
  // one token, and with some formats two to four, have kernels of their own
  const size_t own = below(rng, 3);
  const size_t tokens = own == 0   ? 1
                        : many     ? between(rng, 90, 210)
                        : own == 1 ? between(rng, 2, 4)
                                   : between(rng, 5, 20);
  const size_t blocks = info.block == 32 ? 12 : 4;
  const size_t cols = info.block == 1 ? between(rng, 1, 300) : info.block * between(rng, 1, tall ? blocks / 2 : blocks);
  const size_t stride = bytes_per_row(format, cols) + (below(rng, 4) == 0 ? between(rng, 1, 70) : 0);
  const Weights kind = static_cast<Weights>(shape % static_cast<size_t>(Weights::kCount));
  const std::string what = name(tier, format) + " rows " + std::to_string(rows) + " cols " + std::to_string(cols) +
                           " tokens " + std::to_string(tokens) + " weights " + std::to_string(static_cast<int>(kind));

  Guarded w((rows - 1) * stride + bytes_per_row(format, cols));
  fill_weights(rng, kind, format, cols, stride, &w);
  check_dequantise(want, got, format, w.data(), cols, what, report);
  if (can_quantise(format)) check_quantise(rng, tier, format, cols, what, report);

  const size_t x_stride = act_layout(info.act, cols).bytes;
  Guarded x(tokens * x_stride);
  std::normal_distribution<float> normal;
  std::vector<float> values(cols);
  for (size_t t = 0; t < tokens; ++t) {
    const int pattern = static_cast<int>(below(rng, 16));
    for (size_t k = 0; k < cols; ++k) values[k] = activation(rng, pattern, k, normal);
    check_act(want, got, info.act, values, x.data() + t * x_stride, what, report);
  }

  const size_t y_stride = rows + below(rng, 4);
  constexpr float kCanary = 12345;
  std::vector<float> expected(tokens * y_stride + 1, kCanary), actual(tokens * y_stride + 1, kCanary);
  LinearArgs args{w.data(), stride, rows, cols, x.data(), x_stride, tokens, expected.data(), y_stride};
  want.linear[static_cast<int>(format)](args);
  args.y = actual.data();
  got.linear[static_cast<int>(format)](args);
  ++report->checks;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (same(expected[i], actual[i])) continue;
    return report->fail(what + ": token " + std::to_string(i / y_stride) + " row " + std::to_string(i % y_stride) +
                        " is " + std::to_string(actual[i]) + ", scalar " + std::to_string(expected[i]));
  }
}

// ---- speed ----

void bench(Tier tier, Format format, size_t threads) {
  const KernelTable& kernels = *kernels_for(tier);
  const FormatInfo& info = format_info(format);
  const size_t cols = 4096, row_bytes = bytes_per_row(format, cols);
  const size_t big = std::max<size_t>(4096, (192u << 20) / row_bytes) / 64 * 64;  // far more than any cache
  std::vector<uint8_t> w(big * row_bytes);
  std::vector<float> row(cols);
  Rng rng(1);
  std::normal_distribution<float> normal;
  for (float& v : row) v = 0.02f * normal(rng);
  if (can_quantise(format)) {
    quantise(Tier::kScalar, format, row, nullptr, w.data());
  } else {
    for (size_t i = 0; i < row_bytes; ++i) w[i] = static_cast<uint8_t>(rng());
    for (size_t b = 0; b < cols / info.block; ++b) set_scales(rng, format, normal, w.data() + b * info.bytes);
  }
  for (size_t r = 1; r < big; ++r) std::memcpy(w.data() + r * row_bytes, w.data(), row_bytes);
  const double hz = clock_rate();
  for (const size_t tokens : {1, 2, 3, 4, 8, 16, 64, 256, 512}) {
    const size_t rows = tokens <= 8 ? big : tier == Tier::kScalar ? 64 : 4096;
    const size_t stride = act_layout(info.act, cols).bytes;
    Guarded x(tokens * stride);
    for (size_t t = 0; t < tokens; ++t) {
      for (float& v : row) v = normal(rng);
      kernels.quantise_act[static_cast<int>(info.act)](row.data(), cols, x.data() + t * stride);
    }
    std::vector<float> y(tokens * rows);
    const size_t share = rows / threads;
    const double time = best_time(threads, [&](size_t i) {
      // as many rows a call as the engine hands out
      for (size_t r = i * share; r < (i + 1) * share; r += kernels.linear_rows) {
        const size_t n = std::min(kernels.linear_rows, (i + 1) * share - r);
        kernels.linear[static_cast<int>(format)](
            {w.data() + r * row_bytes, row_bytes, n, cols, x.data(), stride, tokens, y.data() + r, rows});
      }
    });
    const double macs = static_cast<double>(rows) * static_cast<double>(cols) * static_cast<double>(tokens);
    std::printf("%-12s %4zu tokens  %8.2f GB/s  %8.2f GMAC/s  %6.2f MAC/cycle/core\n", name(tier, format).c_str(),
                tokens, static_cast<double>(rows * row_bytes) / time * 1e-9, macs / time * 1e-9,
                macs / time / hz / static_cast<double>(threads));
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  size_t shapes = 200, seed = 1, threads = 1;
  std::string only_tier, only_format;
  bool benchmark = false;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--bench") {
      benchmark = true;
      continue;
    }
    const char* value = i + 1 < argc ? argv[++i] : "";
    if (arg == "--shapes") {
      shapes = std::strtoull(value, nullptr, 10);
    } else if (arg == "--seed") {
      seed = std::strtoull(value, nullptr, 10);
    } else if (arg == "--threads") {
      threads = std::max<size_t>(1, std::strtoull(value, nullptr, 10));
    } else if (arg == "--tier") {
      only_tier = value;
    } else if (arg == "--format") {
      only_format = value;
    } else {
      std::fprintf(stderr, "unknown option %s\n", arg.c_str());
      return 2;
    }
  }
  if (benchmark) std::printf("clock %.2f GHz, read stream %.2f GB/s\n", clock_rate() * 1e-9, read_stream(threads));
  Report report;
  size_t pairs = 0;
  for (int t = benchmark ? 0 : 1; t < kTiers; ++t) {
    const Tier tier = static_cast<Tier>(t);
    if (!tier_available(tier) || (!only_tier.empty() && only_tier != tier_name(tier))) continue;
    for (int f = 0; f < kFormats; ++f) {
      const Format format = static_cast<Format>(f);
      if (!only_format.empty() && only_format != format_info(format).name) continue;
      ++pairs;
      Rng rng(seed * 1000003 + static_cast<size_t>(t * kFormats + f));
      if (benchmark) bench(tier, format, threads);
      for (size_t i = 0; i < shapes && !benchmark; ++i) check_shape(rng, tier, format, i, &report);
    }
  }
  if (!benchmark) {
    std::printf("%zu tier-format pairs, %zu shapes each\n", pairs, shapes);
    std::printf("kernel_check: %zu checks, %zu failures\n", report.checks, report.failures);
  }
  return report.failures == 0 ? 0 : 1;
}
