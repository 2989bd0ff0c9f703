// Linear for IQ4_NL and IQ4_XS: nibbles that index a table of 16 int8 levels. tile.h explains the shape of the loops; with
// many tokens the panel holds levels as int16, those of IQ4_XS times their scale (within +-4064).
#include "kernels/avx2/tile.h"
#include "kernels/tiers.h"

namespace pe {
namespace {

inline __m256i levels() { return broadcast128(kIq4Values); }

// The 32 levels at byte `at` of 8 rows times scale: per row a pair of int16.
template <bool kScaled>
inline void decode32(const uint8_t* const row[8], size_t at, int half, __m256i scale, Wide* wide) {
  __m256i v[4];
  transpose16(row, at, v);
  for (int s = 0; s < 4; ++s) {
    for (int part = 0; part < 2; ++part) {
      const __m256i level = _mm256_shuffle_epi8(levels(), part == 0 ? low_nibbles(v[s]) : high_nibbles(v[s]));
      __m256i even = even_bytes(level), odd = odd_bytes(level);
      if constexpr (kScaled) {
        even = _mm256_mullo_epi16(even, scale);
        odd = _mm256_mullo_epi16(odd, scale);
      }
      store(wide->codes[8 * part + 2 * s] + 16 * half, even);
      store(wide->codes[8 * part + 2 * s + 1] + 16 * half, odd);
    }
  }
}

// One token: 32 codes of rows r and r + 4 (16 bytes each) times q0 (codes 0-15) and q1 (16-31) times scale.
inline __m256i dot32(__m256i packed, __m256i q0, __m256i q1, __m256i scale) {
  const __m256i first = _mm256_shuffle_epi8(levels(), low_nibbles(packed));
  const __m256i second = _mm256_shuffle_epi8(levels(), high_nibbles(packed));
  // |level| <= 127, |q| <= 127: a pair is at most 32258
  const __m256i a = _mm256_maddubs_epi16(_mm256_abs_epi8(first), _mm256_sign_epi8(q0, first));
  const __m256i b = _mm256_maddubs_epi16(_mm256_abs_epi8(second), _mm256_sign_epi8(q1, second));
  return _mm256_add_epi32(_mm256_madd_epi16(a, scale), _mm256_madd_epi16(b, scale));
}

struct IQ4_NL {
  using Block = BlockIQ4_NL;
  static constexpr size_t kBlock = 32;
  struct Panel {
    Wide levels[8];
    __m256 d[8][2];  // [block][rows 0-7, 8-15]
  };
  using Side = WideSide;
  static constexpr size_t kPanels = 2;
  static constexpr size_t kTile = 3;
  static constexpr bool kFetches = false;

  static void decode(const uint8_t* const rows[16], size_t first, size_t n, Panel* panel) {
    for (size_t b = 0; b < n; ++b) {
      const size_t at = (first + b) * sizeof(Block);
      for (int half = 0; half < 2; ++half) {
        decode32<false>(rows + 8 * half, at + offsetof(Block, qs), half, levels(), &panel->levels[b]);
        panel->d[b][half] = load_f16(rows + 8 * half, at);
      }
    }
  }

  static void prepare(const Token& x, size_t n, Side* side) { prepare_wide(x.q, n, side); }

  template <int kTokens>
  PE_NOINLINE static void multiply(const Panel& panel, const Slice<IQ4_NL, kTokens>& x, size_t n, float* acc,
                                   size_t stride) {
    for (size_t b = 0; b < n; ++b) {
      __m256i sum[kTokens][2];
      for (int t = 0; t < kTokens; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
      chain_wide<kTokens>(panel.levels[b], x.side, b, sum);
      add_block(panel.d[b], x.scale, b, sum, acc, stride);
    }
  }

  static __m256 dot8(const uint8_t* const rows[8], const Token& x, size_t blocks, const uint8_t* ahead) {
    __m256 acc = _mm256_setzero_ps();
    for (size_t b = 0; b < blocks; ++b) {
      const size_t at = b * sizeof(Block);
      prefetch(ahead + 8 * at, 8 * sizeof(Block));
      const __m256i q0 = broadcast128(x.q + 32 * b), q1 = broadcast128(x.q + 32 * b + 16);
      __m256i v[4];
      for (int r = 0; r < 4; ++r) {
        v[r] = dot32(two_rows(rows, r, at + offsetof(Block, qs)), q0, q1, _mm256_set1_epi16(1));
      }
      acc = add_term(acc, load_f16(rows, at), _mm256_set1_ps(x.scale[b]), fold4(v));
    }
    return acc;
  }
};

struct IQ4_XS {
  using Block = BlockIQ4_XS;
  static constexpr size_t kBlock = 256;
  struct Panel {
    Wide levels[8];  // times the scale of their sub-block
    __m256 d[2];
  };
  using Side = WideSide;
  static constexpr size_t kPanels = 2;
  static constexpr size_t kTile = 3;
  static constexpr bool kFetches = false;

