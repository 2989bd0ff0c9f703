// Linear for the IQ1, IQ2, IQ3 and TQ formats: 256 weights whose codes come from a codebook or are ternary digits, with
// an integer scale per sub-block and float work once per block. tile.h explains the shape of the loops.
//
// A format F gives its codes 32 at a time, from unsigned bytes u:
//   F::kSigned      codes are magnitudes u with signs; otherwise they are u - F::kOffset
//   F::kOffset      signed: no magnitude is larger
//   F::kUnit        D of the contract (kernels.h) is d times this
//   F(block)        prepares a block
//   f.scales()      16 x int16, one per sub-block of 16
//   f.codes<J>()    u of codes 32 J .. 32 J + 31;  f.signs<J>(): 1 or -1 for each (kSigned)
//   F::d(row, at)   d of 8 rows
#include "kernels/avx2/tile.h"
#include "kernels/tiers.h"
#include "quant/codebooks.h"

namespace pe {
namespace {

// ---- codebooks as bytes ----

template <size_t kN>
struct Grid8 {
  uint64_t entry[kN];  // eight bytes
};
template <size_t kN>
struct Grid4 {
  uint32_t entry[kN];  // four bytes
};

template <size_t kN>
constexpr Grid8<kN> expand8(const uint16_t (&packed)[kN], const uint8_t (&level)[3]) {
  Grid8<kN> out = {};
  for (size_t i = 0; i < kN; ++i) {
    for (int k = 0; k < 8; ++k) {
      out.entry[i] |= static_cast<uint64_t>(level[(packed[i] >> (2 * k)) & 3]) << (8 * k);
    }
  }
  return out;
}
template <size_t kN>
constexpr Grid4<kN> expand4(const uint16_t (&packed)[kN], const uint8_t (&level)[8]) {
  Grid4<kN> out = {};
  for (size_t i = 0; i < kN; ++i) {
    for (int k = 0; k < 4; ++k) {
      out.entry[i] |= static_cast<uint32_t>(level[(packed[i] >> (4 * k)) & 15]) << (8 * k);
    }
  }
  return out;
}

constexpr uint8_t kIq1Levels[3] = {0, 8, 16};  // eight times the value, plus 8
constexpr uint8_t kOddLevels[8] = {1, 3, 5, 7, 9, 11, 13, 15};

alignas(64) constexpr auto kIq2Xxs = expand8(kIq2XxsGrid, kIq2Levels);
alignas(64) constexpr auto kIq2Xs = expand8(kIq2XsGrid, kIq2Levels);
alignas(64) constexpr auto kIq2S = expand8(kIq2SGrid, kIq2Levels);
alignas(64) constexpr auto kIq1 = expand8(kIq1Grid, kIq1Levels);
alignas(64) constexpr auto kIq3Xxs = expand4(kIq3XxsGrid, kIq3Levels);
alignas(64) constexpr auto kIq3S = expand4(kIq3SGrid, kOddLevels);

template <class Index>
inline __m256i entries8(const uint64_t* grid, const Index* at) {
  const auto pair = [grid, at](int i) {
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(grid + at[i]));
    return _mm_loadh_pd(_mm_castsi128_pd(low), reinterpret_cast<const double*>(grid + at[i + 1]));
  };
  return _mm256_castpd_si256(_mm256_set_m128d(pair(2), pair(0)));
}
template <class Index>
inline __m256i entries4(const uint32_t* grid, const Index* at) {
  const auto pair = [grid, at](int i) {  // in one of the general registers, which have less to do than the others
    uint64_t both = grid[at[i]] | static_cast<uint64_t>(grid[at[i + 1]]) << 32;
#if defined(__GNUC__)
    __asm__ volatile("" : "+r"(both));
#endif
    return static_cast<int64_t>(both);
  };
  return _mm256_setr_epi64x(pair(0), pair(2), pair(4), pair(6));
}

// ---- signs and scales ----

// A bit for each of 32 bytes: -1 where it is set, else 1.
inline __m256i spread_signs(const void* bits) {
  const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i v = _mm256_and_si256(_mm256_shuffle_epi8(broadcast32(bits), byte), bit);
  return _mm256_or_si256(_mm256_cmpeq_epi8(v, bit), _mm256_set1_epi8(1));
}

// Bytes of seven sign bits -> with the eighth, which makes the number of bits even.
inline __m256i with_parity(__m256i seven) {
  const __m256i parity = _mm256_setr_epi8(0, -128, -128, 0, -128, 0, 0, -128, -128, 0, 0, -128, 0, -128, -128, 0,  //
                                          0, -128, -128, 0, -128, 0, 0, -128, -128, 0, 0, -128, 0, -128, -128, 0);
  const __m256i odd = _mm256_xor_si256(_mm256_shuffle_epi8(parity, low_nibbles(seven)),
                                       _mm256_shuffle_epi8(parity, high_nibbles(seven)));
  return _mm256_or_si256(seven, odd);
}

// Eight words of 4 x 7 sign bits -> 32 bytes of signs.
inline __m256i unpack_signs(__m256i words) {
  const auto field = [words](int shift) {  // the one that belongs in byte `shift`
    return _mm256_and_si256(_mm256_slli_epi32(words, shift), _mm256_set1_epi32(0x7f << (8 * shift)));
  };
  return with_parity(_mm256_or_si256(_mm256_or_si256(field(0), field(1)), _mm256_or_si256(field(2), field(3))));
}

// The scales in the top bits of those words.
inline __m256i top_scales(__m256i words) {
  const __m256i sc = _mm256_srli_epi32(words, 28);
  const __m256i odd = _mm256_or_si256(_mm256_slli_epi32(sc, 1), _mm256_set1_epi32(1));
  return _mm256_or_si256(odd, _mm256_slli_epi32(odd, 16));
}

// Sixteen 4-bit scales.
inline __m256i nibble_scales(const uint8_t scales[8]) {
  const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales));
  const __m128i low = _mm_and_si128(v, _mm_set1_epi8(15)),
                high = _mm_and_si128(_mm_srli_epi16(v, 4), _mm_set1_epi8(15));
  const __m256i sc = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(low, high));
  return _mm256_or_si256(_mm256_slli_epi16(sc, 1), _mm256_set1_epi16(1));
}

