// Linear for Q4_1, Q5_0, Q5_1 and MXFP4: one scale per 32 weights, and a fifth bit, a minimum or both beside the
// nibbles; those of MXFP4 index 16 levels within +-12. tile.h explains the shape of the loops.
#include "kernels/avx2/tile.h"
#include "kernels/tiers.h"

namespace pe {
namespace {

// 16 in each byte of v that has all bits of that byte of `bits`, else 0.
inline __m256i fifth_bit(__m256i v, __m256i bits) {
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(v, bits), bits);
  return _mm256_and_si256(set, _mm256_set1_epi8(16));
}

template <class B>
constexpr bool kLevels = false;
template <>
constexpr bool kLevels<BlockMXFP4> = true;

// B: the block. kFifth: it has the bits qh. kMin: it has the minimum m, and its codes count from 0.
template <class B, bool kFifth, bool kMin>
struct Nibbles {
  using Block = B;
  static constexpr size_t kBlock = 32;
  static constexpr size_t kQs = sizeof(Block) - 16;
  static constexpr size_t kQh = kFifth ? kQs - 4 : 0;
  static constexpr short kCentre = kLevels<B> ? 12 : kFifth ? 16 : 0;  // of the panel's chains
  struct Panel {
    uint8_t codes[8][8][64];  // [block][step][4 row + column]
    float d[8][16];           // [block][row]
    float m[8][16];
  };

  // The scales of 8 rows, d of the contract.
  static __m256 scales(const uint8_t* const row[8], size_t at) {
    if constexpr (!kLevels<B>) return load_f16(row, at);
    uint32_t bits[8];
    for (int r = 0; r < 8; ++r) bits[r] = mxfp4_scale_bits(row[r][at]);
    return _mm256_castsi256_ps(load(bits));
  }

  // Nibbles as codes from 0: kCentre above the level.
  static __m256i codes(__m256i nibbles) {
    if constexpr (!kLevels<B>) return nibbles;
    const __m256i levels = _mm256_add_epi8(broadcast128(kMxfp4Values), _mm256_set1_epi8(kCentre));
    return _mm256_shuffle_epi8(levels, nibbles);
  }

  // The 32 fifth bits of 8 rows, a dword each.
  static __m256i load_qh(const uint8_t* const row[8], size_t at) {
    int32_t h[8];
    for (int r = 0; r < 8; ++r) memcpy(&h[r], row[r] + at + kQh, 4);
    return load(h);
  }

  // Bits 4 s .. 4 s + 3 of each row, as fifth bits of its four codes.
  static __m256i step_bits(__m256i qh, int s) {
    const __m256i dword =
        _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c);
    const __m256i spread = _mm256_shuffle_epi8(qh, _mm256_add_epi8(dword, _mm256_set1_epi8(static_cast<char>(s / 2))));
    return fifth_bit(spread, _mm256_set1_epi32(s % 2 == 0 ? 0x08040201 : static_cast<int>(0x80402010u)));
  }

  static void decode(const uint8_t* const rows[16], size_t first, size_t n, Panel* panel) {
    for (size_t b = 0; b < n; ++b) {
      const size_t at = (first + b) * sizeof(Block);
      for (int half = 0; half < 2; ++half) {
        const uint8_t* const* row = rows + 8 * half;
        __m256i v[4], qh = _mm256_setzero_si256();
        transpose16(row, at + kQs, v);
        if constexpr (kFifth) qh = load_qh(row, at);
        for (int s = 0; s < 4; ++s) {
          __m256i low = codes(low_nibbles(v[s])), high = codes(high_nibbles(v[s]));
          if constexpr (kFifth) {
            low = _mm256_or_si256(low, step_bits(qh, s));
            high = _mm256_or_si256(high, step_bits(qh, s + 4));
          }
          store(panel->codes[b][s] + 32 * half, low);
          store(panel->codes[b][s + 4] + 32 * half, high);
        }
        _mm256_storeu_ps(panel->d[b] + 8 * half, scales(row, at));
        if constexpr (kMin) _mm256_storeu_ps(panel->m[b] + 8 * half, load_f16(row, at + 2));
      }
    }
  }

  struct Side {
    int32_t centre[8];   // [block]: a pair of int16
    const int16_t* sum;  // [block]
  };
  static constexpr size_t kPanels = 4;
  static constexpr size_t kTile = 3;
  static constexpr bool kFetches = false;

  static void prepare(const Token& x, size_t, Side* side) {
    if constexpr (kCentre != 0) centre32(x.sum, kCentre, side->centre);
    side->sum = x.sum32;
  }

