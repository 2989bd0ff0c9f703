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

// Sub-blocks are multiplied in pairs: int16 lane 2 r of a chain belongs to row r and the first of them, lane 2 r + 1 to the
// second, and a step is two columns of each. Pairs: (0, 2), (1, 3), (4, 6), (5, 7), whose nibbles lie in the same half bytes.
struct PanelK4 {
  uint8_t codes[4][16][64];  // [pair][step][4 row + 2 sub-block + column]
  __m256i scale[4][2];       // [pair][rows 0-7, 8-15]: per row (sc, sc)
  __m256i min[2][4];
  __m256 d[2], dmin[2];
};

// The sums of a block and its minima, which the chains leave no registers for.
template <int kTokens>
struct Work {
  __m256i whole[kTokens][2];
  __m256 min[kTokens][2];
};

struct SideK4 {
  alignas(32) int8_t q[4][64];  // [pair][step][2 sub-block + column]
  int16_t sum[8];               // of each sub-block's activations
  bool small;

  void prepare(const Token& x) {
    small = are_small(x.q);
    memcpy(sum, x.sum32, sizeof sum);
    for (int p = 0; p < 4; ++p) {
      const int8_t* from = x.q + 128 * (p / 2) + 32 * (p % 2);
      const __m256i a = load(from), b = load(from + 64);
      const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
      store(q[p], _mm256_permute2x128_si256(low, high, 0x20));
      store(q[p] + 32, _mm256_permute2x128_si256(low, high, 0x31));
    }
  }
};

// The panel's kPairs pairs of sub-blocks, 64 / kPairs steps each, times the scales. kSteps: of a chain, whose lanes end as
// 2 kSteps products. centre: where chain c of pair p starts, at kPairs c + p, pairs of int16; none: at 0.
template <class K, int kTokens, int kPairs, int kSteps, bool kCentred>
inline void multiply_pairs(const typename K::Panel& panel, const int8_t* const q[kTokens],
                           const int32_t* const centre[kTokens], const uint8_t* ahead, Work<kTokens>* work) {
  constexpr int kPair = 64 / kPairs;
  constexpr size_t kShare = kPanelRows * sizeof(typename K::Block) / kPairs;
  PE_LOOP
  for (int p = 0; p < kPairs; ++p) {
    if (ahead) prefetch(ahead + static_cast<size_t>(p) * kShare, kShare);
    PE_UNROLL
    for (int c = 0; c < kPair / kSteps; ++c) {
      forget(work);  // or the block's sums are kept in registers from chain to chain, and those on the stack
      __m256i sum[kTokens][2];
      PE_UNROLL
      for (int t = 0; kCentred && t < kTokens; ++t) sum[t][0] = sum[t][1] = broadcast32(centre[t] + kPairs * c + p);
      const int first = kSteps * c;
      chain<kTokens, kSteps, !kCentred>(panel.codes[p][first], q, 4 * static_cast<size_t>(kPair * p + first), sum);
      PE_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        PE_UNROLL
        for (int h = 0; h < 2; ++h) {
          __m256i v = _mm256_madd_epi16(sum[t][h], panel.scale[p][h]);
          if (c != 0 || p != 0) v = _mm256_add_epi32(v, work->whole[t][h]);
          work->whole[t][h] = v;
        }
      }
    }
  }
}

// Minima first: nothing waits for them, so that they fill the gaps between the chains.
template <class K, int kTokens, int kSteps>
PE_NOINLINE void multiply_k4(const PanelK4& panel, const Slice<K, kTokens>& x, float* acc, size_t stride,
                             Work<kTokens>* work) {
  const int8_t* q[kTokens];
  PE_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    q[t] = x.side[t].q[0];
    forget(q[t]);
    PE_UNROLL
    for (int h = 0; h < 2; ++h) work->min[t][h] = _mm256_cvtepi32_ps(min_term(panel.min[h], x.side[t].sum));
  }
  multiply_pairs<K, kTokens, 4, kSteps, false>(panel, q, nullptr, x.ahead, work);
  PE_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    const __m256 a = _mm256_set1_ps(*x.scale[t]);
    PE_UNROLL
    for (int h = 0; h < 2; ++h) {
      float* to = acc + stride * static_cast<size_t>(t) + 8 * h;
      const __m256 f = add_term(_mm256_loadu_ps(to), panel.d[h], a, work->whole[t][h]);
      _mm256_storeu_ps(to, _mm256_fnmadd_ps(_mm256_mul_ps(panel.dmin[h], a), work->min[t][h], f));
    }
  }
}

