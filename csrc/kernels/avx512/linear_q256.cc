// Linear for the formats with integer scales inside blocks of 256: Q2_K .. Q6_K, IQ4_XS. tile.h explains the shape of the
// loops.
//
// Q4_K, Q5_K, Q6_K, IQ4_XS: the int32 sums of a sub-block are multiplied with its scale (vpmulld). Q2_K and Q3_K have codes and
// scales so small that their products fit a byte: they are decoded to products, and 256 columns are one chain.
#include "kernels/avx512/tile.h"
#include "kernels/tiers.h"

namespace pe {
namespace {

// A block is four parts of 16 steps: where bits of the same bytes go. Q2_K, Q3_K: part P = 2 h + p holds sub-blocks
// 8 h + p + {0, 2, 4, 6} of 16 columns, 4 steps each.
PE_INLINE constexpr int sub_block(int part, int i) { return 8 * (part / 2) + part % 2 + 2 * i; }

// What a format adds beside its scaled codes: the minima, or the offset that made its codes unsigned.
//   minus   M = sum over sub-blocks of pair * (sum of activations), subtracted with dmin * a
//   shift   the same M, times 2^kShift, subtracted from the integer sum
template <class Format, int kSubBlock, bool kMinima, int kShift>
struct Q256 {
  static constexpr size_t kBlock = 256;
  static constexpr bool kFinish = true, kLoop = false;
  static constexpr int kParts = 4, kCodes = 16, kSubs = 256 / kSubBlock;
  struct Head {
    __m512i scale[kSubs];     // int32 of 16 rows
    __m512i pair[kSubs / 2];  // int16 (sub-block 2 j, 2 j + 1): minima, or scales again
    // Q5_K: fifth bits, columns 4 i .. 4 i + 3 of each sub-block in the bytes of high[i]; Q6_K: qh, its bytes 4 i ..
    __m512i high[kSubBlock == 32 ? 8 : 16];
    __m512 d, dmin;
  };

  // The sub-block of the part's steps i * kSubBlock / 4 ..
  static PE_INLINE constexpr int sub(int part, int i) {
    return kSubBlock == 32 ? 2 * part + i : 8 * (part / 2) + 2 * (part % 2) + i % 2 + i / 2 * 4;
  }

  template <int T, int R>
  static PE_INLINE void multiply(int p, const __m512i* const* codes, const Head* const* head, const Tokens<T>& x,
                                 size_t block, __m512i (*sum)[T], __m512 (*)[T]) {
    constexpr int kSteps = kSubBlock / 4;
    PE_UNROLL
    for (int i = 0; i < kCodes / kSteps; ++i) {
      __m512i part[R][T];
      PE_UNROLL
      for (int r = 0; r < R; ++r) {
        PE_UNROLL
        for (int t = 0; t < T; ++t) part[r][t] = _mm512_setzero_si512();
      }
      chain<T, R, kSteps>(codes, kSteps * i, x, 256 * block + static_cast<size_t>(kSubBlock * sub(p, i)), part);
      PE_UNROLL
      for (int r = 0; r < R; ++r) {
        const __m512i scale = load512(&head[r]->scale[sub(p, i)]);
        PE_UNROLL
        for (int t = 0; t < T; ++t) {
          sum[r][t] = _mm512_add_epi32(sum[r][t], _mm512_mullo_epi32(part[r][t], scale));
          pin(sum[r][t]);
        }
      }
    }
  }