template <class B>
inline __m256 d_first(const uint8_t* const row[8], size_t at) {
  return load_f16(row, at + offsetof(B, d));
}

// Bytes high : low as 16-bit numbers in order, 32 of them.
inline void interleave(__m256i low, __m256i high, uint16_t out[32]) {
  const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
  store(out, _mm256_permute2x128_si256(a, b, 0x20));
  store(out + 16, _mm256_permute2x128_si256(a, b, 0x31));
}

// ---- the formats ----

struct IQ2_XXS {
  using Block = BlockIQ2_XXS;
  static constexpr bool kSigned = true;
  static constexpr short kOffset = 43;
  static constexpr float kUnit = 0.125f;
  const Block& b;
  __m256i tails;
  alignas(32) uint32_t sign[8];

  explicit IQ2_XXS(const Block& block) : b(block) {
    const __m256i first = load(&b.sub[0]), second = load(&b.sub[4]);
    const __m256i odd = _mm256_castps_si256(
        _mm256_shuffle_ps(_mm256_castsi256_ps(first), _mm256_castsi256_ps(second), 0xdd));  // 0 1 4 5 2 3 6 7
    tails = _mm256_permute4x64_epi64(odd, 0xd8);
    store(sign, unpack_signs(tails));
  }
  __m256i scales() const { return top_scales(tails); }
  template <int kJ>
  __m256i codes() const {
    return entries8(kIq2Xxs.entry, b.sub[kJ].entry);
  }
  template <int kJ>
  __m256i signs() const {
    return spread_signs(&sign[kJ]);
  }
  static __m256 d(const uint8_t* const row[8], size_t at) { return d_first<Block>(row, at); }
};

struct IQ2_XS {
  using Block = BlockIQ2_XS;
  static constexpr bool kSigned = true;
  static constexpr short kOffset = 43;
  static constexpr float kUnit = 0.125f;
  const Block& b;
  alignas(32) uint16_t index[32];
  alignas(32) uint32_t sign[8];