template <class K, int kTokens>
inline bool all_small(const Slice<K, kTokens>& x) {
  bool small = true;
  for (int t = 0; t < kTokens; ++t) small = small && x.side[t].small;
  return small;
}

inline void decode_scales_k4(const uint8_t* const row[8], size_t at, int half, PanelK4* panel) {
  ScalesK4 s;
  scales_k4(row, at, &s);
  for (int p = 0; p < 4; ++p) {
    const int first = 4 * (p / 2) + p % 2;
    panel->scale[p][half] = _mm256_blend_epi16(s.scale[first], s.scale[first + 2], 0xaa);
  }
  for (int j = 0; j < 4; ++j) panel->min[half][j] = s.min[j];
  panel->d[half] = s.d;
  panel->dmin[half] = s.dmin;
}

// What a block of few tokens leaves in memory, because the chains need the registers.
template <class K, int kTokens>
struct FusedK4 {
  ScalesK4 scales;
  typename K::High high;
  __m256i whole[kTokens];
};

// One block of 8 rows times few tokens. K::High joins what of a block's codes is not nibbles; K::kFusedSteps steps are a chain.
template <class K, int kTokens>
PE_NOINLINE void fused_block_k4(const uint8_t* const rows[8], size_t at, const int8_t* const q[kTokens],
                                const uint8_t* ahead, FusedK4<K, kTokens>* work) {
  constexpr int kSteps = K::kFusedSteps;
  scales_k4(rows, at, &work->scales);
  work->high.decode(rows, at);
  PE_LOOP
  for (int j = 0; j < 4; ++j) {  // sub-blocks 2 j and 2 j + 1, in the same bytes
    constexpr size_t kShare = 2 * sizeof(typename K::Block);
    prefetch(ahead + static_cast<size_t>(j) * kShare, kShare);
    __m256i v[8];
    const size_t from = at + offsetof(typename K::Block, qs) + 32 * static_cast<size_t>(j);
    transpose16(rows, from, v);
    transpose16(rows, from + 16, v + 4);
    PE_UNROLL
    for (int i = 0; i < 8; ++i) pin(v[i]);
    PE_UNROLL
    for (int n = 0; n < 2; ++n) {
      PE_UNROLL
      for (int c = 0; c < 8; c += kSteps) {
        __m256i sum[kTokens];
        PE_UNROLL
        for (int i = c; i < c + kSteps; ++i) {
          const __m256i nibbles = n == 0 ? low_nibbles(v[i]) : high_nibbles(v[i]);
          const size_t column = static_cast<size_t>(64 * j + 32 * n + 4 * i);
          step8<kTokens>(work->high.join(nibbles, 2 * j + n, i), q, column, i == c, sum);
        }
        forget(work);
        PE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          __m256i p = _mm256_madd_epi16(sum[t], work->scales.scale[2 * j + n]);
          if (j != 0 || n != 0 || c != 0) p = _mm256_add_epi32(p, work->whole[t]);
          work->whole[t] = p;
        }
      }
    }
  }
}

template <class K, int kTokens>
inline void fused8_k4(const uint8_t* const rows[8], const Token* x, size_t blocks, const uint8_t* ahead, __m256* acc) {
  FusedK4<K, kTokens> work;
  for (size_t b = 0; b < blocks; ++b) {
    const size_t at = b * sizeof(typename K::Block);
    const int8_t* q[kTokens];
    for (int t = 0; t < kTokens; ++t) q[t] = x[t].q + 256 * b;
    fused_block_k4<K, kTokens>(rows, at, q, ahead + 8 * at, &work);
    const ScalesK4& s = work.scales;
    for (int t = 0; t < kTokens; ++t) {
      const __m256 a = _mm256_set1_ps(x[t].scale[b]);
      const __m256 f = add_term(acc[t], s.d, a, work.whole[t]);
      acc[t] = subtract_term(f, s.dmin, a, min_term(s.min, x[t].sum32 + 8 * b));
    }
  }
}

