#include "model/candidates.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <utility>

#include "base/error.h"

namespace pe {

namespace {

constexpr size_t kGroup = 64;  // logits whose maximum stands for them in the first pass

// An integer that orders as the float does: negative floats have their magnitude bits inverted. NaN lies outside
// key(-infinity) .. key(+infinity), on the side of its sign.
//   -inf 0x807fffff   -1 0xc07fffff   -0, 0 0x00000000   1 0x3f800000   inf 0x7f800000
int32_t key_of(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x + 0.0f);  // -0 + 0 is 0
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

void check_finite(int32_t lowest, int32_t highest) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  if (lowest < key_of(-inf) || highest >= key_of(inf))
    throw Error(Status::kNumeric, "bad_logits", "the logits contain NaN or infinity: the weights are damaged");
}

struct Keyed {
  int32_t key;
  int32_t id;
};
bool ahead(const Keyed& a, const Keyed& b) { return a.key != b.key ? a.key > b.key : a.id < b.id; }

}  // namespace

std::vector<Candidate> top_candidates(const float* logits, size_t n, size_t k) {
  // First pass: the largest key of each group, and whether every logit is finite.
  const size_t groups = (n + kGroup - 1) / kGroup;
  std::vector<int32_t> largest(groups);
  int32_t lowest = std::numeric_limits<int32_t>::max();
  for (size_t g = 0; g < groups; ++g) {
    const float* x = logits + g * kGroup;
    const size_t count = std::min(kGroup, n - g * kGroup);
    int32_t high = std::numeric_limits<int32_t>::min();
    for (size_t i = 0; i < count; ++i) {
      const int32_t key = key_of(x[i]);
      high = std::max(high, key);
      lowest = std::min(lowest, key);
    }
    largest[g] = high;
  }
  k = std::min(k, n);
  if (k == 0) return {};
  check_finite(lowest, *std::max_element(largest.begin(), largest.end()));

  // The k-th largest group maximum is reached by k logits, so none below it is among the k largest. Second pass: only
  // the groups that reach it.
  int32_t least = std::numeric_limits<int32_t>::min();
  if (k <= groups) {
    std::vector<int32_t> sorted(largest);
    std::nth_element(sorted.begin(), sorted.begin() + static_cast<ptrdiff_t>(k - 1), sorted.end(), std::greater<>());
    least = sorted[k - 1];
  }
  std::vector<Keyed> found;
  found.reserve(2 * k);
  for (size_t g = 0; g < groups; ++g) {
    if (largest[g] < least) continue;
    for (size_t i = g * kGroup, end = std::min(n, i + kGroup); i < end; ++i)
      if (const int32_t key = key_of(logits[i]); key >= least) found.push_back({key, static_cast<int32_t>(i)});
  }
  if (found.size() > k) {
    std::nth_element(found.begin(), found.begin() + static_cast<ptrdiff_t>(k), found.end(), ahead);
    found.resize(k);
  }
  std::sort(found.begin(), found.end(), [](const Keyed& a, const Keyed& b) { return a.id < b.id; });
  std::vector<Candidate> out(found.size());
  std::transform(found.begin(), found.end(), out.begin(),
                 [logits](const Keyed& f) { return Candidate{f.id, logits[f.id]}; });
  return out;
}

namespace {

constexpr double kInverseFactorial[] = {
    1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
    1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1.0,         1.0};

// e^r by Horner's rule, written out so that compilers keep several r in vector registers.
template <size_t... C>
double taylor(double r, std::index_sequence<C...>) {
  double sum = kInverseFactorial[0];
  ((sum = sum * r + kInverseFactorial[C + 1]), ...);
  return sum;
}

}  // namespace

// x = k ln 2 + r with |r| <= 0.35, Taylor to r^13 (truncation 5e-18), scaled by 2^k. Adding and subtracting 1.5 * 2^52
// rounds to the nearest integer, ties to even, and leaves it in the low bits of the sum.
void exp_of_nonpositive(const double* x, size_t n, double* y) {
  constexpr double kRound = 6755399441055744.0;
  constexpr double kLn2Hi = 6.93147180369123816490e-01, kLn2Lo = 1.90821492927058770002e-10;  // k * kLn2Hi is exact
  constexpr size_t kBlock = 128;
  for (size_t at = 0; at < n; at += kBlock) {
    const size_t count = std::min(kBlock, n - at);
    double bounded[kBlock];  // a loop of its own: compilers do not vectorize one with a maximum in it
    for (size_t i = 0; i < count; ++i) bounded[i] = std::max(x[at + i], -700.0);
    for (size_t i = 0; i < count; ++i) {
      const double shifted = bounded[i] * 1.4426950408889634 + kRound;
      const double k = shifted - kRound;
      const double r = (bounded[i] - k * kLn2Hi) - k * kLn2Lo;
      const uint64_t power = (std::bit_cast<uint64_t>(shifted) + 1023) << 52;  // k >= -1010: no result is denormal
      y[at + i] =
          taylor(r, std::make_index_sequence<std::size(kInverseFactorial) - 1>()) * std::bit_cast<double>(power);
    }
  }
}

double softmax_sum(const float* logits, size_t n, double peak, const int32_t* ids, const double* values,
                   size_t n_replaced) {
  constexpr size_t kBlock = 256;
  double total = 0.0;
  size_t next = 0;  // replacement
  for (size_t at = 0; at < n; at += kBlock) {
    const size_t count = std::min(kBlock, n - at);
    double block[kBlock];
    for (size_t i = 0; i < count; ++i) block[i] = static_cast<double>(logits[at + i]) - peak;
    for (; next < n_replaced && static_cast<size_t>(ids[next]) < at + count; ++next)
      block[static_cast<size_t>(ids[next]) - at] = values[next] - peak;
    double weights[kBlock];
    exp_of_nonpositive(block, count, weights);
    for (size_t i = 0; i < count; ++i)
      if (block[i] > -std::numeric_limits<double>::infinity()) total += weights[i];
  }
  return total;
}

}  // namespace pe