  explicit IQ2_XS(const Block& block) : b(block) {
    const __m256i first = load(b.qs), second = load(reinterpret_cast<const uint8_t*>(b.qs) + 32);
    const __m256i nine = _mm256_set1_epi16(511);
    store(index, _mm256_and_si256(first, nine));
    store(index + 16, _mm256_and_si256(second, nine));
    const __m256i seven = _mm256_packus_epi16(_mm256_srli_epi16(first, 9), _mm256_srli_epi16(second, 9));
    store(sign, with_parity(_mm256_permute4x64_epi64(seven, 0xd8)));
  }
  __m256i scales() const { return nibble_scales(b.scales); }
  template <int kJ>
  __m256i codes() const {
    return entries8(kIq2Xs.entry, index + 4 * kJ);
  }
  template <int kJ>
  __m256i signs() const {
    return spread_signs(&sign[kJ]);
  }
  static __m256 d(const uint8_t* const row[8], size_t at) { return d_first<Block>(row, at); }
};

struct IQ2_S {
  using Block = BlockIQ2_S;
  static constexpr bool kSigned = true;
  static constexpr short kOffset = 43;
  static constexpr float kUnit = 0.125f;
  const Block& b;
  alignas(32) uint16_t index[32];

  explicit IQ2_S(const Block& block) : b(block) {
    // Byte j of qh into four bytes, of which byte i keeps bits 2 i and 2 i + 1.
    const __m128i qh = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(b.qh));
    const __m256i words = _mm256_cvtepu8_epi32(qh);
    const __m256i high =
        _mm256_or_si256(_mm256_or_si256(_mm256_and_si256(words, _mm256_set1_epi32(3)),
                                        _mm256_and_si256(_mm256_slli_epi32(words, 6), _mm256_set1_epi32(3 << 8))),
                        _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi32(words, 12), _mm256_set1_epi32(3 << 16)),
                                        _mm256_and_si256(_mm256_slli_epi32(words, 18), _mm256_set1_epi32(3 << 24))));
    interleave(load(b.qs), high, index);
  }
  __m256i scales() const { return nibble_scales(b.scales); }
  template <int kJ>
  __m256i codes() const {
    return entries8(kIq2S.entry, index + 4 * kJ);
  }
  template <int kJ>
  __m256i signs() const {
    return spread_signs(b.signs + 4 * kJ);
  }
  static __m256 d(const uint8_t* const row[8], size_t at) { return d_first<Block>(row, at); }
};

struct IQ3_XXS {
  using Block = BlockIQ3_XXS;
  static constexpr bool kSigned = true;
  static constexpr short kOffset = 62;
  static constexpr float kUnit = 0.25f;
  const Block& b;
  __m256i tails;
  alignas(32) uint32_t sign[8];

  explicit IQ3_XXS(const Block& block) : b(block), tails(load(b.signs)) { store(sign, unpack_signs(tails)); }
  __m256i scales() const { return top_scales(tails); }
  template <int kJ>
  __m256i codes() const {
    return entries4(kIq3Xxs.entry, b.qs + 8 * kJ);
  }
  template <int kJ>
  __m256i signs() const {
    return spread_signs(&sign[kJ]);
  }
  static __m256 d(const uint8_t* const row[8], size_t at) { return d_first<Block>(row, at); }
};

struct IQ3_S {
  using Block = BlockIQ3_S;
  static constexpr bool kSigned = true;
  static constexpr short kOffset = 15;
  static constexpr float kUnit = 1;
  const Block& b;
  alignas(32) uint16_t index[64];

  explicit IQ3_S(const Block& block) : b(block) {
    const __m256i one = _mm256_set1_epi8(1);
    interleave(load(b.qs), _mm256_and_si256(_mm256_cmpgt_epi8(_mm256_setzero_si256(), spread_signs(b.qh)), one), index);
    interleave(load(b.qs + 32),
               _mm256_and_si256(_mm256_cmpgt_epi8(_mm256_setzero_si256(), spread_signs(b.qh + 4)), one), index + 32);
  }
  __m256i scales() const {
    int32_t packed;
    memcpy(&packed, b.scales, 4);
    const __m128i v = _mm_cvtsi32_si128(packed), four = _mm_set1_epi8(15);
    const __m128i sc = _mm_unpacklo_epi8(_mm_and_si128(v, four), _mm_and_si128(_mm_srli_epi16(v, 4), four));
    const __m256i twice = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(sc, sc));
    return _mm256_or_si256(_mm256_slli_epi16(twice, 1), _mm256_set1_epi16(1));
  }
  template <int kJ>
  __m256i codes() const {
    return entries4(kIq3S.entry, index + 8 * kJ);
  }
  template <int kJ>
  __m256i signs() const {
    return spread_signs(b.signs + 4 * kJ);
  }
  static __m256 d(const uint8_t* const row[8], size_t at) { return d_first<Block>(row, at); }
};

