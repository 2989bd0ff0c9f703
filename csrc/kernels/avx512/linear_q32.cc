// Linear for the formats with one fp16 scale per 32 weights: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL. tile.h explains the
// shape of the loops.
#include "kernels/avx512/tile.h"
#include "kernels/tiers.h"

namespace pe {
namespace {

// The dwords at `at` of 16 rows, as the first of 16 bytes that may be read there.
PE_INLINE __m512i first_dword(const uint8_t* const* row, size_t at) {
  const __m512i a = _mm512_unpacklo_epi32(four_rows(row, 0, at), four_rows(row, 1, at));
  const __m512i b = _mm512_unpacklo_epi32(four_rows(row, 2, at), four_rows(row, 3, at));
  return _mm512_unpacklo_epi64(a, b);
}

// A block of 32 columns is one part of 8 steps. Derived: Format::Block, kOffset, kMinimum, head and codes.
template <class Format>
struct Q32 {
  static constexpr size_t kBlock = 32;
  static constexpr int kParts = 1, kCodes = 8;
  static constexpr bool kFinish = false, kLoop = false;
  struct Head {
    __m512 d, m;   // of the 16 rows; m where the format has one
    __m512i high;  // Q5: the fifth bits
  };

  template <int T, int R>
  static PE_INLINE void multiply(int, const __m512i* const* codes, const Head* const* head, const Tokens<T>& x,
                                 size_t block, __m512i (*sum)[T], __m512 (*acc)[T]) {
    // (sum of an even block, of the odd one after it): one of the two times -offset starts the chain
    const __m512i offset = _mm512_set1_epi32(block % 2 == 0 ? -Format::kOffset & 0xffff : -Format::kOffset * 65536);
    if constexpr (Format::kOffset != 0) {
      PE_UNROLL
      for (int t = 0; t < T; ++t) {
        const __m512i start = _mm512_madd_epi16(broadcast32(x.sum32(t) + block / 2 * 2), offset);
        PE_UNROLL
        for (int r = 0; r < R; ++r) sum[r][t] = start;
      }
    }
    chain<T, R, 8>(codes, 0, x, 32 * block, sum);
    PE_UNROLL
    for (int t = 0; t < T; ++t) {
      const float a = x.scale(t, block);
      PE_UNROLL
      for (int r = 0; r < R; ++r) {
        acc[r][t] = add_term(acc[r][t], head[r]->d, a, sum[r][t]);
        if constexpr (Format::kMinimum) {
          const __m512 s = _mm512_set1_ps(static_cast<float>(x.sum32(t)[block]));
          acc[r][t] = _mm512_fmadd_ps(_mm512_mul_ps(head[r]->m, _mm512_set1_ps(a)), s, acc[r][t]);
        }
      }
    }
  }

 protected:
  // 16 bytes of nibbles: columns 0-15 in the low ones, 16-31 in the high ones.
  static PE_INLINE void nibbles(const uint8_t* const* rows, size_t at, __m512i* codes) {
    __m512i v[4];
    transpose16(rows, at, v);
    for (int s = 0; s < 4; ++s) {
      codes[s] = low_nibbles(v[s]);
      codes[s + 4] = high_nibbles(v[s]);
    }
  }