struct Q4_K {
  using Block = BlockQ4_K;
  static constexpr size_t kBlock = 256;
  static constexpr size_t kPanels = 4;
  static constexpr size_t kTile = 4;
  static constexpr bool kFetches = true;
  using Panel = PanelK4;
  using Side = SideK4;
  static void prepare(const Token& x, size_t, Side* side) { side->prepare(x); }

  static void decode(const uint8_t* const rows[16], size_t first, size_t, Panel* panel) {
    const size_t at = first * sizeof(Block);
    PE_LOOP
    for (int half = 0; half < 2; ++half) {
      const uint8_t* const* row = rows + 8 * half;
      decode_scales_k4(row, at, half, panel);
      PE_UNROLL
      for (int c = 0; c < 4; ++c) {  // 16 bytes of two sub-blocks: steps 8 (c % 2) .. of pairs c / 2 * 2 and the next
        __m256i v[8];
        const size_t from =
            at + offsetof(Block, qs) + 64 * static_cast<size_t>(c / 2) + 16 * static_cast<size_t>(c % 2);
        transpose_pairs(row, from, from + 32, v);
        PE_UNROLL
        for (int s = 0; s < 8; ++s) {
          store(panel->codes[c / 2 * 2][c % 2 * 8 + s] + 32 * half, low_nibbles(v[s]));
          store(panel->codes[c / 2 * 2 + 1][c % 2 * 8 + s] + 32 * half, high_nibbles(v[s]));
        }
      }
    }
  }

  template <int kTokens>
  static void multiply(const Panel& panel, const Slice<Q4_K, kTokens>& x, size_t, float* acc, size_t stride) {
    // A lane ends as products of 0 .. 15: 32 of small activations, at most 30690, or 16 of others, at most 30480.
    Work<kTokens> work;
    all_small(x) ? multiply_k4<Q4_K, kTokens, 16>(panel, x, acc, stride, &work)
                 : multiply_k4<Q4_K, kTokens, 8>(panel, x, acc, stride, &work);
  }

