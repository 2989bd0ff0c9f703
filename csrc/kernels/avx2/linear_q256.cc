// Linear for Q4_K, Q5_K and Q6_K: 256 weights with integer scales per sub-block, float work once per block.
// tile.h explains the shape of the loops.
#include "kernels/avx2/tile.h"
#include "kernels/tiers.h"

namespace pe {
namespace {

// The eight 6-bit scales and minima of 8 rows, as pairs of int16 ready for vpmaddwd, and the rows' fp16 scales.
struct ScalesK4 {
  __m256i scale[8];  // [sub-block]: per row (sc, sc)
  __m256i min[4];    // [pair of sub-blocks]: per row (mn of 2 j, mn of 2 j + 1)
  __m256 d, dmin;
};

// A block begins with d, dmin and 12 bytes of scales: 16 bytes, dwords (d dmin), 0-3, 4-7, 8-11 (formats.h).
inline void scales_k4(const uint8_t* const row[8], size_t at, ScalesK4* out) {
  __m256i v[4];
  transpose16(row, at, v);
  const __m256i six = _mm256_set1_epi8(63), two = _mm256_set1_epi8(0x30);
  const __m256i scale[2] = {_mm256_and_si256(v[1], six),
                            _mm256_or_si256(low_nibbles(v[3]), _mm256_and_si256(_mm256_srli_epi16(v[1], 2), two))};
  const __m256i min[2] = {_mm256_and_si256(v[2], six),
                          _mm256_or_si256(high_nibbles(v[3]), _mm256_and_si256(_mm256_srli_epi16(v[2], 2), two))};
  for (int j = 0; j < 8; ++j) out->scale[j] = byte_pair(scale[j / 4], j % 4, j % 4);
  for (int j = 0; j < 4; ++j) out->min[j] = byte_pair(min[j / 2], 2 * j % 4, 2 * j % 4 + 1);
  // Halves of the first dwords: 8 x (d, dmin) -> 8 d, 8 dmin.
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                         0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  const __m256i sorted = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(v[0], order), 0xd8);
  out->d = _mm256_cvtph_ps(_mm256_castsi256_si128(sorted));
  out->dmin = _mm256_cvtph_ps(_mm256_extracti128_si256(sorted, 1));
}

// The term of the minima for 8 rows: sum over sub-blocks of min * sum of activations.
inline __m256i min_term(const __m256i* min, const int16_t sum[8]) {
  const __m256i a = _mm256_add_epi32(_mm256_madd_epi16(load(min), broadcast32(sum)),
                                     _mm256_madd_epi16(load(min + 1), broadcast32(sum + 2)));
  const __m256i b = _mm256_add_epi32(_mm256_madd_epi16(load(min + 2), broadcast32(sum + 4)),
                                     _mm256_madd_epi16(load(min + 3), broadcast32(sum + 6)));
  return _mm256_add_epi32(a, b);
}

// ---- Q4_K, Q5_K ----

struct PanelK4 {
  uint8_t codes[8][8][64];  // [sub-block][step][4 row + column]
  __m256i scale[8][2];      // [sub-block][rows 0-7, 8-15]
  __m256i min[2][4];
  __m256 d[2], dmin[2];
};

struct SideK4 {
  const int16_t* sum;  // of each sub-block's activations
};

// kChains per sub-block: 16 products a lane of codes 0 .. 15 end within +-30480; of 0 .. 31 only 8 fit (31496).
template <int kTokens, int kChains, class K>
void multiply_k4(const PanelK4& panel, const Slice<K, kTokens>& x, float* acc, size_t stride) {
  constexpr int kSteps = 8 / kChains;
  __m256i whole[kTokens][2];
  for (int t = 0; t < kTokens; ++t) whole[t][0] = whole[t][1] = _mm256_setzero_si256();
  for (int j = 0; j < 8; ++j) {
    for (int c = 0; c < kChains; ++c) {
      __m256i sum[kTokens][2];
      chain<kTokens, kSteps, true>(panel.codes[j][kSteps * c], x.q, 32 * j + 4 * kSteps * c, sum);
      for (int t = 0; t < kTokens; ++t) {
        for (int h = 0; h < 2; ++h) {
          whole[t][h] = _mm256_add_epi32(whole[t][h], _mm256_madd_epi16(sum[t][h], panel.scale[j][h]));
        }
      }
    }
  }
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

inline void decode_scales_k4(const uint8_t* const row[8], size_t at, int half, PanelK4* panel) {
  ScalesK4 s;
  scales_k4(row, at, &s);
  for (int j = 0; j < 8; ++j) panel->scale[j][half] = s.scale[j];
  for (int j = 0; j < 4; ++j) panel->min[half][j] = s.min[j];
  panel->d[half] = s.d;
  panel->dmin[half] = s.dmin;
}

struct Q4_K {
  using Block = BlockQ4_K;
  static constexpr size_t kBlock = 256;
  static constexpr size_t kPanels = 4;
  using Panel = PanelK4;
  using Side = SideK4;
  static void prepare(const Token& x, size_t, Side* side) { side->sum = x.sum32; }

  static void decode(const uint8_t* const rows[16], size_t first, size_t, Panel* panel) {
    const size_t at = first * sizeof(Block);
    for (int half = 0; half < 2; ++half) {
      const uint8_t* const* row = rows + 8 * half;
      decode_scales_k4(row, at, half, panel);
      for (int c = 0; c < 8; ++c) {  // 16 bytes: steps 4 (c % 2) .. of sub-blocks c / 2 * 2 and the next
        __m256i v[4];
        transpose16(row, at + offsetof(Block, qs) + 16 * static_cast<size_t>(c), v);
        for (int s = 0; s < 4; ++s) {
          store(panel->codes[c / 2 * 2][c % 2 * 4 + s] + 32 * half, low_nibbles(v[s]));
          store(panel->codes[c / 2 * 2 + 1][c % 2 * 4 + s] + 32 * half, high_nibbles(v[s]));
        }
      }
    }
  }

  template <int kTokens>
  PE_NOINLINE static void multiply(const Panel& panel, const Slice<Q4_K, kTokens>& x, size_t, float* acc,
                                   size_t stride) {
    multiply_k4<kTokens, 1>(panel, x, acc, stride);
  }

  static __m256 dot8(const uint8_t* const rows[8], const Token& x, size_t blocks, const uint8_t* ahead) {
    __m256 acc = _mm256_setzero_ps();
    for (size_t b = 0; b < blocks; ++b) {
      const size_t at = b * sizeof(Block);
      ScalesK4 s;
      scales_k4(rows, at, &s);
      __m256i v[8];
      for (int r = 0; r < 8; ++r) {
        prefetch(ahead + 8 * at + static_cast<size_t>(r) * sizeof(Block), sizeof(Block));
        __m256i whole = _mm256_setzero_si256();
        for (int c = 0; c < 4; ++c) {
          const __m256i packed = load(rows[r] + at + offsetof(Block, qs) + 32 * static_cast<size_t>(c));
          const __m256i low = _mm256_maddubs_epi16(low_nibbles(packed), load(x.q + 256 * b + 64 * c));
          const __m256i high = _mm256_maddubs_epi16(high_nibbles(packed), load(x.q + 256 * b + 64 * c + 32));
          whole = _mm256_add_epi32(
              whole, _mm256_madd_epi16(low, broadcast32(reinterpret_cast<int32_t*>(&s.scale[2 * c]) + r)));
          whole = _mm256_add_epi32(
              whole, _mm256_madd_epi16(high, broadcast32(reinterpret_cast<int32_t*>(&s.scale[2 * c + 1]) + r)));
        }
        v[r] = whole;
      }
      const __m256 a = _mm256_set1_ps(x.scale[b]);
      acc = add_term(acc, s.d, a, fold8(v));
      acc = subtract_term(acc, s.dmin, a, min_term(s.min, x.sum32 + 8 * b));
    }
    return acc;
  }
};

// Bit `from` of every byte, moved to bit 4.
template <int kFrom>
inline __m256i fifth_bit(__m256i v) {
  const __m256i moved =
      kFrom > 4 ? _mm256_srli_epi16(v, kFrom > 4 ? kFrom - 4 : 0) : _mm256_slli_epi16(v, kFrom > 4 ? 0 : 4 - kFrom);
  return _mm256_and_si256(moved, _mm256_set1_epi8(16));
}

struct Q5_K {
  using Block = BlockQ5_K;
  static constexpr size_t kBlock = 256;
  static constexpr size_t kPanels = 4;
  using Panel = PanelK4;
  using Side = SideK4;
  static void prepare(const Token& x, size_t, Side* side) { side->sum = x.sum32; }

  // Sub-blocks 2 c and 2 c + 1.
  template <int kC>
  static void decode_pair(const uint8_t* const row[8], size_t at, const __m256i high[8], int half, Panel* panel) {
    for (int part = 0; part < 2; ++part) {
      __m256i v[4];
      transpose16(row, at + offsetof(Block, qs) + 32 * kC + 16 * static_cast<size_t>(part), v);
      for (int s = 0; s < 4; ++s) {
        const __m256i h = high[4 * part + s];
        store(panel->codes[2 * kC][4 * part + s] + 32 * half, _mm256_or_si256(low_nibbles(v[s]), fifth_bit<2 * kC>(h)));
        store(panel->codes[2 * kC + 1][4 * part + s] + 32 * half,
              _mm256_or_si256(high_nibbles(v[s]), fifth_bit<2 * kC + 1>(h)));
      }
    }
  }

  static void decode(const uint8_t* const rows[16], size_t first, size_t, Panel* panel) {
    const size_t at = first * sizeof(Block);
    for (int half = 0; half < 2; ++half) {
      const uint8_t* const* row = rows + 8 * half;
      decode_scales_k4(row, at, half, panel);
      __m256i high[8];
      transpose16(row, at + offsetof(Block, qh), high);
      transpose16(row, at + offsetof(Block, qh) + 16, high + 4);
      decode_pair<0>(row, at, high, half, panel);
      decode_pair<1>(row, at, high, half, panel);
      decode_pair<2>(row, at, high, half, panel);
      decode_pair<3>(row, at, high, half, panel);
    }
  }

  template <int kTokens>
  PE_NOINLINE static void multiply(const Panel& panel, const Slice<Q5_K, kTokens>& x, size_t, float* acc,
                                   size_t stride) {
    multiply_k4<kTokens, 2>(panel, x, acc, stride);
  }

  // Sub-blocks 2 c and 2 c + 1 of one row against q (from the block on).
  template <int kC>
  static __m256i dot_pair(const uint8_t* block, __m256i high, const int8_t* q, const ScalesK4& s, int r) {
    const __m256i packed = load(block + offsetof(Block, qs) + 32 * kC);
    const __m256i a = _mm256_or_si256(low_nibbles(packed), fifth_bit<2 * kC>(high));
    const __m256i b = _mm256_or_si256(high_nibbles(packed), fifth_bit<2 * kC + 1>(high));
    const __m256i x = _mm256_maddubs_epi16(a, load(q + 64 * kC));
    const __m256i y = _mm256_maddubs_epi16(b, load(q + 64 * kC + 32));
    return _mm256_add_epi32(
        _mm256_madd_epi16(x, broadcast32(reinterpret_cast<const int32_t*>(&s.scale[2 * kC]) + r)),
        _mm256_madd_epi16(y, broadcast32(reinterpret_cast<const int32_t*>(&s.scale[2 * kC + 1]) + r)));
  }

  static __m256 dot8(const uint8_t* const rows[8], const Token& x, size_t blocks, const uint8_t* ahead) {
    __m256 acc = _mm256_setzero_ps();
    for (size_t b = 0; b < blocks; ++b) {
      const size_t at = b * sizeof(Block);
      ScalesK4 s;
      scales_k4(rows, at, &s);
      const int8_t* q = x.q + 256 * b;
      __m256i v[8];
      for (int r = 0; r < 8; ++r) {
        prefetch(ahead + 8 * at + static_cast<size_t>(r) * sizeof(Block), sizeof(Block));
        const uint8_t* block = rows[r] + at;
        const __m256i high = load(block + offsetof(Block, qh));
        v[r] = _mm256_add_epi32(_mm256_add_epi32(dot_pair<0>(block, high, q, s, r), dot_pair<1>(block, high, q, s, r)),
                                _mm256_add_epi32(dot_pair<2>(block, high, q, s, r), dot_pair<3>(block, high, q, s, r)));
      }
      const __m256 a = _mm256_set1_ps(x.scale[b]);
      acc = add_term(acc, s.d, a, fold8(v));
      acc = subtract_term(acc, s.dmin, a, min_term(s.min, x.sum32 + 8 * b));
    }
    return acc;
  }
};

// ---- Q6_K ----

struct Q6_K {
  using Block = BlockQ6_K;
  static constexpr size_t kBlock = 256;
  struct Panel {
    uint8_t codes[16][4][64];  // [sub-block of 16][step][4 row + column], 0 .. 63
    __m256i scale[16][2];      // [sub-block][rows 0-7, 8-15]: per row (sc, sc)
    __m256 d[2];
  };
  struct Side {
    int32_t centre[16];  // [sub-block]: a pair of int16
  };
  static constexpr size_t kPanels = 4;

  static void prepare(const Token& x, size_t, Side* side) { centre16(x.sum, 32, side->centre); }

  static void decode(const uint8_t* const rows[16], size_t first, size_t, Panel* panel) {
    const size_t at = first * sizeof(Block);
    for (int half = 0; half < 2; ++half) {
      const uint8_t* const* row = rows + 8 * half;
      __m256i v[4];
      transpose16(row, at + offsetof(Block, scales), v);
      for (int j = 0; j < 16; ++j) {
        const __m256i unsigned_pair = byte_pair(v[j / 4], j % 4, j % 4);
        panel->scale[j][half] = _mm256_srai_epi16(_mm256_slli_epi16(unsigned_pair, 8), 8);
      }
      panel->d[half] = load_f16(row, at + offsetof(Block, d));
      for (int h = 0; h < 2; ++h) {             // 128 codes
        for (int part = 0; part < 2; ++part) {  // 16 bytes of qh: codes 32 s + 16 part .. of each s = 0 .. 3
          __m256i high[4], first_low[4], second_low[4];
          const size_t ql = at + offsetof(Block, ql) + 64 * static_cast<size_t>(h) + 16 * static_cast<size_t>(part);
          transpose16(row, at + offsetof(Block, qh) + 32 * static_cast<size_t>(h) + 16 * static_cast<size_t>(part),
                      high);
          transpose16(row, ql, first_low);
          transpose16(row, ql + 32, second_low);
          for (int s = 0; s < 4; ++s) {
            uint8_t* to = panel->codes[8 * h + part][s] + 32 * half;  // every second sub-block
            constexpr size_t kNext = 2 * sizeof panel->codes[0];
            store(to, _mm256_or_si256(low_nibbles(first_low[s]), top_bits<0>(high[s])));
            store(to + kNext, _mm256_or_si256(low_nibbles(second_low[s]), top_bits<2>(high[s])));
            store(to + 2 * kNext, _mm256_or_si256(high_nibbles(first_low[s]), top_bits<4>(high[s])));
            store(to + 3 * kNext, _mm256_or_si256(high_nibbles(second_low[s]), top_bits<6>(high[s])));
          }
        }
      }
    }
  }

  // Bits kFrom, kFrom + 1 of every byte, moved to bits 4, 5.
  template <int kFrom>
  static __m256i top_bits(__m256i v) {
    const __m256i moved =
        kFrom > 4 ? _mm256_srli_epi16(v, kFrom > 4 ? kFrom - 4 : 0) : _mm256_slli_epi16(v, kFrom > 4 ? 0 : 4 - kFrom);
    return _mm256_and_si256(moved, _mm256_set1_epi8(0x30));
  }

  template <int kTokens>
  PE_NOINLINE static void multiply(const Panel& panel, const Slice<Q6_K, kTokens>& x, size_t, float* acc,
                                   size_t stride) {
    __m256i whole[kTokens][2];
    for (int t = 0; t < kTokens; ++t) whole[t][0] = whole[t][1] = _mm256_setzero_si256();
    for (int j = 0; j < 16; ++j) {
      __m256i sum[kTokens][2];
      for (int t = 0; t < kTokens; ++t) sum[t][0] = sum[t][1] = broadcast32(&x.side[t].centre[j]);
      chain<kTokens, 4, false>(panel.codes[j][0], x.q, 16 * j, sum);
      // a lane ends as 8 products of -32 .. 31 and +-127: at most 32512
      for (int t = 0; t < kTokens; ++t) {
        for (int h = 0; h < 2; ++h) {
          whole[t][h] = _mm256_add_epi32(whole[t][h], _mm256_madd_epi16(sum[t][h], panel.scale[j][h]));
        }
      }
    }
    add_block(panel.d, x.scale, 0, whole, acc, stride);
  }

  // 32 codes times 32 activations times their two scales: sub-blocks 2 j and 2 j + 1 fill one 128-bit half each.
  template <int kJ>
  static __m256i dot32(__m256i codes, const int8_t* q, __m256i scales) {
    // scales: int16 of sub-blocks 0-7 (kJ < 4) or 8-15 in both halves
    constexpr int kLow = 4 * (kJ % 4), kHigh = kLow + 2;
    const __m256i spread = _mm256_setr_epi64x(
        0x0100010001000100 + kLow * 0x0101010101010101, 0x0100010001000100 + kLow * 0x0101010101010101,
        0x0100010001000100 + kHigh * 0x0101010101010101, 0x0100010001000100 + kHigh * 0x0101010101010101);
    const __m256i products = _mm256_maddubs_epi16(codes, load(q + 32 * kJ));  // pairs of 0 .. 63: within +-16002
    return _mm256_madd_epi16(products, _mm256_shuffle_epi8(scales, spread));
  }

  // Codes 128 h .. 128 h + 127 of one row; scales of their sub-blocks in both halves.
  template <int kH>
  static __m256i dot128(const uint8_t* block, const int8_t* q, __m256i scales) {
    const __m256i first = load(block + offsetof(Block, ql) + 64 * kH);
    const __m256i second = load(block + offsetof(Block, ql) + 64 * kH + 32);
    const __m256i high = load(block + offsetof(Block, qh) + 32 * kH);
    const __m256i a = dot32<4 * kH>(_mm256_or_si256(low_nibbles(first), top_bits<0>(high)), q, scales);
    const __m256i b = dot32<4 * kH + 1>(_mm256_or_si256(low_nibbles(second), top_bits<2>(high)), q, scales);
    const __m256i c = dot32<4 * kH + 2>(_mm256_or_si256(high_nibbles(first), top_bits<4>(high)), q, scales);
    const __m256i d = dot32<4 * kH + 3>(_mm256_or_si256(high_nibbles(second), top_bits<6>(high)), q, scales);
    return _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
  }

  static __m256 dot8(const uint8_t* const rows[8], const Token& x, size_t blocks, const uint8_t* ahead) {
    __m256 acc = _mm256_setzero_ps();
    for (size_t b = 0; b < blocks; ++b) {
      const size_t at = b * sizeof(Block);
      const int8_t* q = x.q + 256 * b;
      const __m256i sum = load(x.sum16 + 16 * b);
      __m256i v[8];
      for (int r = 0; r < 8; ++r) {
        prefetch(ahead + 8 * at + static_cast<size_t>(r) * sizeof(Block), sizeof(Block));
        const uint8_t* block = rows[r] + at;
        const __m256i scales = _mm256_cvtepi8_epi16(load128(block + offsetof(Block, scales)));
        const __m256i offset = _mm256_slli_epi32(_mm256_madd_epi16(scales, sum), 5);  // 32 * scale * sum
        const __m256i first = dot128<0>(block, q, _mm256_permute2x128_si256(scales, scales, 0x00));
        const __m256i second = dot128<1>(block, q, _mm256_permute2x128_si256(scales, scales, 0x11));
        v[r] = _mm256_sub_epi32(_mm256_add_epi32(first, second), offset);
      }
      const __m256 d = load_f16(rows, at + offsetof(Block, d));
      acc = add_term(acc, d, _mm256_set1_ps(x.scale[b]), fold8(v));
    }
    return acc;
  }
};

}  // namespace

void avx2_linear_q256(KernelTable* table) {
  table->linear_rows = 4 * kPanelRows;
  table->linear[static_cast<int>(Format::Q4_K)] = linear<Q4_K>;
  table->linear[static_cast<int>(Format::Q5_K)] = linear<Q5_K>;
  table->linear[static_cast<int>(Format::Q6_K)] = linear<Q6_K>;
}

}  // namespace pe
