// What the AVX2 linear kernels share: a panel of 16 rows laid out by columns, products chained in int16, the loops
// around.
//
// Many tokens. Weights are decoded 16 rows x 256 columns at a time into panels in the first-level cache, and every token of
// a batch is multiplied with them before the next are decoded. A step of the panel is 4 columns: 64 bytes, row r's four
// unsigned codes at 4 r. K::kTile tokens, three or four, are multiplied at once:
//
//   registers   2 panel halves (rows 0-7, 8-15), 1 broadcast of a token's 4 int8, 1 product, 6 or 8 int16 sums = 10 or 12;
//               with three the other 6 hold what outlives a sub-block (int32 or float sums), with four that lies in memory
//   per step    2 + 3 loads, 6 vpmaddubsw, 6 vpaddw for 192 products; or 2 + 4, 8, 8 for 256
//   bound       64 MAC/cycle where two vpmaddubsw and four of anything start a cycle (Zen 5). Additions take places of products:
//               57 is what a loop of nothing else reaches, tiles in the first-level cache too. Q4_K: 152 of the 290
//               instructions of a token's 256 columns of 16 rows are products: 54, or 48 at the rate of that loop
//   measured    Zen 5, multiply alone, from the first two caches: Q4_K 45, Q5_K 43, Q6_K 46.5
//
// int16 lane 2 r of a sum belongs to row r and columns 0, 1 of each step, lane 2 r + 1 to columns 2, 3. Additions wrap,
// so only the end of a chain has to fit. The bounds are stated where a chain ends.
//
// One token. Eight rows run side by side, codes in the order of the file; sums are folded across lanes once per 8 rows.
//
// Two to four tokens of a format that has K::fused8. Eight rows again, their codes transposed in registers and multiplied at
// once: a panel that so few share costs more than it saves, and the 16 rows fetched ahead beside it leave the first-level
// cache.
//
//   per step    1 load, 1 vpmaddubsw, 1 vpaddw a token for its 32 products
//   bound       Q4_K, four tokens, 256 columns of 16 rows: 1,650 vector instructions beside the loads, 412 cycles where four
//               start a cycle; with their loads such instructions run at three a cycle here even without dependencies: 550
//   measured    Zen 5: 550 from the first two caches, 590 from memory; by a panel 600 and 670
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernels/kernels.h"
#include "kernels/unroll.h"

namespace pe {
namespace {

constexpr size_t kPanelRows = 16;
constexpr size_t kPanelCols = 256;
constexpr size_t kMany = 128;       // tokens that meet a group of panels before the next is decoded
constexpr size_t kBlockRows = 256;  // rows that meet the same 256 columns of a batch: acc takes 128 KiB of the stack
constexpr size_t kFew = 8;          // tokens that meet weights as they come from memory

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
// 16 bytes, in both halves.
inline __m256i broadcast128(const void* p) { return _mm256_broadcastsi128_si256(load128(p)); }
inline void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline __m256i broadcast32(const void* p) {
  int32_t v;
  memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}
inline __m256i low_nibbles(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline __m256i high_nibbles(__m256i v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }

// A value the compiler must have in a register here. Without it all products of a chain are computed first, as
// additions may be reordered, and spilled, and the panel is loaded anew for every token.
inline void pin(__m256i& v) {
#if defined(__GNUC__)
  __asm__ volatile("" : "+x"(v));
#else
  (void)v;
#endif
}

// Leaves the compiler without knowledge of where p points.
template <class T>
inline void forget(T*& p) {
#if defined(__GNUC__)
  __asm__ volatile("" : "+r"(p));
#else
  (void)p;
#endif
}

// int16 ones, made where they are used: kept across a chain they take a register that it needs.
inline __m256i fresh_ones() {
  __m256i v = _mm256_set1_epi16(-1);
  pin(v);
  return _mm256_srli_epi16(v, 15);
}

// 16 bytes of rows r and r + 4, in one half each.
inline __m256i two_rows(const uint8_t* const row[8], int r, size_t at) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load128(row[r] + at)), load128(row[r + 4] + at), 1);
}