  // Adds 16 to the codes whose bit is set: bit 4 s + i belongs to byte i of step s.
  static PE_INLINE void add_fifth(__m512i bits, __m512i* codes) {
    PE_UNROLL
    for (int s = 0; s < 8; ++s) {
      const int control = s / 2 * 0x01010101;
      const __m512i spread = _mm512_broadcast_i32x4(
          _mm_setr_epi32(control, control + 0x04040404, control + 0x08080808, control + 0x0c0c0c0c));
      const __m512i bit = _mm512_set1_epi32(s % 2 == 0 ? 0x08040201 : static_cast<int>(0x80402010u));
      const __mmask64 set = _mm512_test_epi8_mask(_mm512_shuffle_epi8(bits, spread), bit);
      codes[s] = _mm512_mask_add_epi8(codes[s], set, codes[s], _mm512_set1_epi8(16));
    }
  }
};

struct Q4_0 : Q32<Q4_0> {
  using Block = BlockQ4_0;
  static constexpr int kOffset = 8;
  static constexpr bool kMinimum = false;
  static PE_INLINE void head(const uint8_t* const* rows, size_t at, Head* out) {
    out->d = low_f16(first_dword(rows, at));
  }
  template <int P>
  static PE_INLINE void codes(const uint8_t* const* rows, size_t at, const Head&, __m512i* codes) {
    nibbles(rows, at + offsetof(Block, qs), codes);
  }
};

struct Q4_1 : Q32<Q4_1> {
  using Block = BlockQ4_1;
  static constexpr int kOffset = 0;
  static constexpr bool kMinimum = true;
  static PE_INLINE void head(const uint8_t* const* rows, size_t at, Head* out) {
    const __m512i first = first_dword(rows, at);
    out->d = low_f16(first);
    out->m = high_f16(first);
  }
  template <int P>
  static PE_INLINE void codes(const uint8_t* const* rows, size_t at, const Head&, __m512i* codes) {
    nibbles(rows, at + offsetof(Block, qs), codes);
  }
};

struct Q5_0 : Q32<Q5_0> {
  using Block = BlockQ5_0;
  static constexpr int kOffset = 16;
  static constexpr bool kMinimum = false;
  static PE_INLINE void head(const uint8_t* const* rows, size_t at, Head* out) {
    out->d = low_f16(first_dword(rows, at));
    out->high = first_dword(rows, at + offsetof(Block, qh));
  }
  template <int P>
  static PE_INLINE void codes(const uint8_t* const* rows, size_t at, const Head& head, __m512i* codes) {
    nibbles(rows, at + offsetof(Block, qs), codes);
    add_fifth(head.high, codes);
  }
};

struct Q5_1 : Q32<Q5_1> {
  using Block = BlockQ5_1;
  static constexpr int kOffset = 0;
  static constexpr bool kMinimum = true;
  static PE_INLINE void head(const uint8_t* const* rows, size_t at, Head* out) {
    const __m512i first = first_dword(rows, at);
    out->d = low_f16(first);
    out->m = high_f16(first);
    out->high = first_dword(rows, at + offsetof(Block, qh));
  }
  template <int P>
  static PE_INLINE void codes(const uint8_t* const* rows, size_t at, const Head& head, __m512i* codes) {
    nibbles(rows, at + offsetof(Block, qs), codes);
    add_fifth(head.high, codes);
  }
};

struct Q8_0 : Q32<Q8_0> {
  using Block = BlockQ8_0;
  static constexpr int kOffset = 128;
  static constexpr bool kMinimum = false;
  static PE_INLINE void head(const uint8_t* const* rows, size_t at, Head* out) {
    out->d = low_f16(first_dword(rows, at));
  }
  template <int P>
  static PE_INLINE void codes(const uint8_t* const* rows, size_t at, const Head&, __m512i* codes) {
    transpose16(rows, at + offsetof(Block, qs), codes);
    transpose16(rows, at + offsetof(Block, qs) + 16, codes + 4);
    PE_UNROLL
    for (int s = 0; s < 8; ++s) codes[s] = _mm512_xor_si512(codes[s], _mm512_set1_epi8(-128));  // code + 128
  }
};

struct IQ4_NL : Q32<IQ4_NL> {
  using Block = BlockIQ4_NL;
  static constexpr int kOffset = 128;
  static constexpr bool kMinimum = false;
  static PE_INLINE void head(const uint8_t* const* rows, size_t at, Head* out) {
    out->d = low_f16(first_dword(rows, at));
  }
  template <int P>
  static PE_INLINE void codes(const uint8_t* const* rows, size_t at, const Head&, __m512i* codes) {
    nibbles(rows, at + offsetof(Block, qs), codes);
    const __m512i levels = _mm512_xor_si512(_mm512_broadcast_i32x4(load128(kIq4Values)), _mm512_set1_epi8(-128));
    PE_UNROLL
    for (int s = 0; s < 8; ++s) codes[s] = _mm512_shuffle_epi8(levels, codes[s]);
  }
};

}  // namespace

void avx512_linear_q32(KernelTable* table) {
  use<Q4_0>(table, Format::Q4_0, One::kBelow);
  use<Q4_1>(table, Format::Q4_1, One::kBelow);
  use<Q5_0>(table, Format::Q5_0, One::kHere);
  use<Q5_1>(table, Format::Q5_1, One::kHere);
  use<Q8_0>(table, Format::Q8_0, One::kBelow);
  use<IQ4_NL>(table, Format::IQ4_NL, One::kHere);
}

}  // namespace pe