  // Scales less 32, [sub-block]: per row (sc, sc). A block begins with dwords (d, scales_h), scales_l.
  static void scales(const uint8_t* const row[8], size_t at, __m256i out[8]) {
    __m256i v[4];
    transpose16(row, at, v);
    for (int j = 0; j < 8; ++j) {
      const __m256i low = _mm256_and_si256(_mm256_srli_epi32(v[1], 4 * j), _mm256_set1_epi32(15));
      const __m256i high = _mm256_and_si256(_mm256_srli_epi32(v[0], 16 + 2 * j), _mm256_set1_epi32(3));
      const __m256i sc = _mm256_sub_epi32(_mm256_or_si256(low, _mm256_slli_epi32(high, 4)), _mm256_set1_epi32(32));
      out[j] = _mm256_blend_epi16(sc, _mm256_slli_epi32(sc, 16), 0xaa);
    }
  }

  static void decode(const uint8_t* const rows[16], size_t first, size_t, Panel* panel) {
    const size_t at = first * sizeof(Block);
    for (int half = 0; half < 2; ++half) {
      const uint8_t* const* row = rows + 8 * half;
      __m256i scale[8];
      scales(row, at, scale);
      for (int j = 0; j < 8; ++j) {
        decode32<true>(row, at + offsetof(Block, qs) + 16 * static_cast<size_t>(j), half, scale[j], &panel->levels[j]);
      }
      panel->d[half] = load_f16(row, at);
    }
  }

  static void prepare(const Token& x, size_t, Side* side) { prepare_wide(x.q, 8, side); }

  template <int kTokens>
  PE_NOINLINE static void multiply(const Panel& panel, const Slice<IQ4_XS, kTokens>& x, size_t, float* acc,
                                   size_t stride) {
    __m256i whole[kTokens][2];
    for (int t = 0; t < kTokens; ++t) whole[t][0] = whole[t][1] = _mm256_setzero_si256();
    for (size_t j = 0; j < 8; ++j) {
      __m256i sum[kTokens][2];
      for (int t = 0; t < kTokens; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
      chain_wide<kTokens>(panel.levels[j], x.side, j, sum);
      for (int t = 0; t < kTokens; ++t) {
        for (int h = 0; h < 2; ++h) whole[t][h] = _mm256_add_epi32(whole[t][h], sum[t][h]);
      }
    }
    add_block(panel.d, x.scale, 0, whole, acc, stride);
  }

  // Rows kR and kR + 4 against q (from the block on): four int32 each.
  template <int kR>
  static __m256i dot_rows(const uint8_t* const rows[8], size_t at, const int8_t* q, const __m256i scale[8]) {
    __m256i whole = _mm256_setzero_si256();
    for (int j = 0; j < 8; ++j) {
      const __m256i packed = two_rows(rows, kR, at + offsetof(Block, qs) + 16 * static_cast<size_t>(j));
      whole = _mm256_add_epi32(whole, dot32(packed, broadcast128(q + 32 * j), broadcast128(q + 32 * j + 16),
                                            _mm256_shuffle_epi32(scale[j], 0x55 * kR)));
    }
    return whole;
  }

  static __m256 dot8(const uint8_t* const rows[8], const Token& x, size_t blocks, const uint8_t* ahead) {
    __m256 acc = _mm256_setzero_ps();
    for (size_t b = 0; b < blocks; ++b) {
      const size_t at = b * sizeof(Block);
      prefetch(ahead + 8 * at, 8 * sizeof(Block));
      __m256i scale[8];
      scales(rows, at, scale);
      const int8_t* q = x.q + 256 * b;
      const __m256i v[4] = {dot_rows<0>(rows, at, q, scale), dot_rows<1>(rows, at, q, scale),
                            dot_rows<2>(rows, at, q, scale), dot_rows<3>(rows, at, q, scale)};
      acc = add_term(acc, load_f16(rows, at), _mm256_set1_ps(x.scale[b]), fold4(v));
    }
    return acc;
  }
};

}  // namespace

void avx2_linear_iq4(KernelTable* table) {
  table->linear[static_cast<int>(Format::IQ4_NL)] = linear<IQ4_NL>;
  table->linear[static_cast<int>(Format::IQ4_XS)] = linear<IQ4_XS>;
}

}  // namespace pe