// Four dwords of rows r and r + 4 in v[r] -> out[s]: dword s of rows 0 .. 7.
inline void transpose_dwords(const __m256i v[4], __m256i out[4]) {
  const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpacklo_epi32(v[2], v[3]);
  const __m256i c = _mm256_unpackhi_epi32(v[0], v[1]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  out[0] = _mm256_unpacklo_epi64(a, b);
  out[1] = _mm256_unpackhi_epi64(a, b);
  out[2] = _mm256_unpacklo_epi64(c, d);
  out[3] = _mm256_unpackhi_epi64(c, d);
}

// 16 bytes from each of 8 rows -> out[s]: bytes 4 s .. 4 s + 3 of rows 0 .. 7.
inline void transpose16(const uint8_t* const row[8], size_t at, __m256i out[4]) {
  __m256i v[4];
  for (int i = 0; i < 4; ++i) v[i] = two_rows(row, i, at);
  transpose_dwords(v, out);
}

// 16 bytes at `at` and 16 at `next` of each of 8 rows -> out[s]: per row bytes 2 s, 2 s + 1 of the first and of the second.
inline void transpose_pairs(const uint8_t* const row[8], size_t at, size_t next, __m256i out[8]) {
  __m256i low[4], high[4];
  for (int i = 0; i < 4; ++i) {
    const __m256i a = two_rows(row, i, at), b = two_rows(row, i, next);
    low[i] = _mm256_unpacklo_epi16(a, b);
    high[i] = _mm256_unpackhi_epi16(a, b);
  }
  transpose_dwords(low, out);
  transpose_dwords(high, out + 4);
}

// Bytes `low` and `high` of each dword as a pair of int16, zero-extended.
inline __m256i byte_pair(__m256i v, int low, int high) {
  const int control = low | high << 16 | static_cast<int>(0x80008000u);
  const __m256i dword = _mm256_setr_epi32(0, 0x00040004, 0x00080008, 0x000c000c, 0, 0x00040004, 0x00080008, 0x000c000c);
  return _mm256_shuffle_epi8(v, _mm256_add_epi32(_mm256_set1_epi32(control), dword));
}

// The fp16 at byte `at` of 8 rows, as float.
inline __m256 load_f16(const uint8_t* const row[8], size_t at) {
  uint16_t h[8];
  for (int r = 0; r < 8; ++r) memcpy(&h[r], row[r] + at, 2);
  return _mm256_cvtph_ps(_mm_setr_epi16(static_cast<short>(h[0]), static_cast<short>(h[1]), static_cast<short>(h[2]),
                                        static_cast<short>(h[3]), static_cast<short>(h[4]), static_cast<short>(h[5]),
                                        static_cast<short>(h[6]), static_cast<short>(h[7])));
}

// The lanes of each block of 32 added up, times -offset: what a chain of the block starts from to centre its codes on 0.
// sum: the partial sums of 256 activations -> out: 8 pairs of int16.
inline void centre32(const int16_t* sum, short offset, int32_t out[8]) {
  const __m256 a = _mm256_castsi256_ps(load(sum)), b = _mm256_castsi256_ps(load(sum + 16));
  const __m256i lanes = _mm256_add_epi16(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)),
                                         _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)));
  store(out, _mm256_mullo_epi16(_mm256_permute4x64_epi64(lanes, 0xd8), _mm256_set1_epi16(static_cast<short>(-offset))));
}
// The same for blocks of 16: 16 pairs.
inline void centre16(const int16_t* sum, short offset, int32_t out[16]) {
  const __m256i factor = _mm256_set1_epi16(static_cast<short>(-offset));
  store(out, _mm256_mullo_epi16(load(sum), factor));
  store(out + 8, _mm256_mullo_epi16(load(sum + 16), factor));
}

// kSteps steps of the panel times kTokens tokens, from q[t] + at on: sum[t][rows 0-7, rows 8-15] becomes (kStart) or
// grows by the products.
template <int kTokens, int kSteps, bool kStart>
inline void chain(const uint8_t* codes, const int8_t* const q[kTokens], size_t at, __m256i sum[kTokens][2]) {
  PE_UNROLL
  for (int s = 0; s < kSteps; ++s) {
    __m256i w[2];
    PE_UNROLL
    for (int h = 0; h < 2; ++h) {
      w[h] = load(codes + 64 * s + 32 * h);
      pin(w[h]);
    }
    PE_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const __m256i x = broadcast32(q[t] + at + 4 * s);
      PE_UNROLL
      for (int h = 0; h < 2; ++h) {
        const __m256i p = _mm256_maddubs_epi16(w[h], x);
        sum[t][h] = kStart && s == 0 ? p : _mm256_add_epi16(sum[t][h], p);
        pin(sum[t][h]);
      }
    }
  }
}

