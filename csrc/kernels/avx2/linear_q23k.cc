// Linear for Q2_K and Q3_K: 256 weights in sub-blocks of 16 with integer scales, float work once per block.
// tile.h explains the shape of the loops.
#include "kernels/avx2/tile.h"
#include "kernels/tiers.h"

namespace pe {
namespace {

// Bits 2 s, 2 s + 1 of every byte. They are the low bits of a code: those of qs[16 p + i] of code i of sub-block(p, s).
inline __m256i crumb(__m256i v, int s) { return _mm256_and_si256(_mm256_srli_epi16(v, 2 * s), _mm256_set1_epi8(3)); }
constexpr int sub_block(int p, int s) { return 8 * (p / 2) + 2 * s + p % 2; }

// The dword of rows kR and kR + 4, throughout the half that belongs to each.
template <int kR>
inline __m256i of_rows(__m256i v) {
  return _mm256_shuffle_epi32(v, 0x55 * kR);
}

// Sub-blocks of the panel times tokens. A lane ends as 8 products of +-127 and 0 .. 3, or -4 .. 3: at most 4064.
// centre: where the lanes of each token's sub-blocks start (pairs of int16); none: at 0.
template <int kTokens, bool kCentred>
inline void multiply16(const uint8_t (*codes)[4][64], const __m256i (*scale)[2], const int8_t* const q[kTokens],
                       const int32_t* const centre[kTokens], __m256i whole[kTokens][2]) {
  for (int t = 0; t < kTokens; ++t) whole[t][0] = whole[t][1] = _mm256_setzero_si256();
  for (int j = 0; j < 16; ++j) {
    __m256i sum[kTokens][2];
    for (int t = 0; kCentred && t < kTokens; ++t) sum[t][0] = sum[t][1] = broadcast32(centre[t] + j);
    chain<kTokens, 4, !kCentred>(codes[j][0], q, 16 * static_cast<size_t>(j), sum);
    for (int t = 0; t < kTokens; ++t) {
      for (int h = 0; h < 2; ++h) {
        whole[t][h] = _mm256_add_epi32(whole[t][h], _mm256_madd_epi16(sum[t][h], scale[j][h]));
      }
    }
  }
}

struct Q2_K {
  using Block = BlockQ2_K;
  static constexpr size_t kBlock = 256;
  struct Scales {
    __m256i scale[16];  // [sub-block]: per row (sc, sc)
    __m256i min[8];     // [pair of sub-blocks]: per row (mn of 2 j, mn of 2 j + 1)
  };
  struct Panel {
    uint8_t codes[16][4][64];  // [sub-block][step][4 row + column], 0 .. 3
    __m256i scale[16][2];      // [sub-block][rows 0-7, 8-15]
    __m256i min[2][8];
    __m256 d[2], dmin[2];
  };
  struct Side {
    const int16_t* sum;  // of each sub-block's activations
  };
  static constexpr size_t kPanels = 4;
  static constexpr size_t kTile = 3;
  static constexpr bool kFetches = false;

  static void prepare(const Token& x, size_t, Side* side) { side->sum = x.sum16; }

  static void scales(const uint8_t* const row[8], size_t at, Scales* out) {
    __m256i v[4];
    transpose16(row, at, v);
    for (int j = 0; j < 16; ++j) out->scale[j] = byte_pair(low_nibbles(v[j / 4]), j % 4, j % 4);
    for (int j = 0; j < 8; ++j) out->min[j] = byte_pair(high_nibbles(v[j / 2]), 2 * j % 4, 2 * j % 4 + 1);
  }

  // Sum over sub-blocks of min * sum of activations, for 8 rows.
  static __m256i min_term(const __m256i min[8], const int16_t sum[16]) {
    __m256i total = _mm256_setzero_si256();
    for (int j = 0; j < 8; ++j) {
      total = _mm256_add_epi32(total, _mm256_madd_epi16(min[j], broadcast32(sum + 2 * j)));
    }
    return total;
  }

  static void decode(const uint8_t* const rows[16], size_t first, size_t, Panel* panel) {
    const size_t at = first * sizeof(Block);
    for (int half = 0; half < 2; ++half) {
      const uint8_t* const* row = rows + 8 * half;
      Scales s;
      scales(row, at, &s);
      for (int j = 0; j < 16; ++j) panel->scale[j][half] = s.scale[j];
      for (int j = 0; j < 8; ++j) panel->min[half][j] = s.min[j];
      panel->d[half] = load_f16(row, at + offsetof(Block, d));
      panel->dmin[half] = load_f16(row, at + offsetof(Block, dmin));
      for (int p = 0; p < 4; ++p) {
        __m256i v[4];
        transpose16(row, at + offsetof(Block, qs) + 16 * static_cast<size_t>(p), v);
        for (int part = 0; part < 4; ++part) {
          for (int i = 0; i < 4; ++i) store(panel->codes[sub_block(p, part)][i] + 32 * half, crumb(v[i], part));
        }
      }
    }
  }

