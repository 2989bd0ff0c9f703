// Linear for Q4_0 and Q8_0: one fp16 scale per 32 weights. tile.h explains the shape of the loops.
#include "kernels/avx2/tile.h"
#include "kernels/tiers.h"

namespace pe {
namespace {

struct Q4_0 {
  using Block = BlockQ4_0;
  static constexpr size_t kBlock = 32;
  struct Panel {
    uint8_t codes[8][8][64];  // [block][step][4 row + column]
    __m256 d[8][2];           // [block][rows 0-7, 8-15]
  };
  struct Side {
    int32_t centre[8];  // [block]: a pair of int16
  };
  static constexpr size_t kPanels = 4;
  static constexpr size_t kTile = 3;
  static constexpr bool kFetches = false;

  static void decode(const uint8_t* const rows[16], size_t first, size_t n, Panel* panel) {
    for (size_t b = 0; b < n; ++b) {
      const size_t at = (first + b) * sizeof(Block);
      for (int half = 0; half < 2; ++half) {
        const uint8_t* const* row = rows + 8 * half;
        __m256i v[4];
        transpose16(row, at + 2, v);
        for (int s = 0; s < 4; ++s) {
          store(panel->codes[b][s] + 32 * half, low_nibbles(v[s]));
          store(panel->codes[b][s + 4] + 32 * half, high_nibbles(v[s]));
        }
        panel->d[b][half] = load_f16(row, at);
      }
    }
  }

  static void prepare(const Token& x, size_t, Side* side) { centre32(x.sum, 8, side->centre); }

  template <int kTokens>
  PE_NOINLINE static void multiply(const Panel& panel, const Slice<Q4_0, kTokens>& x, size_t n, float* acc,
                                   size_t stride) {
    __m256 f[kTokens][2];
    for (int t = 0; t < kTokens; ++t) {
      for (int h = 0; h < 2; ++h) f[t][h] = _mm256_loadu_ps(acc + stride * static_cast<size_t>(t) + 8 * h);
    }
    for (size_t b = 0; b < n; ++b) {
      __m256i sum[kTokens][2];
      for (int t = 0; t < kTokens; ++t) sum[t][0] = sum[t][1] = broadcast32(&x.side[t].centre[b]);
      chain<kTokens, 8, false>(panel.codes[b][0], x.q, 32 * b, sum);
      // a lane ends as 16 products of -8 .. 7 and +-127: at most 16256
      const __m256i ones = fresh_ones();
      for (int t = 0; t < kTokens; ++t) {
        const __m256 a = _mm256_set1_ps(x.scale[t][b]);
        for (int h = 0; h < 2; ++h) {
          const __m256i whole = _mm256_madd_epi16(sum[t][h], ones);
          f[t][h] = add_term(f[t][h], panel.d[b][h], a, whole);
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int h = 0; h < 2; ++h) _mm256_storeu_ps(acc + stride * static_cast<size_t>(t) + 8 * h, f[t][h]);
    }
  }

  template <int kTokens>
  PE_NOINLINE static void fused8(const uint8_t* const rows[8], const Token* x, size_t blocks, const uint8_t* ahead,
                                 __m256* acc) {
    const int8_t* q[kTokens];
    for (int t = 0; t < kTokens; ++t) q[t] = x[t].q;
    for (size_t first = 0; first < blocks; first += 8) {
      int32_t centre[kTokens][8];
      for (int t = 0; t < kTokens; ++t) centre32(x[t].sum + 4 * first, 8, centre[t]);
      const size_t end = blocks < first + 8 ? blocks : first + 8;
      for (size_t b = first; b < end; ++b) {
        const size_t at = b * sizeof(Block);
        prefetch(ahead + 8 * at, 8 * sizeof(Block));
        __m256i v[4], sum[kTokens];
        transpose16(rows, at + 2, v);
        PE_UNROLL
        for (int i = 0; i < 4; ++i) pin(v[i]);
        PE_UNROLL
        for (int t = 0; t < kTokens; ++t) sum[t] = broadcast32(&centre[t][b - first]);
        PE_UNROLL
        for (size_t i = 0; i < 8; ++i)
          step8<kTokens>(i < 4 ? low_nibbles(v[i]) : high_nibbles(v[i - 4]), q, 4 * i, false, sum);
        // a lane ends as 16 products of -8 .. 7 and +-127: at most 16256
        const __m256 d = load_f16(rows, at);
        forget(acc);  // or it takes registers that the chains need
        PE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          const __m256i whole = _mm256_madd_epi16(sum[t], _mm256_set1_epi16(1));
          acc[t] = add_term(acc[t], d, _mm256_set1_ps(x[t].scale[b]), whole);
          q[t] += 32;
        }
      }
    }
  }