// One step of 8 rows whose codes are in a register: sum[t] becomes (start) or grows by their products with the four
// activations at q[t] + at.
template <int kTokens>
inline void step8(__m256i codes, const int8_t* const q[kTokens], size_t at, bool start, __m256i sum[kTokens]) {
  PE_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    const __m256i p = _mm256_maddubs_epi16(codes, broadcast32(q[t] + at));
    sum[t] = start ? p : _mm256_add_epi16(sum[t], p);
    pin(sum[t]);
  }
}

// One token's activations: where their parts begin.
struct Token {
  const int8_t* q;
  const float* scale;
  const int16_t *sum, *sum16, *sum32;

  Token() = default;
  Token(const LinearArgs& args, const ActLayout& at, size_t token)
      : q(static_cast<const int8_t*>(args.x) + token * args.x_stride),
        scale(reinterpret_cast<const float*>(q + at.scale_at)),
        sum(reinterpret_cast<const int16_t*>(q + at.sum_at)),
        sum16(reinterpret_cast<const int16_t*>(q + at.sum16_at)),
        sum32(reinterpret_cast<const int16_t*>(q + at.sum32_at)) {}

  // Goes on to a later block.
  void skip(size_t blocks, size_t block) {
    const size_t n = blocks * block;
    q += n;
    scale += blocks;
    sum += n / 8;
    sum16 += n / 16;
    sum32 += n / 32;
  }
};

// 256 activations of kTokens tokens, with what K::prepare made of them.
template <class K, int kTokens>
struct Slice {
  const int8_t* q[kTokens];
  const float* scale[kTokens];
  const typename K::Side* side;
  const uint8_t* ahead;  // the next 16 rows' blocks, to be fetched meanwhile (K::kFetches); nullptr: nothing

  // Blocks from `first` on of tokens `token` ..
  Slice(const LinearArgs& args, const ActLayout& at, size_t token, size_t first, const typename K::Side* sides,
        const uint8_t* next)
      : side(sides), ahead(next) {
    for (size_t t = 0; t < kTokens; ++t) {
      Token x(args, at, token + t);
      x.skip(first, K::kBlock);
      q[t] = x.q;
      scale[t] = x.scale;
    }
  }
};

// Whether no 16 of 256 activations (of columns 16 i ..) add up to more than 1023 in magnitude, as all but unusual ones: then
// chains may be twice as long.
inline bool are_small(const int8_t* q) {
  __m256i most = _mm256_setzero_si256();
  for (int i = 0; i < 256; i += 64) {
    const __m256i a = _mm256_sad_epu8(_mm256_abs_epi8(load(q + i)), _mm256_setzero_si256());
    const __m256i b = _mm256_sad_epu8(_mm256_abs_epi8(load(q + i + 32)), _mm256_setzero_si256());
    most = _mm256_max_epi16(most, _mm256_add_epi64(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)));
  }
  return _mm256_testz_si256(_mm256_cmpgt_epi16(most, _mm256_set1_epi16(1023)), _mm256_set1_epi8(-1)) != 0;
}

// Codes of eight bits: pairs of their products saturate, so the panel holds int16 and every product of two columns goes to
// int32. A step is 2 columns, 16 of them a block of 32: even steps 2 s columns 4 s and 4 s + 2, odd ones 4 s + 1 and 4 s + 3.
struct Wide {
  int16_t codes[16][32];  // [step][2 row + column]
};
struct WideSide {
  alignas(32) int16_t q[8][2][16];  // [block][step mod 2][2 (step / 2) + column]
};
inline __m256i even_bytes(__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); }
inline __m256i odd_bytes(__m256i v) { return _mm256_srai_epi16(v, 8); }

inline void prepare_wide(const int8_t* q, size_t blocks, WideSide* side) {
  for (size_t b = 0; b < blocks; ++b) {
    const __m256i v = load(q + 32 * b);
    store(side->q[b][0], even_bytes(v));
    store(side->q[b][1], odd_bytes(v));
  }
}