  template <int kTokens>
  PE_NOINLINE static void multiply(const Panel& panel, const Slice<Q2_K, kTokens>& x, size_t, float* acc,
                                   size_t stride) {
    __m256i whole[kTokens][2];
    multiply16<kTokens, false>(panel.codes, panel.scale, x.q, nullptr, whole);
    for (int t = 0; t < kTokens; ++t) {
      const __m256 a = _mm256_set1_ps(*x.scale[t]);
      for (int h = 0; h < 2; ++h) {
        float* to = acc + stride * static_cast<size_t>(t) + 8 * h;
        __m256 f = _mm256_loadu_ps(to);
        f = add_term(f, panel.d[h], a, whole[t][h]);
        f = subtract_term(f, panel.dmin[h], a, min_term(panel.min[h], x.side[t].sum));
        _mm256_storeu_ps(to, f);
      }
    }
  }

  // Rows kR and kR + 4 against q (from the block on): four int32 each.
  template <int kR>
  static __m256i dot_rows(const uint8_t* const rows[8], size_t at, const int8_t* q, const __m256i scale[16]) {
    __m256i whole = _mm256_setzero_si256();
    for (int p = 0; p < 4; ++p) {
      const __m256i packed = two_rows(rows, kR, at + offsetof(Block, qs) + 16 * static_cast<size_t>(p));
      for (int s = 0; s < 4; ++s) {
        const int j = sub_block(p, s);
        const __m256i products = _mm256_maddubs_epi16(crumb(packed, s), broadcast128(q + 16 * j));
        whole = _mm256_add_epi32(whole, _mm256_madd_epi16(products, of_rows<kR>(scale[j])));
      }
    }
    return whole;
  }

  static __m256 dot8(const uint8_t* const rows[8], const Token& x, size_t blocks, const uint8_t* ahead) {
    __m256 acc = _mm256_setzero_ps();
    for (size_t b = 0; b < blocks; ++b) {
      const size_t at = b * sizeof(Block);
      prefetch(ahead + 8 * at, 8 * sizeof(Block));
      Scales s;
      scales(rows, at, &s);
      const int8_t* q = x.q + 256 * b;
      const __m256i v[4] = {dot_rows<0>(rows, at, q, s.scale), dot_rows<1>(rows, at, q, s.scale),
                            dot_rows<2>(rows, at, q, s.scale), dot_rows<3>(rows, at, q, s.scale)};
      const __m256 a = _mm256_set1_ps(x.scale[b]);
      acc = add_term(acc, load_f16(rows, at + offsetof(Block, d)), a, fold4(v));
      acc = subtract_term(acc, load_f16(rows, at + offsetof(Block, dmin)), a, min_term(s.min, x.sum16 + 16 * b));
    }
    return acc;
  }
};

struct Q3_K {
  using Block = BlockQ3_K;
  static constexpr size_t kBlock = 256;
  struct Panel {
    uint8_t codes[16][4][64];  // [sub-block][step][4 row + column], 0 .. 7
    __m256i scale[16][2];      // [sub-block][rows 0-7, 8-15]: per row (sc, sc)
    __m256 d[2];
  };
  struct Side {
    int32_t centre[16];  // [sub-block]: a pair of int16
  };
  static constexpr size_t kPanels = 4;
  static constexpr size_t kTile = 3;
  static constexpr bool kFetches = false;

  static void prepare(const Token& x, size_t, Side* side) { centre16(x.sum, 4, side->centre); }

  // Bit b of every byte, moved to bit 2.
  static __m256i third_bit(__m256i v, int b) {
    const __m256i moved = b < 2 ? _mm256_slli_epi16(v, 2 - b) : _mm256_srli_epi16(v, b - 2);
    return _mm256_and_si256(moved, _mm256_set1_epi8(4));
  }

  // Scales less 32, [sub-block]: per row (sc, sc).
  static void scales(const uint8_t* const row[8], size_t at, __m256i out[16]) {
    // The 12 bytes are read with the 2 before and the 2 (d) after them: the block ends there.
    static_assert(offsetof(Block, scales) + 14 == sizeof(Block));
    __m256i v[4], packed[3];
    transpose16(row, at + offsetof(Block, scales) - 2, v);
    for (int i = 0; i < 3; ++i) {
      packed[i] = _mm256_or_si256(_mm256_srli_epi32(v[i], 16), _mm256_slli_epi32(v[i + 1], 16));
    }
    for (int g = 0; g < 4; ++g) {  // sub-blocks 4 g .. 4 g + 3
      const __m256i low = g < 2 ? low_nibbles(packed[g]) : high_nibbles(packed[g - 2]);
      const __m256i high = _mm256_slli_epi16(crumb(packed[2], g), 4);
      const __m256i sc = _mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(32));
      for (int j = 0; j < 4; ++j) {
        out[4 * g + j] = _mm256_srai_epi16(_mm256_slli_epi16(byte_pair(sc, j, j), 8), 8);
      }
    }
  }