  // A lane ends as 16 products of 0 .. 15 and +-127: at most 30480.
  static constexpr int kFusedSteps = 8;
  struct High {
    static void decode(const uint8_t* const*, size_t) {}
    static __m256i join(__m256i nibbles, int, int) { return nibbles; }
  };
  template <int kTokens>
  static void fused8(const uint8_t* const rows[8], const Token* x, size_t blocks, const uint8_t* ahead, __m256* acc) {
    fused8_k4<Q4_K, kTokens>(rows, x, blocks, ahead, acc);
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
  static constexpr size_t kTile = 4;
  static constexpr bool kFetches = true;
  using Panel = PanelK4;
  using Side = SideK4;
  static void prepare(const Token& x, size_t, Side* side) { side->prepare(x); }

  // Pairs 2 g and 2 g + 1: sub-blocks 4 g .. 4 g + 3.
  template <int kG>
  static void decode_pairs(const uint8_t* const row[8], size_t at, const __m256i high[16], int half, Panel* panel) {
    PE_UNROLL
    for (int part = 0; part < 2; ++part) {
      __m256i v[8];
      const size_t from = at + offsetof(Block, qs) + 64 * kG + 16 * static_cast<size_t>(part);
      transpose_pairs(row, from, from + 32, v);
      for (int s = 0; s < 8; ++s) {
        // bits 4 g, 4 g + 1 of the first sub-blocks' columns, bits 4 g + 2, 4 g + 3 of the second's
        const __m256i h = high[8 * part + s];
        const __m256i low = _mm256_blend_epi16(fifth_bit<4 * kG>(h), fifth_bit<4 * kG + 2>(h), 0xaa);
        const __m256i top = _mm256_blend_epi16(fifth_bit<4 * kG + 1>(h), fifth_bit<4 * kG + 3>(h), 0xaa);
        store(panel->codes[2 * kG][8 * part + s] + 32 * half, _mm256_or_si256(low_nibbles(v[s]), low));
        store(panel->codes[2 * kG + 1][8 * part + s] + 32 * half, _mm256_or_si256(high_nibbles(v[s]), top));
      }
    }
  }

  static void decode(const uint8_t* const rows[16], size_t first, size_t, Panel* panel) {
    const size_t at = first * sizeof(Block);
    PE_LOOP
    for (int half = 0; half < 2; ++half) {
      const uint8_t* const* row = rows + 8 * half;
      decode_scales_k4(row, at, half, panel);
      __m256i high[16];
      for (size_t part = 0; part < 2; ++part) {
        const size_t from = at + offsetof(Block, qh) + 16 * part;
        transpose_pairs(row, from, from, high + 8 * part);
      }
      decode_pairs<0>(row, at, high, half, panel);
      decode_pairs<1>(row, at, high, half, panel);
    }
  }

  template <int kTokens>
  static void multiply(const Panel& panel, const Slice<Q5_K, kTokens>& x, size_t, float* acc, size_t stride) {
    // A lane ends as products of 0 .. 31: 16 of small activations, at most 31713, or 8 of others, at most 31496.
    Work<kTokens> work;
    all_small(x) ? multiply_k4<Q5_K, kTokens, 8>(panel, x, acc, stride, &work)
                 : multiply_k4<Q5_K, kTokens, 4>(panel, x, acc, stride, &work);
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

  // A lane ends as 8 products of 0 .. 31 and +-127: at most 31496.
  static constexpr int kFusedSteps = 4;
  struct High {
    __m256i bits[8][8];  // [sub-block][step]: bit 4 of every byte
    template <int kSub>
    void place(const __m256i all[8]) {
      for (int i = 0; i < 8; ++i) bits[kSub][i] = fifth_bit<kSub>(all[i]);
    }
    void decode(const uint8_t* const row[8], size_t at) {
      __m256i all[8];
      transpose16(row, at + offsetof(Block, qh), all);
      transpose16(row, at + offsetof(Block, qh) + 16, all + 4);
      place<0>(all), place<1>(all), place<2>(all), place<3>(all);
      place<4>(all), place<5>(all), place<6>(all), place<7>(all);
    }
    __m256i join(__m256i nibbles, int sub_block, int step) const {
      return _mm256_or_si256(nibbles, bits[sub_block][step]);
    }
  };
  template <int kTokens>
  static void fused8(const uint8_t* const rows[8], const Token* x, size_t blocks, const uint8_t* ahead, __m256* acc) {
    fused8_k4<Q5_K, kTokens>(rows, x, blocks, ahead, acc);
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
    uint8_t codes[8][8][64];  // [pair of sub-blocks of 16][step][4 row + 2 sub-block + column], 0 .. 63
    __m256i scale[8][2];      // [pair][rows 0-7, 8-15]: per row (sc, sc)
    __m256 d[2];
  };
  struct Side {
    alignas(32) int8_t q[8][32];  // [pair][step][2 sub-block + column]
    int32_t centre[8];            // [pair]: where chains start, a pair of int16
    int32_t half[2][8];           // [steps 0-3, 4-7][pair]: the same for chains of half the length
    bool small;
  };
  static constexpr size_t kPanels = 4;
  static constexpr size_t kTile = 4;
  static constexpr bool kFetches = true;

  static void prepare(const Token& x, size_t, Side* side) {
    __m256i sum[8];  // [pair]: of each step, as pairs of int16
    for (int p = 0; p < 8; ++p) {
      const __m256i both = _mm256_permute4x64_epi64(load(x.q + 32 * p), 0xd8);
      const __m256i pairs = _mm256_unpacklo_epi16(both, _mm256_srli_si256(both, 8));
      store(side->q[p], pairs);
      sum[p] = _mm256_maddubs_epi16(_mm256_set1_epi8(1), pairs);
    }
    const auto add = [](__m256i a, __m256i b) {
      return _mm256_add_epi16(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    };
    const auto add4 = [&](const __m256i v[4]) {  // of each v its four steps, in both halves
      const __m256i a = add(v[0], v[1]), b = add(v[2], v[3]);
      const __m256i total = _mm256_add_epi16(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
      return _mm256_mullo_epi16(total, _mm256_set1_epi16(-32));
    };
    const __m256i a = add4(sum), b = add4(sum + 4);
    store(side->half[0], _mm256_permute2x128_si256(a, b, 0x20));
    store(side->half[1], _mm256_permute2x128_si256(a, b, 0x31));
    store(side->centre, _mm256_add_epi16(load(side->half[0]), load(side->half[1])));
    side->small = are_small(x.q);
  }

  static void decode(const uint8_t* const rows[16], size_t first, size_t, Panel* panel) {
    const size_t at = first * sizeof(Block);
    PE_LOOP
    for (int half = 0; half < 2; ++half) {
      const uint8_t* const* row = rows + 8 * half;
      __m256i v[4];
      transpose16(row, at + offsetof(Block, scales), v);
      for (int p = 0; p < 8; ++p) {
        const __m256i unsigned_pair = byte_pair(v[p / 2], 2 * p % 4, 2 * p % 4 + 1);
        panel->scale[p][half] = _mm256_srai_epi16(_mm256_slli_epi16(unsigned_pair, 8), 8);
      }
      panel->d[half] = load_f16(row, at + offsetof(Block, d));
      PE_UNROLL
      for (size_t h = 0; h < 2; ++h) {  // 128 codes: 32 bytes of qh, twice 32 of ql
        __m256i high[8], low[8];
        const size_t qh = at + offsetof(Block, qh) + 32 * h, ql = at + offsetof(Block, ql) + 64 * h;
        transpose_pairs(row, qh, qh + 16, high);
        uint8_t* to = panel->codes[4 * h][0] + 32 * half;
        constexpr size_t kPair = sizeof panel->codes[0];
        transpose_pairs(row, ql, ql + 16, low);
        PE_UNROLL
        for (size_t s = 0; s < 8; ++s) {
          store(to + 64 * s, _mm256_or_si256(low_nibbles(low[s]), top_bits<0>(high[s])));
          store(to + 64 * s + 2 * kPair, _mm256_or_si256(high_nibbles(low[s]), top_bits<4>(high[s])));
        }
        transpose_pairs(row, ql + 32, ql + 48, low);
        PE_UNROLL
        for (size_t s = 0; s < 8; ++s) {
          store(to + 64 * s + kPair, _mm256_or_si256(low_nibbles(low[s]), top_bits<2>(high[s])));
          store(to + 64 * s + 3 * kPair, _mm256_or_si256(high_nibbles(low[s]), top_bits<6>(high[s])));
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

  template <int kTokens, int kSteps>
  PE_NOINLINE static void multiply_steps(const Panel& panel, const Slice<Q6_K, kTokens>& x, float* acc, size_t stride,
                                         Work<kTokens>* work) {
    const int8_t* q[kTokens];
    const int32_t* centre[kTokens];
    PE_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      q[t] = x.side[t].q[0];
      forget(q[t]);
      centre[t] = kSteps == 8 ? x.side[t].centre : x.side[t].half[0];
    }
    multiply_pairs<Q6_K, kTokens, 8, kSteps, true>(panel, q, centre, x.ahead, work);
    add_block(panel.d, x.scale, 0, work->whole, acc, stride);
  }

  template <int kTokens>
  static void multiply(const Panel& panel, const Slice<Q6_K, kTokens>& x, size_t, float* acc, size_t stride) {
    // A lane ends as products of -32 .. 31: 16 of small activations, at most 32736, or 8 of others, at most 32512.
    Work<kTokens> work;
    all_small(x) ? multiply_steps<kTokens, 8>(panel, x, acc, stride, &work)
                 : multiply_steps<kTokens, 4>(panel, x, acc, stride, &work);
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

  template <int kTokens>
  struct Fused {
    __m256i scale[16], whole[kTokens];
    int32_t centre[kTokens][16];  // where the chains of a sub-block start, pairs of int16
  };

  // Sub-block `sub`, 16 columns, whose codes are nibbles of v and bits kFrom, kFrom + 1 of high, times few tokens. A lane
  // ends as 8 products of -32 .. 31 and +-127: at most 32512.
  template <int kTokens, int kFrom>
  static void fused_sub_block(const __m256i v[4], const __m256i high[4], const int8_t* const q[kTokens], size_t sub,
                              Fused<kTokens>* work) {
    forget(work);
    __m256i sum[kTokens];
    PE_UNROLL
    for (int t = 0; t < kTokens; ++t) sum[t] = broadcast32(&work->centre[t][sub]);
    PE_UNROLL
    for (size_t i = 0; i < 4; ++i) {
      const __m256i nibbles = kFrom < 4 ? low_nibbles(v[i]) : high_nibbles(v[i]);
      step8<kTokens>(_mm256_or_si256(nibbles, top_bits<kFrom>(high[i])), q, 16 * sub + 4 * i, false, sum);
    }
    PE_UNROLL
    for (int t = 0; t < kTokens; ++t)
      work->whole[t] = _mm256_add_epi32(work->whole[t], _mm256_madd_epi16(sum[t], work->scale[sub]));
  }

  template <int kTokens>
  PE_NOINLINE static void fused_block(const uint8_t* const rows[8], size_t at, const int8_t* const q[kTokens],
                                      const uint8_t* ahead, Fused<kTokens>* work) {
    __m256i v[4];
    transpose16(rows, at + offsetof(Block, scales), v);
    for (int i = 0; i < 16; ++i) {
      const __m256i unsigned_pair = byte_pair(v[i / 4], i % 4, i % 4);
      work->scale[i] = _mm256_srai_epi16(_mm256_slli_epi16(unsigned_pair, 8), 8);
    }
    for (int t = 0; t < kTokens; ++t) work->whole[t] = _mm256_setzero_si256();
    PE_LOOP
    for (size_t part = 0; part < 4; ++part) {  // 16 bytes of qh, twice 16 of ql: columns 32 apart
      constexpr size_t kShare = 2 * sizeof(Block);
      prefetch(ahead + part * kShare, kShare);
      const size_t ql = at + offsetof(Block, ql) + 64 * (part / 2) + 16 * (part % 2);
      const size_t sub = 8 * (part / 2) + part % 2;
      __m256i high[4];
      transpose16(rows, at + offsetof(Block, qh) + 16 * part, high);
      transpose16(rows, ql, v);
      fused_sub_block<kTokens, 0>(v, high, q, sub, work);
      fused_sub_block<kTokens, 4>(v, high, q, sub + 4, work);
      transpose16(rows, ql + 32, v);
      fused_sub_block<kTokens, 2>(v, high, q, sub + 2, work);
      fused_sub_block<kTokens, 6>(v, high, q, sub + 6, work);
    }
  }

  template <int kTokens>
  static void fused8(const uint8_t* const rows[8], const Token* x, size_t blocks, const uint8_t* ahead, __m256* acc) {
    Fused<kTokens> work;
    for (size_t b = 0; b < blocks; ++b) {
      const size_t at = b * sizeof(Block);
      const int8_t* q[kTokens];
      for (int t = 0; t < kTokens; ++t) {
        q[t] = x[t].q + 256 * b;
        centre16(x[t].sum + 32 * b, 32, work.centre[t]);
      }
      fused_block<kTokens>(rows, at, q, ahead + 8 * at, &work);
      const __m256 d = load_f16(rows, at + offsetof(Block, d));
      for (int t = 0; t < kTokens; ++t) acc[t] = add_term(acc[t], d, _mm256_set1_ps(x[t].scale[b]), work.whole[t]);
    }
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
  table->linear_rows = kBlockRows;
  table->linear[static_cast<int>(Format::Q4_K)] = linear<Q4_K>;
  table->linear[static_cast<int>(Format::Q5_K)] = linear<Q5_K>;
  table->linear[static_cast<int>(Format::Q6_K)] = linear<Q6_K>;
}

}  // namespace pe