template <int kTokens>
inline void chain_wide(const Wide& wide, const WideSide* side, size_t block, __m256i sum[kTokens][2]) {
  // Unrolled by request: as a loop its sums stay in memory.
#if defined(__GNUC__)
#pragma GCC unroll 16
#endif
  for (int s = 0; s < 16; ++s) {
    __m256i w0 = load(wide.codes[s]), w1 = load(wide.codes[s] + 16);
    pin(w0);
    pin(w1);
    for (int t = 0; t < kTokens; ++t) {
      const __m256i x = broadcast32(side[t].q[block][s % 2] + s / 2 * 2);
      sum[t][0] = _mm256_add_epi32(sum[t][0], _mm256_madd_epi16(w0, x));
      sum[t][1] = _mm256_add_epi32(sum[t][1], _mm256_madd_epi16(w1, x));
      pin(sum[t][0]);
      pin(sum[t][1]);
    }
  }
}

// acc + d * a * i and its negative twin, with the contract's roundings.
inline __m256 add_term(__m256 acc, __m256 d, __m256 a, __m256i i) {
  return _mm256_fmadd_ps(_mm256_mul_ps(d, a), _mm256_cvtepi32_ps(i), acc);
}
inline __m256 subtract_term(__m256 acc, __m256 d, __m256 a, __m256i i) {
  return _mm256_fnmadd_ps(_mm256_mul_ps(d, a), _mm256_cvtepi32_ps(i), acc);
}

// acc[stride * t + row] += the term of one block; scale: of the tokens' activations.
template <int kTokens>
inline void add_block(const __m256 d[2], const float* const scale[kTokens], size_t block,
                      const __m256i (&whole)[kTokens][2], float* acc, size_t stride) {
  for (int t = 0; t < kTokens; ++t) {
    const __m256 a = _mm256_set1_ps(scale[t][block]);
    for (int h = 0; h < 2; ++h) {
      float* to = acc + stride * static_cast<size_t>(t) + 8 * h;
      _mm256_storeu_ps(to, add_term(_mm256_loadu_ps(to), d[h], a, whole[t][h]));
    }
  }
}

// Asks for `bytes` bytes from p on. Eight rows are eight streams, too short for the
// hardware to catch on before they end, so each group of rows fetches the next, in the order of the file. p may lie
// past the end of the matrix: a prefetch reads nothing.
inline void prefetch(const uint8_t* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T0);
}