  template <int kTokens>
  PE_NOINLINE static void multiply(const Panel& panel, const Slice<Nibbles, kTokens>& x, size_t n, float* acc,
                                   size_t stride) {
    for (size_t b = 0; b < n; ++b) {
      __m256i sum[kTokens][2];
      for (int t = 0; t < kTokens; ++t) {
        if constexpr (kCentre != 0) sum[t][0] = sum[t][1] = broadcast32(&x.side[t].centre[b]);
      }
      // A lane ends as 16 products of +-127 and 0 .. 15, at most 30480, or -16 .. 15, at most 32512.
      chain<kTokens, 8, kCentre == 0>(panel.codes[b][0], x.q, 32 * b, sum);
      const __m256i ones = fresh_ones();
      for (int t = 0; t < kTokens; ++t) {
        const __m256 a = _mm256_set1_ps(x.scale[t][b]);
        const __m256i total = kMin ? _mm256_set1_epi32(x.side[t].sum[b]) : _mm256_setzero_si256();
        for (int h = 0; h < 2; ++h) {
          float* to = acc + stride * static_cast<size_t>(t) + 8 * h;
          __m256 f = _mm256_loadu_ps(to);
          __m256i whole = _mm256_madd_epi16(sum[t][h], ones);
          if constexpr (kMin && kFifth) whole = _mm256_add_epi32(whole, _mm256_slli_epi32(total, 4));
          pin(whole);
          f = add_term(f, _mm256_loadu_ps(panel.d[b] + 8 * h), a, whole);
          if constexpr (kMin) f = add_term(f, _mm256_loadu_ps(panel.m[b] + 8 * h), a, total);
          _mm256_storeu_ps(to, f);
        }
      }
    }
  }

  // 16 codes of rows r and r + 4, from bit 16 * part of their qh on.
  static __m256i with_bits(__m256i nibbles, __m256i qh, int r, int part) {
    if constexpr (!kFifth) return codes(nibbles);
    const __m256i bytes = _mm256_setr_epi64x(0, 0x0101010101010101, 0, 0x0101010101010101);
    const __m256i from = _mm256_set1_epi8(static_cast<char>(4 * r + 2 * part));
    const __m256i bits = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
    return _mm256_or_si256(nibbles, fifth_bit(_mm256_shuffle_epi8(qh, _mm256_add_epi8(bytes, from)), bits));
  }

  static __m256 dot8(const uint8_t* const rows[8], const Token& x, size_t blocks, const uint8_t* ahead) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 acc = _mm256_setzero_ps();
    for (size_t b = 0; b < blocks; ++b) {
      const size_t at = b * sizeof(Block);
      prefetch(ahead + 8 * at, 8 * sizeof(Block));
      // Rows r and r + 4 share a register; codes 0-15 of both meet q 0-15, codes 16-31 q 16-31.
      const __m256i q0 = broadcast128(x.q + 32 * b), q1 = broadcast128(x.q + 32 * b + 16);
      const __m256i qh = kFifth ? load_qh(rows, at) : _mm256_setzero_si256();
      __m256i v[4];
      for (int r = 0; r < 4; ++r) {
        const __m256i packed = two_rows(rows, r, at + kQs);
        const __m256i low = _mm256_maddubs_epi16(with_bits(low_nibbles(packed), qh, r, 0), q0);
        const __m256i high = _mm256_maddubs_epi16(with_bits(high_nibbles(packed), qh, r, 1), q1);
        v[r] = _mm256_madd_epi16(_mm256_add_epi16(low, high), ones);  // 8 products of 0 .. 31: within +-31496
      }
      const __m256i half[2] = {_mm256_madd_epi16(_mm256_packs_epi32(v[0], v[1]), ones),
                               _mm256_madd_epi16(_mm256_packs_epi32(v[2], v[3]), ones)};
      __m256i dot = _mm256_hadd_epi32(half[0], half[1]);
      const __m256i total = _mm256_set1_epi32(x.sum32[b]);
      const __m256 a = _mm256_set1_ps(x.scale[b]);
      if constexpr (!kMin) dot = _mm256_sub_epi32(dot, _mm256_set1_epi32(kCentre * x.sum32[b]));
      acc = add_term(acc, scales(rows, at), a, dot);
      if constexpr (kMin) acc = add_term(acc, load_f16(rows, at + 2), a, total);
    }
    return acc;
  }
};

using Q4_1 = Nibbles<BlockQ4_1, false, true>;
using Q5_0 = Nibbles<BlockQ5_0, true, false>;
using Q5_1 = Nibbles<BlockQ5_1, true, true>;
using MXFP4 = Nibbles<BlockMXFP4, false, false>;

}  // namespace

void avx2_linear_q5(KernelTable* table) {
  table->linear[static_cast<int>(Format::Q4_1)] = linear<Q4_1>;
  table->linear[static_cast<int>(Format::Q5_0)] = linear<Q5_0>;
  table->linear[static_cast<int>(Format::Q5_1)] = linear<Q5_1>;
  table->linear[static_cast<int>(Format::MXFP4)] = linear<MXFP4>;
}

}  // namespace pe