  template <int T>
  static PE_INLINE __m512 finish(const Head& head, const Tokens<T>& x, int t, size_t block, __m512i sum, __m512 acc) {
    const int16_t* s = kSubBlock == 32 ? x.sum32(t) + 8 * block : x.sum16(t) + 16 * block;
    __m512i m = _mm512_setzero_si512();
    PE_UNROLL
    for (int j = 0; j < kSubs / 2; ++j) m = _mm512_dpwssd_epi32(m, head.pair[j], broadcast32(s + 2 * j));
    pin(m);
    const float a = x.scale(t, block);
    if constexpr (kMinima) {
      return subtract_term(add_term(acc, head.d, a, sum), head.dmin, a, m);
    } else {
      return add_term(acc, head.d, a, _mm512_sub_epi32(sum, _mm512_slli_epi32(m, kShift)));
    }
  }
};

// Scales and minima of Q4_K and Q5_K: d, dmin and 12 bytes (formats.h).
template <class Head>
PE_INLINE void head_k4(const uint8_t* const* rows, size_t at, Head* out) {
  __m512i v[4];
  transpose16(rows, at, v);
  const __m512i six = _mm512_set1_epi8(63), two = _mm512_set1_epi8(0x30);
  const auto upper = [&](__m512i nibbles, __m512i top) {
    return _mm512_or_si512(nibbles, _mm512_and_si512(_mm512_srli_epi16(top, 2), two));
  };
  const __m512i scale0 = _mm512_and_si512(v[1], six), scale1 = upper(low_nibbles(v[3]), v[1]);
  const __m512i min0 = _mm512_and_si512(v[2], six), min1 = upper(high_nibbles(v[3]), v[2]);
  out->scale[0] = unsigned_byte<0>(scale0);
  out->scale[1] = unsigned_byte<1>(scale0);
  out->scale[2] = unsigned_byte<2>(scale0);
  out->scale[3] = unsigned_byte<3>(scale0);
  out->scale[4] = unsigned_byte<0>(scale1);
  out->scale[5] = unsigned_byte<1>(scale1);
  out->scale[6] = unsigned_byte<2>(scale1);
  out->scale[7] = unsigned_byte<3>(scale1);
  out->pair[0] = unsigned_pair<0>(min0);
  out->pair[1] = unsigned_pair<1>(min0);
  out->pair[2] = unsigned_pair<0>(min1);
  out->pair[3] = unsigned_pair<1>(min1);
  out->d = low_f16(v[0]);
  out->dmin = high_f16(v[0]);
}

// 32 bytes of nibbles: one sub-block in the low ones, the next in the high ones.
PE_INLINE void nibbles32(const uint8_t* const* rows, size_t at, __m512i* codes) {
  __m512i v[8];
  transpose32(rows, at, v);
  PE_UNROLL
  for (int s = 0; s < 8; ++s) {
    codes[s] = low_nibbles(v[s]);
    codes[s + 8] = high_nibbles(v[s]);
  }
}

struct Q4_K : Q256<Q4_K, 32, true, 0> {
  using Block = BlockQ4_K;
  static constexpr bool kLoop = true;
  static PE_INLINE void head(const uint8_t* const* rows, size_t at, Head* out) { head_k4(rows, at, out); }
  static PE_INLINE void codes_of(int part, const uint8_t* const* rows, size_t at, const Head&, __m512i* codes) {
    nibbles32(rows, at + offsetof(Block, qs) + 32 * static_cast<size_t>(part), codes);
  }
  template <int P>
  static PE_INLINE void codes(const uint8_t* const* rows, size_t at, const Head& head, __m512i* codes) {
    codes_of(P, rows, at, head, codes);
  }
};

// Bits of v selected by kMask after a shift that moves bit kFrom to bit kTo.
template <int kFrom, int kTo, int kMask>
PE_INLINE __m512i moved_bits(__m512i v) {
  const __m512i moved = kFrom > kTo ? _mm512_srli_epi16(v, kFrom > kTo ? kFrom - kTo : 0)
                                    : _mm512_slli_epi16(v, kFrom > kTo ? 0 : kTo - kFrom);
  return _mm512_and_si512(moved, _mm512_set1_epi8(kMask));
}

struct Q5_K : Q256<Q5_K, 32, true, 0> {
  using Block = BlockQ5_K;
  static PE_INLINE void head(const uint8_t* const* rows, size_t at, Head* out) {
    head_k4(rows, at, out);
    transpose32(rows, at + offsetof(Block, qh), out->high);
  }
  template <int P>
  static PE_INLINE void codes(const uint8_t* const* rows, size_t at, const Head& head, __m512i* codes) {
    nibbles32(rows, at + offsetof(Block, qs) + 32 * P, codes);
    PE_UNROLL
    for (int s = 0; s < 8; ++s) {
      codes[s] = _mm512_or_si512(codes[s], moved_bits<2 * P, 4, 16>(head.high[s]));
      codes[s + 8] = _mm512_or_si512(codes[s + 8], moved_bits<2 * P + 1, 4, 16>(head.high[s]));
    }
  }
};

struct Q6_K : Q256<Q6_K, 16, false, 5> {
  using Block = BlockQ6_K;
  static constexpr bool kLoop = true;
  static PE_INLINE void head(const uint8_t* const* rows, size_t at, Head* out) {
    __m512i v[4];
    transpose16(rows, at + offsetof(Block, scales), v);
    PE_UNROLL
    for (int i = 0; i < 4; ++i) {
      out->scale[4 * i] = signed_byte<0>(v[i]);
      out->scale[4 * i + 1] = signed_byte<1>(v[i]);
      out->scale[4 * i + 2] = signed_byte<2>(v[i]);
      out->scale[4 * i + 3] = signed_byte<3>(v[i]);
      out->pair[2 * i] = signed_pair<0>(v[i]);
      out->pair[2 * i + 1] = signed_pair<1>(v[i]);
    }
    transpose16(rows, at + sizeof(Block) - 16, v);  // d is the last thing in the block
    out->d = high_f16(v[3]);
    transpose32(rows, at + offsetof(Block, qh), out->high);
    transpose32(rows, at + offsetof(Block, qh) + 32, out->high + 8);
  }
  // 32 bytes of ql: sub-blocks 8 h + 2 q and the next in the low nibbles, those 4 further on in the high ones, part 2 h + q.
  static PE_INLINE void codes_of(int part, const uint8_t* const* rows, size_t at, const Head& head, __m512i* codes) {
    __m512i v[8];
    transpose32(rows, at + offsetof(Block, ql) + 32 * static_cast<size_t>(part), v);
    const __m128i shift = _mm_cvtsi32_si128(2 * (part % 2));
    PE_UNROLL
    for (int s = 0; s < 8; ++s) {
      const __m512i high = _mm512_srl_epi16(load512(&head.high[8 * (part / 2) + s]), shift);
      codes[s] = _mm512_or_si512(low_nibbles(v[s]), moved_bits<0, 4, 0x30>(high));
      codes[s + 8] = _mm512_or_si512(high_nibbles(v[s]), moved_bits<4, 4, 0x30>(high));
    }
  }
  template <int P>
  static PE_INLINE void codes(const uint8_t* const* rows, size_t at, const Head& head, __m512i* codes) {
    codes_of(P, rows, at, head, codes);
  }
};

struct IQ4_XS : Q256<IQ4_XS, 32, false, 7> {
  using Block = BlockIQ4_XS;
  static PE_INLINE void head(const uint8_t* const* rows, size_t at, Head* out) {
    __m512i v[4];
    transpose16(rows, at, v);  // (d, scales_h), scales_l, codes
    out->d = low_f16(v[0]);
    PE_UNROLL
    for (int j = 0; j < 8; ++j) {
      const __m512i low =
          _mm512_and_si512(_mm512_srli_epi32(v[1], static_cast<unsigned>(4 * j)), _mm512_set1_epi32(15));
      const __m512i top =
          _mm512_and_si512(_mm512_srli_epi32(v[0], static_cast<unsigned>(16 + 2 * j)), _mm512_set1_epi32(3));
      out->scale[j] = _mm512_sub_epi32(_mm512_or_si512(low, _mm512_slli_epi32(top, 4)), _mm512_set1_epi32(32));
    }
    PE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const __m512i even = _mm512_and_si512(out->scale[2 * j], _mm512_set1_epi32(0xffff));
      out->pair[j] = _mm512_or_si512(even, _mm512_slli_epi32(out->scale[2 * j + 1], 16));
    }
  }
  template <int P>
  static PE_INLINE void codes(const uint8_t* const* rows, size_t at, const Head&, __m512i* codes) {
    const __m512i levels = _mm512_xor_si512(_mm512_broadcast_i32x4(load128(kIq4Values)), _mm512_set1_epi8(-128));
    PE_UNROLL
    for (int i = 0; i < 2; ++i) {  // sub-block 2 P + i: columns 0-15 in the low nibbles, 16-31 in the high ones
      __m512i v[4];
      transpose16(rows, at + offsetof(Block, qs) + static_cast<size_t>(32 * P + 16 * i), v);
      PE_UNROLL
      for (int s = 0; s < 4; ++s) {
        codes[8 * i + s] = _mm512_shuffle_epi8(levels, low_nibbles(v[s]));
        codes[8 * i + s + 4] = _mm512_shuffle_epi8(levels, high_nibbles(v[s]));
      }
    }
  }
};

// Codes that are already multiplied with their scale: a block is one chain of 64 steps.
struct Products {
  template <int T, int R, class Head>
  static PE_INLINE void multiply(int p, const __m512i* const* codes, const Head* const*, const Tokens<T>& x,
                                 size_t block, __m512i (*sum)[T], __m512 (*)[T]) {
    PE_UNROLL
    for (int i = 0; i < 4; ++i) {
      chain<T, R, 4>(codes, 4 * i, x, 256 * block + static_cast<size_t>(16 * sub_block(p, i)), sum);
      PE_UNROLL
      for (int r = 0; r < R; ++r) {
        PE_UNROLL
        for (int t = 0; t < T; ++t) pin(sum[r][t]);
      }
    }
  }
};

struct Q2_K : Products {
  using Block = BlockQ2_K;
  static constexpr size_t kBlock = 256;
  static constexpr bool kFinish = true, kLoop = false;
  static constexpr int kParts = 4, kCodes = 16;
  struct Head {
    __m512i scale[4];  // byte j % 4 of each dword of scale[j / 4]: sub-block j
    __m512i pair[8];   // int16 minima of sub-blocks 2 j, 2 j + 1
    __m512 d, dmin;
  };