struct IQ1_S {
  using Block = BlockIQ1_S;
  static constexpr bool kSigned = false;
  static constexpr short kOffset = 9;  // codes are -9, -7, -1, 1, 7, 9
  static constexpr float kUnit = 0.125f;
  const Block& b;
  __m128i words;
  alignas(32) uint16_t index[32];
  alignas(16) uint16_t delta[8];  // 0 or 2 in both bytes

  explicit IQ1_S(const Block& block) : b(block), words(load128(b.qh)) {
    // Field i of word j (3 bits from 3 i on) into byte 4 j + i.
    const __m256i v = _mm256_cvtepu16_epi32(words);
    const auto field = [v](int i) {
      return _mm256_and_si256(_mm256_slli_epi32(v, 5 * i), _mm256_set1_epi32(7 << (8 * i)));
    };
    interleave(load(b.qs), _mm256_or_si256(_mm256_or_si256(field(0), field(1)), _mm256_or_si256(field(2), field(3))),
               index);
    _mm_store_si128(reinterpret_cast<__m128i*>(delta),
                    _mm_andnot_si128(_mm_srai_epi16(words, 15), _mm_set1_epi16(0x0202)));
  }
  __m256i scales() const {
    const __m256i sc = _mm256_cvtepu16_epi32(_mm_srli_epi16(words, 12));
    const __m256i odd =
        _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi32(sc, 1), _mm256_set1_epi32(14)), _mm256_set1_epi32(1));
    return _mm256_or_si256(odd, _mm256_slli_epi32(odd, 16));
  }
  template <int kJ>
  __m256i codes() const {
    return _mm256_add_epi8(entries8(kIq1.entry, index + 4 * kJ), _mm256_set1_epi16(static_cast<short>(delta[kJ])));
  }
  static __m256 d(const uint8_t* const row[8], size_t at) { return d_first<Block>(row, at); }
};

struct IQ1_M {
  using Block = BlockIQ1_M;
  static constexpr bool kSigned = false;
  static constexpr short kOffset = 9;
  static constexpr float kUnit = 0.125f;
  const Block& b;
  alignas(32) uint16_t index[32];
  alignas(32) uint8_t delta[32];  // 0 or 2 for each entry

  explicit IQ1_M(const Block& block) : b(block) {
    const __m128i v = load128(b.qh), four = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(v, four), high = _mm_and_si128(_mm_srli_epi16(v, 4), four);
    const __m256i nibbles = _mm256_setr_m128i(_mm_unpacklo_epi8(low, high), _mm_unpackhi_epi8(low, high));
    interleave(load(b.qs), _mm256_and_si256(nibbles, _mm256_set1_epi8(7)), index);
    store(delta, _mm256_and_si256(_mm256_cmpgt_epi8(_mm256_set1_epi8(8), nibbles), _mm256_set1_epi8(2)));
  }
  __m256i scales() const {
    // Word j four times, of which copy i keeps bits 3 i ..
    const __m256i words = _mm256_broadcastsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(b.scales)));
    const __m256i spread = _mm256_shuffle_epi8(
        words, _mm256_setr_epi64x(0x0100010001000100, 0x0302030203020302, 0x0504050405040504, 0x0706070607060706));
    // Twice the field, by a shift to bits 10 .. 12 and down again.
    const __m256i up = _mm256_mullo_epi16(spread, _mm256_set1_epi64x(0x0002001000800400));
    const __m256i sc = _mm256_and_si256(_mm256_srli_epi16(up, 9), _mm256_set1_epi16(14));
    return _mm256_or_si256(sc, _mm256_set1_epi16(1));
  }
  template <int kJ>
  __m256i codes() const {
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    return _mm256_add_epi8(entries8(kIq1.entry, index + 4 * kJ),
                           _mm256_shuffle_epi8(broadcast32(delta + 4 * kJ), byte));
  }
  static __m256 d(const uint8_t* const row[8], size_t at) {
    uint16_t h[8];
    const uint8_t* to[8];
    for (int r = 0; r < 8; ++r) {
      uint16_t words[4];
      memcpy(words, row[r] + at + offsetof(Block, scales), sizeof words);
      h[r] = iq1m_scale(words);
      to[r] = reinterpret_cast<const uint8_t*>(&h[r]);
    }
    return load_f16(to, 0);
  }
};