  static __m256 dot8(const uint8_t* const rows[8], const Token& x, size_t blocks, const uint8_t* ahead) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 acc = _mm256_setzero_ps();
    for (size_t b = 0; b < blocks; ++b) {
      const size_t at = b * sizeof(Block);
      prefetch(ahead + 8 * at, 8 * sizeof(Block));
      // Rows r and r + 4 share a register; codes 0-15 of both meet q 0-15, codes 16-31 q 16-31.
      const __m256i q0 = broadcast128(x.q + 32 * b);
      const __m256i q1 = broadcast128(x.q + 32 * b + 16);
      __m256i v[4];
      for (int r = 0; r < 4; ++r) {
        const __m256i packed = two_rows(rows, r, at + 2);
        const __m256i low = _mm256_maddubs_epi16(low_nibbles(packed), q0);
        const __m256i high = _mm256_maddubs_epi16(high_nibbles(packed), q1);
        v[r] = _mm256_madd_epi16(_mm256_add_epi16(low, high), ones);  // 8 products of 0 .. 15: within +-15240
      }
      // Halve by way of int16 until each row has one int32: 16 products are within +-30480.
      const __m256i a = _mm256_madd_epi16(_mm256_packs_epi32(v[0], v[1]), ones);
      const __m256i c = _mm256_madd_epi16(_mm256_packs_epi32(v[2], v[3]), ones);
      const __m256i dot = _mm256_madd_epi16(_mm256_packs_epi32(a, c), ones);
      acc = add_term(acc, load_f16(rows, at), _mm256_set1_ps(x.scale[b]),
                     _mm256_sub_epi32(dot, _mm256_set1_epi32(8 * x.sum32[b])));
    }
    return acc;
  }
};

struct Q8_0 {
  using Block = BlockQ8_0;
  static constexpr size_t kBlock = 32;
  static constexpr size_t kPanels = 2;
  static constexpr size_t kTile = 3;
  static constexpr bool kFetches = false;
  struct Panel {
    Wide codes[8];
    __m256 d[8][2];  // [block][rows 0-7, 8-15]
  };
  using Side = WideSide;

  static void decode(const uint8_t* const rows[16], size_t first, size_t n, Panel* panel) {
    for (size_t b = 0; b < n; ++b) {
      const size_t at = (first + b) * sizeof(Block);
      for (int half = 0; half < 2; ++half) {
        const uint8_t* const* row = rows + 8 * half;
        for (int part = 0; part < 2; ++part) {
          __m256i v[4];
          transpose16(row, at + 2 + 16 * static_cast<size_t>(part), v);
          for (int s = 0; s < 4; ++s) {
            store(panel->codes[b].codes[8 * part + 2 * s] + 16 * half, even_bytes(v[s]));
            store(panel->codes[b].codes[8 * part + 2 * s + 1] + 16 * half, odd_bytes(v[s]));
          }
        }
        panel->d[b][half] = load_f16(row, at);
      }
    }
  }

  static void prepare(const Token& x, size_t n, Side* side) { prepare_wide(x.q, n, side); }

  template <int kTokens>
  PE_NOINLINE static void multiply(const Panel& panel, const Slice<Q8_0, kTokens>& x, size_t n, float* acc,
                                   size_t stride) {
    for (size_t b = 0; b < n; ++b) {
      __m256i sum[kTokens][2];
      for (int t = 0; t < kTokens; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
      chain_wide<kTokens>(panel.codes[b], x.side, b, sum);
      add_block(panel.d[b], x.scale, b, sum, acc, stride);
    }
  }

  template <int kTokens>
  PE_NOINLINE static void fused8(const uint8_t* const rows[8], const Token* x, size_t blocks, const uint8_t* ahead,
                                 __m256* acc) {
    const int8_t* q[kTokens];
    for (int t = 0; t < kTokens; ++t) q[t] = x[t].q;
    for (size_t b = 0; b < blocks; ++b) {
      const size_t at = b * sizeof(Block);
      prefetch(ahead + 8 * at, 8 * sizeof(Block));
      __m256i v[8], whole[kTokens];
      transpose16(rows, at + 2, v);
      transpose16(rows, at + 18, v + 4);
      PE_UNROLL
      for (int i = 0; i < 8; ++i) pin(v[i]);
      PE_UNROLL
      for (int i = 0; i < 8; ++i) {
        const __m256i codes = _mm256_abs_epi8(v[i]);
        PE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          // as in dot8: a pair is at most 32512
          const __m256i signed_q = _mm256_sign_epi8(broadcast32(q[t] + 4 * i), v[i]);
          const __m256i p = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, signed_q), _mm256_set1_epi16(1));
          whole[t] = i == 0 ? p : _mm256_add_epi32(whole[t], p);
          pin(whole[t]);
        }
      }
      const __m256 d = load_f16(rows, at);
      forget(acc);  // or it takes registers that the chains need
      PE_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        acc[t] = add_term(acc[t], d, _mm256_set1_ps(x[t].scale[b]), whole[t]);
        q[t] += 32;
      }
    }
  }

  static __m256 dot8(const uint8_t* const rows[8], const Token& x, size_t blocks, const uint8_t* ahead) {
    __m256 acc = _mm256_setzero_ps();
    for (size_t b = 0; b < blocks; ++b) {
      const size_t at = b * sizeof(Block);
      prefetch(ahead + 8 * at, 8 * sizeof(Block));
      const __m256i q = load(x.q + 32 * b);
      __m256i v[8];
      for (int r = 0; r < 8; ++r) {
        const __m256i w = load(rows[r] + at + 2);
        // |w| <= 128 as unsigned, |q| <= 127: a pair is at most 32512
        const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w));
        v[r] = _mm256_madd_epi16(products, _mm256_set1_epi16(1));
      }
      acc = add_term(acc, load_f16(rows, at), _mm256_set1_ps(x.scale[b]), fold8(v));
    }
    return acc;
  }
};

}  // namespace

void avx2_linear_q32(KernelTable* table) {
  table->linear[static_cast<int>(Format::Q4_0)] = linear<Q4_0>;
  table->linear[static_cast<int>(Format::Q8_0)] = linear<Q8_0>;
}

}  // namespace pe