  static PE_INLINE void head(const uint8_t* const* rows, size_t at, Head* out) {
    __m512i v[4];
    transpose16(rows, at + sizeof(Block) - 16, v);  // ends in d, dmin
    out->d = low_f16(v[3]);
    out->dmin = high_f16(v[3]);
    transpose16(rows, at + offsetof(Block, scales), v);
    PE_UNROLL
    for (int i = 0; i < 4; ++i) {
      out->scale[i] = low_nibbles(v[i]);
      out->pair[2 * i] = unsigned_pair<0>(high_nibbles(v[i]));
      out->pair[2 * i + 1] = unsigned_pair<1>(high_nibbles(v[i]));
    }
  }

  template <int P>
  static PE_INLINE void codes(const uint8_t* const* rows, size_t at, const Head& head, __m512i* codes) {
    __m512i v[4];
    transpose16(rows, at + offsetof(Block, qs) + 16 * P, v);
    PE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int j = sub_block(P, i);
      const __m512i byte = _mm512_srli_epi32(head.scale[j / 4], static_cast<unsigned>(8 * (j % 4)));
      const __m512i scale =
          _mm512_mullo_epi32(_mm512_and_si512(byte, _mm512_set1_epi32(15)), _mm512_set1_epi32(0x00010001));
      PE_UNROLL
      for (int s = 0; s < 4; ++s) {
        const __m512i code =
            _mm512_and_si512(_mm512_srli_epi16(v[s], static_cast<unsigned>(2 * i)), _mm512_set1_epi8(3));
        codes[4 * i + s] = _mm512_mullo_epi16(code, scale);  // both bytes of a word: at most 45, no carry
      }
    }
  }

