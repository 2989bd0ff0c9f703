// Linear for F32, F16, BF16 weights: dot16 of kernels.h, its 16 lanes in two registers per output.
#include <immintrin.h>
#include <string.h>

#include "kernels/tiers.h"

namespace pe {
namespace {

// Eight weights widened exactly.
struct F32 {
  static constexpr size_t kBytes = 4;
  static __m256 load(const uint8_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
};
struct F16 {
  static constexpr size_t kBytes = 2;
  static __m256 load(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
};
struct BF16 {
  static constexpr size_t kBytes = 2;
  static __m256 load(const uint8_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
};

// The halving tree 8, 4, 2, 1 over lanes 0-7 (low) and 8-15 (high).
float fold(__m256 low, __m256 high) {
  const __m256 v8 = _mm256_add_ps(low, high);
  const __m128 v4 = _mm_add_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps(v8, 1));
  const __m128 v2 = _mm_add_ps(v4, _mm_movehl_ps(v4, v4));
  return _mm_cvtss_f32(_mm_add_ss(v2, _mm_movehdup_ps(v2)));
}

// kRows x kTokens outputs. Lanes beyond a ragged tail keep their value: adding a zero product could turn -0 into +0.
template <class F, int kRows, int kTokens>
void tile(const uint8_t* const w[kRows], const float* const x[kTokens], size_t n, float* y, size_t y_stride) {
  __m256 acc[kRows][kTokens][2];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) acc[r][t][0] = acc[r][t][1] = _mm256_setzero_ps();
  }
  size_t k = 0;
  for (; k + 16 <= n; k += 16) {
    for (int h = 0; h < 2; ++h) {
      __m256 b[kTokens];
      for (int t = 0; t < kTokens; ++t) b[t] = _mm256_loadu_ps(x[t] + k + 8 * h);
      for (int r = 0; r < kRows; ++r) {
        const __m256 a = F::load(w[r] + (k + 8 * h) * F::kBytes);
        for (int t = 0; t < kTokens; ++t) acc[r][t][h] = _mm256_fmadd_ps(a, b[t], acc[r][t][h]);
      }
    }
  }
  if (k < n) {
    const int rest = static_cast<int>(n - k);
    const __m256i iota = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (int h = 0; h < 2; ++h) {
      const __m256 live = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(rest - 8 * h), iota));
      for (int r = 0; r < kRows; ++r) {
        uint8_t weights[16 * F::kBytes] = {};
        memcpy(weights, w[r] + k * F::kBytes, (n - k) * F::kBytes);
        const __m256 a = F::load(weights + 8 * h * F::kBytes);
        for (int t = 0; t < kTokens; ++t) {
          float values[16] = {};
          memcpy(values, x[t] + k, (n - k) * 4);
          const __m256 next = _mm256_fmadd_ps(a, _mm256_loadu_ps(values + 8 * h), acc[r][t][h]);
          acc[r][t][h] = _mm256_blendv_ps(acc[r][t][h], next, live);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) y[static_cast<size_t>(t) * y_stride + r] = fold(acc[r][t][0], acc[r][t][1]);
  }
}

template <class F, int kRows, int kTokens>
void rows_by_tokens(const LinearArgs& args, size_t row, size_t token) {
  const uint8_t* w[kRows];
  const float* x[kTokens];
  for (size_t r = 0; r < kRows; ++r) w[r] = static_cast<const uint8_t*>(args.w) + (row + r) * args.w_stride;
  for (size_t t = 0; t < kTokens; ++t) {
    x[t] = reinterpret_cast<const float*>(static_cast<const uint8_t*>(args.x) + (token + t) * args.x_stride);
  }
  tile<F, kRows, kTokens>(w, x, args.cols, args.y + token * args.y_stride + row, args.y_stride);
}

// Two rows by three tokens fill 12 registers with sums and need 5 loads for 6 fma; one token takes four rows. Tokens
// are taken in batches whose activations stay in the second-level cache while the rows pass by.
constexpr size_t kBatch = 24;

template <class F>
void linear(const LinearArgs& args) {
  if (args.tokens == 1) {
    size_t r = 0;
    for (; r + 4 <= args.rows; r += 4) rows_by_tokens<F, 4, 1>(args, r, 0);
    for (; r < args.rows; ++r) rows_by_tokens<F, 1, 1>(args, r, 0);
    return;
  }
  for (size_t first = 0; first < args.tokens; first += kBatch) {
    const size_t end = args.tokens - first < kBatch ? args.tokens : first + kBatch;
    for (size_t r = 0; r < args.rows; r += 2) {
      const bool pair = r + 2 <= args.rows;
      size_t t = first;
      for (; t + 3 <= end; t += 3) pair ? rows_by_tokens<F, 2, 3>(args, r, t) : rows_by_tokens<F, 1, 3>(args, r, t);
      for (; t < end; ++t) pair ? rows_by_tokens<F, 2, 1>(args, r, t) : rows_by_tokens<F, 1, 1>(args, r, t);
    }
  }
}

template <class F>
void widen(const void* src, size_t n, float* dst) {
  const uint8_t* w = static_cast<const uint8_t*>(src);
  size_t k = 0;
  for (; k + 8 <= n; k += 8) _mm256_storeu_ps(dst + k, F::load(w + k * F::kBytes));
  if (k < n) {
    uint8_t weights[8 * F::kBytes] = {};
    float values[8];
    memcpy(weights, w + k * F::kBytes, (n - k) * F::kBytes);
    _mm256_storeu_ps(values, F::load(weights));
    memcpy(dst + k, values, (n - k) * 4);
  }
}

template <class F>
void set(KernelTable* table, Format format) {
  table->linear[static_cast<int>(format)] = linear<F>;
  table->dequantise[static_cast<int>(format)] = widen<F>;
}

}  // namespace

void avx2_linear_float(KernelTable* table) {
  set<F32>(table, Format::F32);
  set<F16>(table, Format::F16);
  set<BF16>(table, Format::BF16);
}

}  // namespace pe