  static void decode(const uint8_t* const rows[16], size_t first, size_t, Panel* panel) {
    const size_t at = first * sizeof(Block);
    for (int half = 0; half < 2; ++half) {
      const uint8_t* const* row = rows + 8 * half;
      __m256i scale[16], high[8];
      scales(row, at, scale);
      for (int j = 0; j < 16; ++j) panel->scale[j][half] = scale[j];
      panel->d[half] = load_f16(row, at + offsetof(Block, d));
      transpose16(row, at + offsetof(Block, hmask), high);
      transpose16(row, at + offsetof(Block, hmask) + 16, high + 4);
      for (int p = 0; p < 4; ++p) {
        __m256i v[4];
        transpose16(row, at + offsetof(Block, qs) + 16 * static_cast<size_t>(p), v);
        for (int s = 0; s < 4; ++s) {
          for (int i = 0; i < 4; ++i) {
            store(panel->codes[sub_block(p, s)][i] + 32 * half,
                  _mm256_or_si256(crumb(v[i], s), third_bit(high[4 * (p % 2) + i], 4 * (p / 2) + s)));
          }
        }
      }
    }
  }

  template <int kTokens>
  PE_NOINLINE static void multiply(const Panel& panel, const Slice<Q3_K, kTokens>& x, size_t, float* acc,
                                   size_t stride) {
    const int32_t* centre[kTokens];
    for (int t = 0; t < kTokens; ++t) centre[t] = x.side[t].centre;
    __m256i whole[kTokens][2];
    multiply16<kTokens, true>(panel.codes, panel.scale, x.q, centre, whole);
    add_block(panel.d, x.scale, 0, whole, acc, stride);
  }

  // The codes in qs[16 kP ..] of rows kR and kR + 4. kP is no variable, so that shifts are constants.
  template <int kR, int kP>
  static __m256i dot_part(const uint8_t* const rows[8], size_t at, const int8_t* q, const __m256i scale[16]) {
    const __m256i packed = two_rows(rows, kR, at + offsetof(Block, qs) + 16 * kP);
    const __m256i high = two_rows(rows, kR, at + offsetof(Block, hmask) + 16 * (kP % 2));
    __m256i whole = _mm256_setzero_si256();
    for (int s = 0; s < 4; ++s) {
      const int j = sub_block(kP, s);
      const __m256i codes = _mm256_or_si256(crumb(packed, s), third_bit(high, 4 * (kP / 2) + s));
      const __m256i products = _mm256_maddubs_epi16(codes, broadcast128(q + 16 * j));
      whole = _mm256_add_epi32(whole, _mm256_madd_epi16(products, of_rows<kR>(scale[j])));
    }
    return whole;
  }

  // Rows kR and kR + 4 against q (from the block on): four int32 each, of codes 0 .. 7.
  template <int kR>
  static __m256i dot_rows(const uint8_t* const rows[8], size_t at, const int8_t* q, const __m256i scale[16]) {
    return _mm256_add_epi32(_mm256_add_epi32(dot_part<kR, 0>(rows, at, q, scale), dot_part<kR, 1>(rows, at, q, scale)),
                            _mm256_add_epi32(dot_part<kR, 2>(rows, at, q, scale), dot_part<kR, 3>(rows, at, q, scale)));
  }

  static __m256 dot8(const uint8_t* const rows[8], const Token& x, size_t blocks, const uint8_t* ahead) {
    __m256 acc = _mm256_setzero_ps();
    for (size_t b = 0; b < blocks; ++b) {
      const size_t at = b * sizeof(Block);
      prefetch(ahead + 8 * at, 8 * sizeof(Block));
      __m256i scale[16], total = _mm256_setzero_si256();
      scales(rows, at, scale);
      for (int j = 0; j < 16; ++j) {  // scale * sum of activations
        total = _mm256_add_epi32(total, _mm256_madd_epi16(scale[j], broadcast32(x.sum + 32 * b + 2 * j)));
      }
      const int8_t* q = x.q + 256 * b;
      const __m256i v[4] = {dot_rows<0>(rows, at, q, scale), dot_rows<1>(rows, at, q, scale),
                            dot_rows<2>(rows, at, q, scale), dot_rows<3>(rows, at, q, scale)};
      const __m256i dot = _mm256_sub_epi32(fold4(v), _mm256_slli_epi32(total, 2));
      acc = add_term(acc, load_f16(rows, at + offsetof(Block, d)), _mm256_set1_ps(x.scale[b]), dot);
    }
    return acc;
  }
};

}  // namespace

void avx2_linear_q23k(KernelTable* table) {
  table->linear[static_cast<int>(Format::Q2_K)] = linear<Q2_K>;
  table->linear[static_cast<int>(Format::Q3_K)] = linear<Q3_K>;
}

}  // namespace pe