  template <int T>
  static PE_INLINE __m512 finish(const Head& head, const Tokens<T>& x, int t, size_t block, __m512i sum, __m512 acc) {
    __m512i m = _mm512_setzero_si512();
    PE_UNROLL
    for (int j = 0; j < 8; ++j) m = _mm512_dpwssd_epi32(m, head.pair[j], broadcast32(x.sum16(t) + 16 * block + 2 * j));
    pin(m);
    const float a = x.scale(t, block);
    return subtract_term(add_term(acc, head.d, a, sum), head.dmin, a, m);
  }
};

// (u - 4) (sc - 32) lies in -124 .. 128: with kOffset it is a byte.
struct Q3_K : Products {
  using Block = BlockQ3_K;
  static constexpr size_t kBlock = 256;
  static constexpr bool kFinish = true, kLoop = false;
  static constexpr int kParts = 4, kCodes = 16, kOffset = 124;
  struct Head {
    __m512i scale[4];  // 6-bit sc: byte j % 4 of each dword of scale[j / 4] is sub-block j
    __m512i high[8];   // hmask: bit b of the bytes of high[i]: bit 2 of codes 32 b + 4 i ..
    __m512 d;
  };

  static PE_INLINE void head(const uint8_t* const* rows, size_t at, Head* out) {
    __m512i v[4];
    transpose16(rows, at + sizeof(Block) - 16, v);  // 2 bytes of qs, 12 of scales, d
    out->d = high_f16(v[3]);
    // the 12 bytes, two bytes off the dwords
    const auto dword = [&](int i) {
      return _mm512_or_si512(_mm512_srli_epi32(v[i], 16), _mm512_slli_epi32(v[i + 1], 16));
    };
    const __m512i low0 = dword(0), low1 = dword(1), top = dword(2);
    const auto join = [&](__m512i nibbles, unsigned shift) {
      const __m512i pairs = _mm512_and_si512(_mm512_srli_epi16(top, shift), _mm512_set1_epi8(3));
      return _mm512_or_si512(nibbles, _mm512_slli_epi16(pairs, 4));
    };
    out->scale[0] = join(low_nibbles(low0), 0);
    out->scale[1] = join(low_nibbles(low1), 2);
    out->scale[2] = join(high_nibbles(low0), 4);
    out->scale[3] = join(high_nibbles(low1), 6);
    transpose16(rows, at + offsetof(Block, hmask), out->high);
    transpose16(rows, at + offsetof(Block, hmask) + 16, out->high + 4);
  }