struct TQ1_0 {
  using Block = BlockTQ1_0;
  static constexpr bool kSigned = false;
  static constexpr short kOffset = 1;
  static constexpr float kUnit = 1;
  const Block& b;

  explicit TQ1_0(const Block& block) : b(block) {}
  static __m256i scales() { return _mm256_set1_epi16(1); }

  // trit of each byte v, already shifted: bytes up to 85 are 0, up to 170 1.
  static __m256i top_digit(__m256i v) {
    const __m256i first = _mm256_set1_epi8(86), second = _mm256_set1_epi8(static_cast<char>(171));
    const __m256i a = _mm256_cmpeq_epi8(_mm256_max_epu8(v, first), v);
    const __m256i c = _mm256_cmpeq_epi8(_mm256_max_epu8(v, second), v);
    return _mm256_sub_epi8(_mm256_setzero_si256(), _mm256_add_epi8(a, c));
  }
  static __m256i thrice(__m256i v) { return _mm256_add_epi8(v, _mm256_add_epi8(v, v)); }

  template <int kJ>
  __m256i codes() const {
    __m256i v;
    if constexpr (kJ < 5) {
      v = load(b.qs);
      for (int n = 0; n < kJ; ++n) v = thrice(v);
    } else if constexpr (kJ < 7) {
      v = broadcast128(b.qs + 32);
      for (int n = 0; n < 2 * (kJ - 5); ++n) v = thrice(v);
      v = _mm256_blend_epi32(v, thrice(v), 0xf0);
    } else {
      v = broadcast128(b.qs + 32);
      for (int n = 0; n < 4; ++n) v = thrice(v);
      const __m256i h = broadcast32(b.qh), h2 = thrice(h), h3 = thrice(h2);  // one dword for each n
      const __m256i tail =
          _mm256_blend_epi32(_mm256_blend_epi32(h, h2, 0x20), _mm256_blend_epi32(h3, thrice(h3), 0x80), 0xc0);
      v = _mm256_blend_epi32(v, tail, 0xf0);
    }
    return top_digit(v);
  }
  static __m256 d(const uint8_t* const row[8], size_t at) { return d_first<Block>(row, at); }
};

struct TQ2_0 {
  using Block = BlockTQ2_0;
  static constexpr bool kSigned = false;
  static constexpr short kOffset = 1;
  static constexpr float kUnit = 1;
  const Block& b;

  explicit TQ2_0(const Block& block) : b(block) {}
  static __m256i scales() { return _mm256_set1_epi16(1); }
  template <int kJ>
  __m256i codes() const {
    return _mm256_and_si256(_mm256_srli_epi16(load(b.qs + 32 * (kJ / 4)), 2 * (kJ % 4)), _mm256_set1_epi8(3));
  }
  static __m256 d(const uint8_t* const row[8], size_t at) { return d_first<Block>(row, at); }
};

// ---- the loops ----

// A block of each of 8 rows. All are prepared before the first is used: they store vectors that are read in smaller
// pieces, which has to wait until the store is done.
template <class F>
struct Blocks {
  F of[8];

  Blocks(const uint8_t* const row[8], size_t at)
      : of{make(row[0] + at), make(row[1] + at), make(row[2] + at), make(row[3] + at),
           make(row[4] + at), make(row[5] + at), make(row[6] + at), make(row[7] + at)} {
#if defined(__GNUC__)
    // Nor are the pieces to be taken out of the registers they were stored from.
    __asm__ volatile("" : : "r"(of) : "memory");
#endif
  }
  static F make(const uint8_t* block) { return F(*reinterpret_cast<const typename F::Block*>(block)); }
};

