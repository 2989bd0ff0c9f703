// Quantising activation rows (contract: kernels.h, specification: scalar/linear.cc).
#include <immintrin.h>

#include "kernels/tiers.h"
#include "quant/fp16.h"

namespace pe {
namespace {

// The largest of eight lanes.
float max8(__m256 v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

// Rounds 32 floats times inv to int8. |x * inv| < 127.5, so nothing needs limiting: inv is at most half an ulp above
// 127 / amax.
__m256i round32(const float* x, __m256 inv) {
  __m256i v[4];
  for (int i = 0; i < 4; ++i) v[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inv));
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// The two sums of each of the two 16-groups: int16 x 4.
uint64_t lane_sums(__m256i q) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);  // lane 2 i: j mod 4 in {0, 1}; 2 i + 1: {2, 3}
  const __m256i halves = _mm256_add_epi16(pairs, _mm256_srli_si256(pairs, 8));
  const __m256i sums = _mm256_add_epi16(halves, _mm256_srli_si256(halves, 4));
  const uint64_t low = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_castsi256_si128(sums)));
  const uint64_t high = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_extracti128_si256(sums, 1)));
  return low | high << 32;
}

template <size_t kBlock>
void quantise_act(const float* x, size_t n, void* row) {
  const ActLayout at = act_layout(kBlock == 32 ? Act::Q32 : Act::Q256, n);
  int8_t* q = static_cast<int8_t*>(row);
  float* scale = reinterpret_cast<float*>(q + at.scale_at);
  uint8_t* sum = reinterpret_cast<uint8_t*>(q + at.sum_at);
  uint8_t* sum16 = reinterpret_cast<uint8_t*>(q + at.sum16_at);
  uint8_t* sum32 = reinterpret_cast<uint8_t*>(q + at.sum32_at);
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  for (size_t b = 0; b < n / kBlock; ++b) {
    const float* from = x + b * kBlock;
    // As integers magnitudes order like floats, with NaN above infinity: one maximum finds both.
    __m256i top = _mm256_setzero_si256();
    for (size_t k = 0; k < kBlock; k += 8) {
      const __m256 a = _mm256_and_ps(_mm256_loadu_ps(from + k), magnitude);
      top = _mm256_max_epi32(top, _mm256_castps_si256(a));
    }
    const bool finite =
        _mm256_testz_si256(_mm256_cmpgt_epi32(top, _mm256_set1_epi32(0x7f7fffff)), _mm256_set1_epi32(-1));
    const float amax = finite ? max8(_mm256_castsi256_ps(top)) : 0;
    const float inv = 127 / amax;
    if (!is_finite(inv)) {
      scale[b] = finite ? 0 : bits_float(0x7fc00000);
      memset(q + b * kBlock, 0, kBlock);
      memset(sum + b * kBlock / 4, 0, kBlock / 4);
      memset(sum16 + b * kBlock / 8, 0, kBlock / 8);
      memset(sum32 + b * kBlock / 16, 0, kBlock / 16);
      continue;
    }
    scale[b] = amax / 127;
    for (size_t k = 0; k < kBlock; k += 32) {
      const __m256i v = round32(from + k, _mm256_set1_ps(inv));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + b * kBlock + k), v);
      const uint64_t sums = lane_sums(v);
      memcpy(sum + (b * kBlock + k) / 4, &sums, 8);
      const auto first = static_cast<int16_t>(static_cast<int16_t>(sums) + static_cast<int16_t>(sums >> 16));
      const auto second = static_cast<int16_t>(static_cast<int16_t>(sums >> 32) + static_cast<int16_t>(sums >> 48));
      const auto both = static_cast<int16_t>(first + second);
      memcpy(sum16 + (b * kBlock + k) / 8, &first, 2);
      memcpy(sum16 + (b * kBlock + k) / 8 + 2, &second, 2);
      memcpy(sum32 + (b * kBlock + k) / 16, &both, 2);
    }
  }
}

}  // namespace

void avx2_linear_act(KernelTable* table) {
  table->quantise_act[static_cast<int>(Act::Q32)] = quantise_act<32>;
  table->quantise_act[static_cast<int>(Act::Q256)] = quantise_act<256>;
}

}  // namespace pe