  template <int P>
  static PE_INLINE void codes(const uint8_t* const* rows, size_t at, const Head& head, __m512i* codes) {
    constexpr int h = P / 2, p = P % 2;
    __m512i v[4];
    transpose16(rows, at + offsetof(Block, qs) + 16 * P, v);
    const __m512i even = _mm512_set1_epi16(0x00ff);
    PE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int j = sub_block(P, i);
      const __m512i byte = _mm512_srli_epi32(head.scale[j / 4], static_cast<unsigned>(8 * (j % 4)));
      const __m512i sc =
          _mm512_mullo_epi32(_mm512_and_si512(byte, _mm512_set1_epi32(63)), _mm512_set1_epi32(0x00010001));
      const __m512i scale = _mm512_sub_epi16(sc, _mm512_set1_epi16(32));
      // u * scale - 4 * scale + 124, modulo 256 in every byte
      const __m512i base = _mm512_sub_epi16(_mm512_set1_epi16(kOffset), _mm512_slli_epi16(scale, 2));
      const __m512i bases = _mm512_or_si512(_mm512_and_si512(base, even), _mm512_slli_epi16(base, 8));
      PE_UNROLL
      for (int s = 0; s < 4; ++s) {
        const __m512i low =
            _mm512_and_si512(_mm512_srli_epi16(v[s], static_cast<unsigned>(2 * i)), _mm512_set1_epi8(3));
        const __m512i bit = _mm512_and_si512(_mm512_srli_epi16(head.high[4 * p + s], static_cast<unsigned>(4 * h + i)),
                                             _mm512_set1_epi8(1));
        const __m512i u = _mm512_or_si512(low, _mm512_slli_epi16(bit, 2));
        const __m512i evens = _mm512_and_si512(_mm512_mullo_epi16(_mm512_and_si512(u, even), scale), even);
        const __m512i odds = _mm512_mullo_epi16(_mm512_andnot_si512(even, u), scale);
        codes[4 * i + s] = _mm512_add_epi8(_mm512_or_si512(evens, odds), bases);
      }
    }
  }

  template <int T>
  static PE_INLINE __m512 finish(const Head& head, const Tokens<T>& x, int t, size_t block, __m512i sum, __m512 acc) {
    const __m512i offset = _mm512_set1_epi16(-kOffset);
    PE_UNROLL
    for (int j = 0; j < 4; ++j) sum = _mm512_dpwssd_epi32(sum, offset, broadcast32(x.sum32(t) + 8 * block + 2 * j));
    pin(sum);
    return add_term(acc, head.d, x.scale(t, block), sum);
  }
};

}  // namespace

void avx512_linear_q256(KernelTable* table) {
  table->linear_rows = kBlockRows;
  use<Q2_K>(table, Format::Q2_K, One::kHere);
  use<Q3_K>(table, Format::Q3_K, One::kBelow);
  use<Q4_K>(table, Format::Q4_K, One::kBelow);
  use<Q5_K>(table, Format::Q5_K, One::kBelow);
  use<Q6_K>(table, Format::Q6_K, One::kBelow);
  use<IQ4_XS>(table, Format::IQ4_XS, One::kHere);
}

}  // namespace pe