template <class F>
struct Coded {
  using Block = typename F::Block;
  static constexpr size_t kBlock = 256;
  static constexpr size_t kPanels = 4;
  static constexpr size_t kTile = 3;
  static constexpr bool kFetches = false;
  // Steps of a chain: a lane ends as 8 products of +-127 and codes up to 32 (at most 32512), or 4 of larger ones (at
  // most 31496).
  static constexpr int kSteps = F::kOffset <= 32 ? 4 : 2;
  static constexpr size_t kChains = 4 / kSteps;  // of a sub-block of 16
  struct Panel {
    uint8_t codes[16][4][64];  // [sub-block][step][4 row + column]: code + kOffset
    __m256i scale[16][2];      // [sub-block][rows 0-7, 8-15]: per row (sc, sc)
    __m256 d[2];
  };
  struct Side {
    int32_t centre[16 * kChains];  // [chain]: a pair of int16
  };

  static void prepare(const Token& x, size_t, Side* side) {
    if constexpr (kSteps == 4) {
      centre16(x.sum, F::kOffset, side->centre);
    } else {
      // As x.sum, for each 8 activations.
      const __m256i factor = _mm256_set1_epi16(static_cast<short>(-F::kOffset));
      for (int j = 0; j < 8; ++j) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load(x.q + 32 * j));
        const __m256i sums = _mm256_add_epi16(pairs, _mm256_srli_epi64(pairs, 32));  // low dword of each 8
        const __m256i four = _mm256_permutevar8x32_epi32(sums, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(side->centre + 4 * j),
                         _mm256_castsi256_si128(_mm256_mullo_epi16(four, factor)));
      }
    }
  }

  template <int kJ>
  static void expand(const F& f, uint8_t* to) {
    __m256i u = f.template codes<kJ>();
    if constexpr (F::kSigned) {
      u = _mm256_add_epi8(_mm256_sign_epi8(u, f.template signs<kJ>()), _mm256_set1_epi8(F::kOffset));
    }
    store(to + 32 * kJ, u);
    if constexpr (kJ < 7) expand<kJ + 1>(f, to);
  }

  // The codes of a row's block are written side by side, then 8 rows are transposed.
  static void decode(const uint8_t* const rows[16], size_t first, size_t, Panel* panel) {
    const size_t at = first * sizeof(Block);
    alignas(32) uint8_t codes[8][256];
    alignas(32) int16_t scales[8][16];
    const uint8_t *code[8], *scale[8];
    for (int r = 0; r < 8; ++r) {
      code[r] = codes[r];
      scale[r] = reinterpret_cast<const uint8_t*>(scales[r]);
    }
    for (int half = 0; half < 2; ++half) {
      const Blocks<F> block(rows + 8 * half, at);
      for (int r = 0; r < 8; ++r) {
        expand<0>(block.of[r], codes[r]);
        store(scales[r], block.of[r].scales());
      }
      for (size_t j = 0; j < 16; ++j) {
        __m256i v[4];
        transpose16(code, 16 * j, v);
        for (int s = 0; s < 4; ++s) store(panel->codes[j][s] + 32 * half, v[s]);
      }
      for (size_t p = 0; p < 2; ++p) {
        __m256i v[4];
        transpose16(scale, 16 * p, v);
        for (size_t i = 0; i < 4; ++i) {  // scales 8 p + 2 i and the next
          panel->scale[8 * p + 2 * i][half] = _mm256_blend_epi16(v[i], _mm256_slli_epi32(v[i], 16), 0xaa);
          panel->scale[8 * p + 2 * i + 1][half] = _mm256_blend_epi16(_mm256_srli_epi32(v[i], 16), v[i], 0xaa);
        }
      }
      panel->d[half] = _mm256_mul_ps(F::d(rows + 8 * half, at), _mm256_set1_ps(F::kUnit));
    }
  }

  template <int kTokens>
  PE_NOINLINE static void multiply(const Panel& panel, const Slice<Coded, kTokens>& x, size_t, float* acc,
                                   size_t stride) {
    __m256i whole[kTokens][2];
    for (int t = 0; t < kTokens; ++t) whole[t][0] = whole[t][1] = _mm256_setzero_si256();
    for (size_t c = 0; c < 16 * kChains; ++c) {
      __m256i sum[kTokens][2];
      for (int t = 0; t < kTokens; ++t) sum[t][0] = sum[t][1] = broadcast32(&x.side[t].centre[c]);
      chain<kTokens, kSteps, false>(panel.codes[c / kChains][kSteps * (c % kChains)], x.q, 4 * kSteps * c, sum);
      for (int t = 0; t < kTokens; ++t) {
        for (int h = 0; h < 2; ++h) {
          whole[t][h] = _mm256_add_epi32(whole[t][h], _mm256_madd_epi16(sum[t][h], panel.scale[c / kChains][h]));
        }
      }
    }
    add_block(panel.d, x.scale, 0, whole, acc, stride);
  }

  // 32 codes times 32 activations times their two scales, and on to code 128 h + 127. scales: those of sub-blocks
  // 8 h .. 8 h + 7 in both halves.
  template <int kJ>
  static __m256i dot(const F& f, const int8_t* q, __m256i scales) {
    constexpr int64_t kLow = 4 * (kJ % 4) * 0x0101010101010101 + 0x0100010001000100;
    constexpr int64_t kHigh = kLow + 0x0202020202020202;
    __m256i x = load(q + 32 * kJ);
    if constexpr (F::kSigned) x = _mm256_sign_epi8(x, f.template signs<kJ>());
    const __m256i products = _mm256_maddubs_epi16(f.template codes<kJ>(), x);  // pairs of up to 62 * 127
    const __m256i sum =
        _mm256_madd_epi16(products, _mm256_shuffle_epi8(scales, _mm256_setr_epi64x(kLow, kLow, kHigh, kHigh)));
    if constexpr (kJ % 4 < 3) return _mm256_add_epi32(sum, dot<kJ + 1>(f, q, scales));
    return sum;
  }

  static __m256 dot8(const uint8_t* const rows[8], const Token& x, size_t blocks, const uint8_t* ahead) {
    __m256 acc = _mm256_setzero_ps();
    for (size_t b = 0; b < blocks; ++b) {
      const size_t at = b * sizeof(Block);
      const int8_t* q = x.q + 256 * b;
      const __m256i sum = load(x.sum16 + 16 * b);
      const Blocks<F> block(rows, at);
      __m256i v[8];
      for (int r = 0; r < 8; ++r) {
        prefetch(ahead + 8 * at + static_cast<size_t>(r) * sizeof(Block), sizeof(Block));
        const F& f = block.of[r];
        const __m256i scales = f.scales();
        v[r] = _mm256_add_epi32(dot<0>(f, q, _mm256_permute2x128_si256(scales, scales, 0x00)),
                                dot<4>(f, q, _mm256_permute2x128_si256(scales, scales, 0x11)));
        if constexpr (!F::kSigned) {
          const __m256i offset = _mm256_madd_epi16(scales, sum);
          v[r] = _mm256_sub_epi32(v[r], _mm256_mullo_epi32(offset, _mm256_set1_epi32(F::kOffset)));
        }
      }
      const __m256 d = _mm256_mul_ps(F::d(rows, at), _mm256_set1_ps(F::kUnit));
      acc = add_term(acc, d, _mm256_set1_ps(x.scale[b]), fold8(v));
    }
    return acc;
  }
};

}  // namespace

void avx2_linear_iq(KernelTable* table) {
  table->linear[static_cast<int>(Format::IQ1_S)] = linear<Coded<IQ1_S>>;
  table->linear[static_cast<int>(Format::IQ1_M)] = linear<Coded<IQ1_M>>;
  table->linear[static_cast<int>(Format::IQ2_XXS)] = linear<Coded<IQ2_XXS>>;
  table->linear[static_cast<int>(Format::IQ2_XS)] = linear<Coded<IQ2_XS>>;
  table->linear[static_cast<int>(Format::IQ2_S)] = linear<Coded<IQ2_S>>;
  table->linear[static_cast<int>(Format::IQ3_XXS)] = linear<Coded<IQ3_XXS>>;
  table->linear[static_cast<int>(Format::IQ3_S)] = linear<Coded<IQ3_S>>;
  table->linear[static_cast<int>(Format::TQ1_0)] = linear<Coded<TQ1_0>>;
  table->linear[static_cast<int>(Format::TQ2_0)] = linear<Coded<TQ2_0>>;
}

}  // namespace pe