// Eight vectors of eight int32 -> the sum of each.
inline __m256i fold8(const __m256i v[8]) {
  const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

// The same for rows r and r + 4 in the halves of v[r]: rows 0 .. 7.
inline __m256i fold4(const __m256i v[4]) {
  return _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
}

// Pointers to n rows from `row` on; the last row again where the matrix ends.
inline void row_pointers(const LinearArgs& args, size_t row, size_t n, const uint8_t** out) {
  for (size_t i = 0; i < n; ++i) {
    const size_t r = row + i < args.rows ? row + i : args.rows - 1;
    out[i] = static_cast<const uint8_t*>(args.w) + r * args.w_stride;
  }
}

// The loops of a format K:
//   K::Block, K::kBlock weights, K::Panel
//   K::kPanels                              panels of a group: together with K::kTile tokens they fit the first-level cache
//   K::kTile                                tokens multiplied at once, at most
//   K::kFetches                             multiply fetches what lies at slice.ahead
//   K::decode(rows, first, n, &panel)       blocks first .. first + n - 1 of 16 rows (n * kBlock <= 256)
//   K::Side, K::prepare(token, n, &side)    what all panels need of n blocks of the same activations
//   K::multiply<T>(panel, slice, n, acc, s) acc[s * t + row] += panel * T tokens
//   K::dot8(rows, token, blocks, ahead)     one token, 8 rows, the whole row; the next 8 begin at `ahead`
//   K::fused8<T>(rows, token, blocks, ahead, acc)  added to acc[t] for T = 2 .. 4 tokens; not every format has it

template <class K, int kTokens>
inline void multiply_panels(const typename K::Panel* panel, size_t panels, const Slice<K, kTokens>& x, size_t n,
                            float* acc, size_t stride) {
  for (size_t p = 0; p < panels; ++p) K::template multiply<kTokens>(panel[p], x, n, acc + kPanelRows * p, stride);
}

// acc[stride * t + row] += the panels' n blocks from `first` on times token `token` + t, for 1 .. K::kTile tokens.
template <class K>
inline void multiply_tile(const typename K::Panel* panel, size_t panels, const LinearArgs& args, const ActLayout& at,
                          size_t token, size_t tokens, size_t first, size_t n, const typename K::Side* side,
                          const uint8_t* ahead, float* acc, size_t stride) {
  if (tokens == 1) {
    multiply_panels(panel, panels, Slice<K, 1>(args, at, token, first, side, ahead), n, acc, stride);
  } else if (tokens == 2) {
    multiply_panels(panel, panels, Slice<K, 2>(args, at, token, first, side, ahead), n, acc, stride);
  } else if (tokens == 3) {
    multiply_panels(panel, panels, Slice<K, 3>(args, at, token, first, side, ahead), n, acc, stride);
  } else if constexpr (K::kTile == 4) {
    multiply_panels(panel, panels, Slice<K, 4>(args, at, token, first, side, ahead), n, acc, stride);
  }
}

// Blocks first .. first + n - 1 of `tokens` tokens from `token` on.
template <class K>
inline void prepare(const LinearArgs& args, const ActLayout& at, size_t token, size_t tokens, size_t first, size_t n,
                    typename K::Side* side) {
  for (size_t t = 0; t < tokens; ++t) {
    Token x(args, at, token + t);
    x.skip(first, K::kBlock);
    prefetch(reinterpret_cast<const uint8_t*>(x.q) + 4 * args.x_stride, n * K::kBlock);  // four tokens ahead
    K::prepare(x, n, &side[t]);
  }
}

// Up to kBlockRows rows from `row` on times up to kMany tokens. Columns outermost: what the tokens have in 256 of them stays
// in the second-level cache while all rows meet it; from the third it comes too slowly.
template <class K>
void many_tokens(const LinearArgs& args, const ActLayout& at, size_t token, size_t tokens, size_t row, size_t rows) {
  constexpr size_t kBlocks = kPanelCols / K::kBlock, kRows = K::kPanels * kPanelRows, kGroups = kBlockRows / kRows;
  alignas(64) typename K::Panel panel[K::kPanels];
  alignas(64) float acc[kGroups][kMany][kRows];
  alignas(64) typename K::Side side[kMany];
  const uint8_t* pointers[kBlockRows];
  row_pointers(args, row, kBlockRows, pointers);
  const size_t groups = (rows + kRows - 1) / kRows, blocks = args.cols / K::kBlock;
  for (size_t g = 0; g < groups; ++g) memset(acc[g], 0, tokens * sizeof acc[g][0]);
  const size_t parts = (tokens + K::kTile - 1) / K::kTile;  // of equal size, as far as it goes: 4 tokens are 2 + 2
  for (size_t b = 0; b < blocks; b += kBlocks) {
    const size_t n = blocks - b < kBlocks ? blocks - b : kBlocks;
    prepare<K>(args, at, token, tokens, b, n, side);
    for (size_t g = 0; g < groups; ++g) {
      const uint8_t* const* group = pointers + g * kRows;
      const size_t left = rows - g * kRows, panels = left < kRows ? (left + kPanelRows - 1) / kPanelRows : K::kPanels;
      // Fetched meanwhile: what is decoded next. The same rows' next columns would have left the near caches by then.
      const uint8_t* const* ahead = g + 1 < groups ? group + kRows : pointers;
      const size_t ahead_at = g + 1 < groups ? b : b + n < blocks ? b + n : 0;
      for (size_t p = 0; p < panels; ++p) K::decode(group + kPanelRows * p, b, n, &panel[p]);
      for (size_t i = 0; i < parts; ++i) {
        for (size_t r = i * kRows / parts; r < (i + 1) * kRows / parts; ++r)
          prefetch(ahead[r] + ahead_at * sizeof(typename K::Block), n * sizeof(typename K::Block));
        const size_t t = i * tokens / parts, next = (i + 1) * tokens / parts;
        multiply_tile<K>(panel, panels, args, at, token + t, next - t, b, n, side + t, nullptr, acc[g][t], kRows);
      }
    }
  }
  for (size_t g = 0; g < groups; ++g) {
    const size_t left = rows - g * kRows, n = left < kRows ? left : kRows;
    for (size_t t = 0; t < tokens; ++t)
      memcpy(args.y + (token + t) * args.y_stride + row + g * kRows, acc[g][t], n * sizeof(float));
  }
}

// Up to kFew tokens, 16 rows at a time along all their columns: the weights come from memory in the order of the file.
template <class K>
void few_tokens(const LinearArgs& args, const ActLayout& at) {
  constexpr size_t kBlocks = kPanelCols / K::kBlock, kBytes = sizeof(typename K::Block);
  constexpr size_t kSides = 128 * 1024 / sizeof(typename K::Side);
  alignas(64) typename K::Panel panel;
  alignas(64) typename K::Side side[kSides];
  alignas(64) float acc[kFew][kPanelRows];
  const size_t tokens = args.tokens, blocks = args.cols / K::kBlock;
  const bool all = (blocks + kBlocks - 1) / kBlocks * tokens <= kSides;  // prepared once, else for every 16 rows
  for (size_t row = 0; row < args.rows; row += kPanelRows) {
    const uint8_t* rows[kPanelRows];
    row_pointers(args, row, kPanelRows, rows);
    memset(acc, 0, tokens * sizeof acc[0]);
    for (size_t b = 0; b < blocks; b += kBlocks) {
      const size_t n = blocks - b < kBlocks ? blocks - b : kBlocks;
      typename K::Side* const sides = side + (all ? b / kBlocks * tokens : 0);
      if (!all || row == 0) prepare<K>(args, at, 0, tokens, b, n, sides);
      const uint8_t* const ahead = rows[0] + kPanelRows * (args.w_stride + b * kBytes);
      if (!K::kFetches) prefetch(ahead, kPanelRows * n * kBytes);
      K::decode(rows, b, n, &panel);
      const size_t groups = (tokens + K::kTile - 1) / K::kTile;
      for (size_t i = 0; i < groups; ++i) {
        const size_t t = i * tokens / groups, next = (i + 1) * tokens / groups;
        multiply_tile<K>(&panel, 1, args, at, t, next - t, b, n, sides + t, i == 0 ? ahead : nullptr, acc[t],
                         kPanelRows);
      }
    }
    const size_t n_rows = args.rows - row < kPanelRows ? args.rows - row : kPanelRows;
    for (size_t t = 0; t < tokens; ++t) memcpy(args.y + t * args.y_stride + row, acc[t], n_rows * sizeof(float));
  }
}

// 8 rows at a time along all their columns.
template <class K, int kTokens>
void by_rows(const LinearArgs& args, const ActLayout& at) {
  const size_t blocks = args.cols / K::kBlock;
  Token token[kTokens];
  for (size_t t = 0; t < kTokens; ++t) token[t] = Token(args, at, t);
  for (size_t row = 0; row < args.rows; row += 8) {
    const uint8_t* rows[8];
    row_pointers(args, row, 8, rows);
    const uint8_t* const ahead = rows[0] + 8 * args.w_stride;
    __m256 acc[kTokens];
    if constexpr (kTokens == 1) {
      acc[0] = K::dot8(rows, token[0], blocks, ahead);
    } else {
      for (__m256& sum : acc) sum = _mm256_setzero_ps();
      K::template fused8<kTokens>(rows, token, blocks, ahead, acc);
    }
    const size_t n = args.rows - row < 8 ? args.rows - row : 8;
    for (size_t t = 0; t < kTokens; ++t) {
      float y[8];
      _mm256_storeu_ps(y, acc[t]);
      memcpy(args.y + t * args.y_stride + row, y, n * sizeof(float));
    }
  }
}

template <class K>
void linear(const LinearArgs& args) {
  const ActLayout at = act_layout(K::kBlock == 32 ? Act::Q32 : Act::Q256, args.cols);
  if (args.tokens == 1) return by_rows<K, 1>(args, at);
  if constexpr (requires { &K::template fused8<2>; }) {
    if (args.tokens == 2) return by_rows<K, 2>(args, at);
    if (args.tokens == 3) return by_rows<K, 3>(args, at);
    if (args.tokens == 4) return by_rows<K, 4>(args, at);
  }
  if (args.tokens <= kFew) return few_tokens<K>(args, at);
  const size_t batches = (args.tokens + kMany - 1) / kMany;
  for (size_t row = 0; row < args.rows; row += kBlockRows) {
    const size_t rows = args.rows - row < kBlockRows ? args.rows - row : kBlockRows;
    for (size_t i = 0; i < batches; ++i) {
      const size_t t = i * args.tokens / batches;
      many_tokens<K>(args, at, t, (i + 1) * args.tokens / batches - t, row, rows);
    }
  }
}

}  // namespace
}  // namespace pe
