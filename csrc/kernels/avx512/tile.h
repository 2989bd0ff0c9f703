// What the AVX-512 VNNI linear kernels share: codes of 16 rows in the lanes of a register, and the loops around.
//
// Weights are decoded 16 rows at a time. A step is 4 columns: one register, row r's four unsigned codes in dword r.
// vpdpbusd multiplies a step with a token's 4 int8, broadcast from memory, and adds to 16 int32 sums, exactly. Codes are
// unsigned, so a format with an offset subtracts offset * (sum of the activations) afterwards, from the sums that come with
// the activations: one vpdpwssd where the scales are floats, a few per 256 columns where they are integers.
//
//   bound       vpdpbusd: 128 MAC/cycle where two 512-bit operations start a cycle (Zen 5), 64 where one does (Zen 4). Q4_K: a
//               token's 256 columns of 16 rows are 64 vpdpbusd, 8 vpmulld, 4 vpdpwssd, 2 products and 2 fmas: 101, or 51
//   measured    Q4_K, Zen 5, kernel_check --bench, 256 tokens: 75-80 MAC/cycle; multiply_panel alone, from the caches, 98
//   registers   R x T int32 sums of a sub-block and as many of the block (or floats), R steps, a broadcast: 2 x 6 and 1 x 8 fit 32
//
// Up to 8 tokens: a step is decoded, multiplied with every token and forgotten; the weights are read once. More: 256
// columns of 32 rows are decoded into two panels of 16 KiB in the first-level cache, and a batch of tokens meets them, 6 at
// a time, each broadcast multiplied with both, before the next are decoded.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernels/kernels.h"
#include "kernels/unroll.h"

namespace pe {
namespace {

constexpr size_t kRows = 16;
constexpr int kFew = 8;    // tokens that meet every weight as it is decoded
constexpr int kGroup = 6;  // of more tokens: multiplied at once with kPanels panels, 24 sums in 32 registers
constexpr int kPanels = 2;
constexpr size_t kBatch = 128;      // tokens that meet a panel before the next is decoded
constexpr size_t kBlockRows = 128;  // rows that meet the same 256 columns of a batch: acc takes 64 KiB of the stack

PE_INLINE __m512i load512(const void* p) { return _mm512_loadu_si512(p); }
PE_INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
PE_INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
PE_INLINE __m512i broadcast32(const void* p) {
  int32_t v;
  memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}
PE_INLINE __m512i low_nibbles(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
PE_INLINE __m512i high_nibbles(__m512i v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }

// 16 bytes of rows r, r + 4, r + 8, r + 12, in one 128-bit lane each. Merging loads need no shuffle.
PE_INLINE __m512i four_rows(const uint8_t* const* row, int r, size_t at) {
  __m512i v = _mm512_castsi128_si512(load128(row[r] + at));
  v = _mm512_mask_broadcast_i32x4(v, 0x00f0, load128(row[r + 4] + at));
  v = _mm512_mask_broadcast_i32x4(v, 0x0f00, load128(row[r + 8] + at));
  return _mm512_mask_broadcast_i32x4(v, 0xf000, load128(row[r + 12] + at));
}

// 16 bytes from each of 16 rows -> out[s]: bytes 4 s .. 4 s + 3 of rows 0 .. 15.
PE_INLINE void transpose16(const uint8_t* const* row, size_t at, __m512i* out) {
  const __m512i v0 = four_rows(row, 0, at), v1 = four_rows(row, 1, at);
  const __m512i v2 = four_rows(row, 2, at), v3 = four_rows(row, 3, at);
  const __m512i a = _mm512_unpacklo_epi32(v0, v1), b = _mm512_unpacklo_epi32(v2, v3);
  const __m512i c = _mm512_unpackhi_epi32(v0, v1), d = _mm512_unpackhi_epi32(v2, v3);
  out[0] = _mm512_unpacklo_epi64(a, b);
  out[1] = _mm512_unpackhi_epi64(a, b);
  out[2] = _mm512_unpacklo_epi64(c, d);
  out[3] = _mm512_unpackhi_epi64(c, d);
}

// 32 bytes of 8 rows -> out[s]: four lanes, bytes 4 s .. of rows 0-3, bytes 16 + 4 s .. of the same, and both of rows 4-7.
PE_INLINE void eight_rows(const uint8_t* const* row, size_t at, __m512i* out) {
  __m512i v[4];
  PE_UNROLL
  for (int i = 0; i < 4; ++i)
    v[i] = _mm512_inserti64x4(_mm512_castsi256_si512(load256(row[i] + at)), load256(row[i + 4] + at), 1);
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpacklo_epi32(v[2], v[3]);
  const __m512i c = _mm512_unpackhi_epi32(v[0], v[1]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  out[0] = _mm512_unpacklo_epi64(a, b);
  out[1] = _mm512_unpackhi_epi64(a, b);
  out[2] = _mm512_unpacklo_epi64(c, d);
  out[3] = _mm512_unpackhi_epi64(c, d);
}

// 32 bytes from each of 16 rows -> out[s]: bytes 4 s .. 4 s + 3 of rows 0 .. 15. A third of transpose16's merging loads.
PE_INLINE void transpose32(const uint8_t* const* row, size_t at, __m512i* out) {
  __m512i upper[4], lower[4];
  eight_rows(row, at, upper);
  eight_rows(row + 8, at, lower);
  PE_UNROLL
  for (int s = 0; s < 4; ++s) {
    out[s] = _mm512_shuffle_i32x4(upper[s], lower[s], 0x88);
    out[s + 4] = _mm512_shuffle_i32x4(upper[s], lower[s], 0xdd);
  }
}

// Low and high halves of 16 dwords, fp16 -> float.
PE_INLINE __m512 low_f16(__m512i v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
PE_INLINE __m512 high_f16(__m512i v) { return low_f16(_mm512_srli_epi32(v, 16)); }

// Byte i of each dword, as int32.
template <int kByte>
PE_INLINE __m512i unsigned_byte(__m512i v) {
  return _mm512_and_si512(_mm512_srli_epi32(v, 8 * kByte), _mm512_set1_epi32(255));
}
template <int kByte>
PE_INLINE __m512i signed_byte(__m512i v) {
  return _mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * kByte), 24);
}
// Bytes 2 kPair and 2 kPair + 1 of each dword as a pair of int16, zero-extended.
template <int kPair>
PE_INLINE __m512i unsigned_pair(__m512i v) {
  constexpr int kControl = (2 * kPair) | (2 * kPair + 1) << 16 | static_cast<int>(0x80008000u);
  const __m512i control = _mm512_broadcast_i32x4(
      _mm_setr_epi32(kControl, kControl + 0x00040004, kControl + 0x00080008, kControl + 0x000c000c));
  return _mm512_shuffle_epi8(v, control);
}
// The same, sign-extended.
template <int kPair>
PE_INLINE __m512i signed_pair(__m512i v) {
  return _mm512_srai_epi16(_mm512_slli_epi16(unsigned_pair<kPair>(v), 8), 8);
}

// Activations of T tokens.
template <int T>
struct Tokens {
  const int8_t* q[T];
  ActLayout at;

  PE_INLINE Tokens(const LinearArgs& args, const ActLayout& layout, size_t first) : at(layout) {
    for (int t = 0; t < T; ++t)
      q[t] = static_cast<const int8_t*>(args.x) + (first + static_cast<size_t>(t)) * args.x_stride;
  }
  PE_INLINE float scale(int t, size_t block) const { return reinterpret_cast<const float*>(q[t] + at.scale_at)[block]; }
  PE_INLINE const int16_t* sum16(int t) const { return reinterpret_cast<const int16_t*>(q[t] + at.sum16_at); }
  PE_INLINE const int16_t* sum32(int t) const { return reinterpret_cast<const int16_t*>(q[t] + at.sum32_at); }
};

// A value the compiler must have in a register here. Without it additions are reordered: all products first, and spilled.
PE_INLINE void pin(__m512i& v) {
#if defined(__GNUC__)
  __asm__ volatile("" : "+v"(v));
#endif
}

// sum[r][t] += S steps of row group r, from step `first` on, times the activations of token t from column `at` on.
template <int T, int R, int S>
PE_INLINE void chain(const __m512i* const* codes, int first, const Tokens<T>& x, size_t at, __m512i (*sum)[T]) {
  PE_UNROLL
  for (int s = 0; s < S; ++s) {
    __m512i w[R];
    PE_UNROLL
    for (int r = 0; r < R; ++r) w[r] = load512(codes[r] + first + s);
    PE_UNROLL
    for (int t = 0; t < T; ++t) {
      const __m512i q = broadcast32(x.q[t] + at + 4 * s);
      PE_UNROLL
      for (int r = 0; r < R; ++r) sum[r][t] = _mm512_dpbusd_epi32(sum[r][t], w[r], q);
    }
  }
}

// acc + d * a * i and its negative twin, with the contract's roundings.
PE_INLINE __m512 add_term(__m512 acc, __m512 d, float a, __m512i i) {
  return _mm512_fmadd_ps(_mm512_mul_ps(d, _mm512_set1_ps(a)), _mm512_cvtepi32_ps(i), acc);
}
PE_INLINE __m512 subtract_term(__m512 acc, __m512 d, float a, __m512i i) {
  return _mm512_fnmadd_ps(_mm512_mul_ps(d, _mm512_set1_ps(a)), _mm512_cvtepi32_ps(i), acc);
}

// Asks for `bytes` bytes from p on, into the second-level cache. p may lie past the end of the matrix: a prefetch reads
// nothing. Sixteen rows are sixteen streams, too short for the hardware to catch on before they end, so each group of rows
// fetches the next, in the order of the file.
PE_INLINE void prefetch(const uint8_t* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T1);
}

// Pointers to 16 rows from `row` on; the last row again where the matrix ends.
inline void row_pointers(const LinearArgs& args, size_t row, const uint8_t** out) {
  for (size_t i = 0; i < kRows; ++i) {
    const size_t r = row + i < args.rows ? row + i : args.rows - 1;
    out[i] = static_cast<const uint8_t*>(args.w) + r * args.w_stride;
  }
}

// A format K decodes a block of its 16 rows in parts, so that a part's codes can stay in registers:
//   K::Block, K::kBlock columns, K::kParts, K::kCodes steps in a part
//   K::Head                                         what the block has besides codes
//   K::head(rows, at, &head)                        the block at byte `at` of every row
//   K::codes<P>(rows, at, head, codes)              steps of part P
//   K::kLoop, K::codes_of(p, rows, at, head, codes)   the same with the part as a value, where that is as fast
//   K::multiply<T, R>(p, codes, head, x, block, sum, acc)   part p of R groups of 16 rows: acc [R][T] floats of 16 rows;
//                                                   sum [R][T] int32, zero at the block's start
//   K::kFinish, K::finish(head, x, t, block, sum, acc)      when the block is complete, for one token and group

// 16 rows, as many columns as one block of 256 has.
template <class K>
struct Panel {
  static constexpr int kBlocks = 256 / static_cast<int>(K::kBlock);
  typename K::Head head[kBlocks];
  __m512i codes[kBlocks][K::kParts][K::kCodes];
};

template <class K, int P>
PE_INLINE void decode_parts(const uint8_t* const* rows, size_t at, const typename K::Head& head,
                            __m512i (*codes)[K::kCodes]) {
  if constexpr (K::kLoop) {
    PE_LOOP
    for (int p = 0; p < K::kParts; ++p) K::codes_of(p, rows, at, head, codes[p]);
  } else if constexpr (P < K::kParts) {
    K::template codes<P>(rows, at, head, codes[P]);
    decode_parts<K, P + 1>(rows, at, head, codes);
  }
}

template <class K>
inline void decode(const uint8_t* const* rows, size_t first, size_t n, Panel<K>* panel) {
  for (size_t b = 0; b < n; ++b) {
    const size_t at = (first + b) * sizeof(typename K::Block);
    K::head(rows, at, &panel->head[b]);
    decode_parts<K, 0>(rows, at, panel->head[b], panel->codes[b]);
  }
}

// acc[R][T][16] += R panels * T tokens; a panel's acc lie kBatch apart.
template <class K, int T, int R>
PE_NOINLINE void multiply_panel(const Panel<K>* panels, const LinearArgs& args, const ActLayout& at, size_t token,
                                size_t first, size_t n, float (*acc)[kRows]) {
  const Tokens<T> x(args, at, token);
  __m512 f[R][T];
  PE_UNROLL
  for (int t = 0; t < T; ++t) {
    PE_UNROLL
    for (int r = 0; r < R && !K::kFinish; ++r) f[r][t] = _mm512_load_ps(acc[r * kBatch + t]);
  }
  for (size_t b = 0; b < n; ++b) {
    __m512i sum[R][T];
    PE_UNROLL
    for (int t = 0; t < T; ++t) {
      PE_UNROLL
      for (int r = 0; r < R; ++r) sum[r][t] = _mm512_setzero_si512();
    }
    const typename K::Head* head[R];
    PE_UNROLL
    for (int r = 0; r < R; ++r) head[r] = &panels[r].head[b];
    PE_LOOP  // code that streams of data push out of the second-level cache leaves the first with it: keep it small
        for (int p = 0; p < K::kParts; ++p) {
      const __m512i* codes[R];
      PE_UNROLL
      for (int r = 0; r < R; ++r) codes[r] = panels[r].codes[b][p];
      K::template multiply<T, R>(p, codes, head, x, first + b, sum, f);
    }
    if constexpr (K::kFinish) {  // sums in memory: there are no registers for them before
      PE_UNROLL
      for (int t = 0; t < T; ++t) {
        PE_UNROLL
        for (int r = 0; r < R; ++r) {
          float* y = acc[r * kBatch + t];
          _mm512_store_ps(y, K::finish(*head[r], x, t, first + b, sum[r][t], _mm512_load_ps(y)));
        }
      }
    }
  }
  PE_UNROLL
  for (int t = 0; t < T; ++t) {
    PE_UNROLL
    for (int r = 0; r < R && !K::kFinish; ++r) _mm512_store_ps(acc[r * kBatch + t], f[r][t]);
  }
}

template <class K>
using MultiplyFn = void (*)(const Panel<K>*, const LinearArgs&, const ActLayout&, size_t, size_t, size_t,
                            float (*)[kRows]);

// Up to kBlockRows rows from `row` on times up to kBatch tokens. Columns outermost: what the tokens have in 256 of them stays in
// the second-level cache while all rows meet it; from the third, 16 rows at a time, it comes too slowly.
template <class K>
void many_tokens(const LinearArgs& args, const ActLayout& at, size_t token, size_t tokens, size_t row, size_t rows) {
  static constexpr MultiplyFn<K> kMultiply[kGroup + 1] = {
      nullptr,
      nullptr,
      nullptr,
      nullptr,
      multiply_panel<K, 4, kPanels>,
      multiply_panel<K, 5, kPanels>,
      multiply_panel<K, 6, kPanels>,
  };
  constexpr size_t kBlocks = Panel<K>::kBlocks;
  alignas(64) Panel<K> panels[kPanels];
  alignas(64) float acc[kBlockRows / kRows][kBatch][kRows];
  const uint8_t* pointers[kBlockRows / kRows][kRows];
  const size_t panels_of_rows = (rows + kRows * kPanels - 1) / (kRows * kPanels) * kPanels;
  for (size_t p = 0; p < panels_of_rows; ++p) {
    row_pointers(args, row + p * kRows, pointers[p]);
    memset(acc[p], 0, tokens * sizeof acc[p][0]);
  }
  const size_t blocks = args.cols / K::kBlock;
  // Groups of equal size, as far as it goes: 9 tokens are 5 + 4.
  const size_t groups = (tokens + kGroup - 1) / kGroup;
  for (size_t b = 0; b < blocks; b += kBlocks) {
    const size_t n = blocks - b < kBlocks ? blocks - b : kBlocks;
    for (size_t p = 0; p < panels_of_rows; p += kPanels) {
      // Fetched meanwhile: what is decoded next. The same rows' next columns would have left the near caches by then.
      const bool more = p + kPanels < panels_of_rows;
      const uint8_t* const(*ahead)[kRows] = more ? pointers + p + kPanels : pointers;
      const size_t ahead_at = more ? b : b + n < blocks ? b + n : 0;
      for (size_t r = 0; r < kPanels; ++r) decode<K>(pointers[p + r], b, n, &panels[r]);
      for (size_t g = 0; g < groups; ++g) {
        const size_t t = g * tokens / groups;
        for (size_t i = g * kRows * kPanels / groups; i < (g + 1) * kRows * kPanels / groups; ++i)
          prefetch(ahead[i / kRows][i % kRows] + ahead_at * sizeof(typename K::Block), n * sizeof(typename K::Block));
        kMultiply[(g + 1) * tokens / groups - t](panels, args, at, token + t, b, n, acc[p] + t);
      }
    }
  }
  for (size_t p = 0; p * kRows < rows; ++p) {
    const size_t left = rows - p * kRows;
    const auto mask = static_cast<__mmask16>(left < kRows ? (1u << left) - 1 : 0xffffu);
    for (size_t t = 0; t < tokens; ++t)
      _mm512_mask_storeu_ps(args.y + (token + t) * args.y_stride + row + p * kRows, mask, _mm512_load_ps(acc[p][t]));
  }
}

// Each part asks for its share of the rows `ahead`: all at once they keep the loads behind them waiting.
template <class K, int P, int T>
PE_INLINE void few_parts(const uint8_t* const* rows, size_t at, const uint8_t* ahead, const typename K::Head& head,
                         const Tokens<T>& x, size_t block, __m512i (*sum)[T], __m512 (*acc)[T]) {
  constexpr size_t kShare = kRows * sizeof(typename K::Block) / K::kParts;
  const typename K::Head* const h = &head;
  if constexpr (K::kLoop) {  // a quarter of the code
    PE_LOOP
    for (int p = 0; p < K::kParts; ++p) {
      prefetch(ahead + static_cast<size_t>(p) * kShare, kShare);
      __m512i codes[K::kCodes];
      K::codes_of(p, rows, at, head, codes);
      const __m512i* const code = codes;
      K::template multiply<T, 1>(p, &code, &h, x, block, sum, acc);
    }
  } else if constexpr (P < K::kParts) {
    prefetch(ahead + P * kShare, kShare);
    __m512i codes[K::kCodes];
    K::template codes<P>(rows, at, head, codes);
    const __m512i* const code = codes;
    K::template multiply<T, 1>(P, &code, &h, x, block, sum, acc);
    few_parts<K, P + 1, T>(rows, at, ahead, head, x, block, sum, acc);
  }
}

// T tokens, every weight decoded once and kept in registers.
template <class K, int T>
void few_tokens(const LinearArgs& args, const ActLayout& at) {
  const size_t blocks = args.cols / K::kBlock;
  const Tokens<T> x(args, at, 0);
  for (size_t row = 0; row < args.rows; row += kRows) {
    const uint8_t* rows[kRows];
    row_pointers(args, row, rows);
    const uint8_t* ahead = rows[0] + kRows * args.w_stride;
    __m512 acc[1][T];
    PE_UNROLL
    for (int t = 0; t < T; ++t) acc[0][t] = _mm512_setzero_ps();
    for (size_t b = 0; b < blocks; ++b) {
      constexpr size_t kBytes = sizeof(typename K::Block);
      typename K::Head head;
      K::head(rows, b * kBytes, &head);
      __m512i sum[1][T];
      PE_UNROLL
      for (int t = 0; t < T; ++t) sum[0][t] = _mm512_setzero_si512();
      few_parts<K, 0, T>(rows, b * kBytes, ahead + kRows * b * kBytes, head, x, b, sum, acc);
      if constexpr (K::kFinish) {
        PE_UNROLL
        for (int t = 0; t < T; ++t) acc[0][t] = K::finish(head, x, t, b, sum[0][t], acc[0][t]);
      }
    }
    const size_t left = args.rows - row;
    const auto mask = static_cast<__mmask16>(left < kRows ? (1u << left) - 1 : 0xffffu);
    for (int t = 0; t < T; ++t)
      _mm512_mask_storeu_ps(args.y + static_cast<size_t>(t) * args.y_stride + row, mask, acc[0][t]);
  }
}

// One token: where 8 rows at a time, each along its own columns, read the weights faster (bits are equal), the kernel of
// the tier below; else null.
template <class K>
LinearFn one_token = nullptr;

template <class K>
void linear(const LinearArgs& args) {
  using FewFn = void (*)(const LinearArgs&, const ActLayout&);
  static constexpr FewFn kFewTokens[kFew + 1] = {
      nullptr,          few_tokens<K, 1>, few_tokens<K, 2>, few_tokens<K, 3>, few_tokens<K, 4>,
      few_tokens<K, 5>, few_tokens<K, 6>, few_tokens<K, 7>, few_tokens<K, 8>,
  };
  if (args.tokens == 1 && one_token<K>) return one_token<K>(args);
  const ActLayout at = act_layout(K::kBlock == 32 ? Act::Q32 : Act::Q256, args.cols);
  if (args.tokens <= kFew) return kFewTokens[args.tokens](args, at);
  const size_t batches = (args.tokens + kBatch - 1) / kBatch;
  for (size_t row = 0; row < args.rows; row += kBlockRows) {
    const size_t rows = args.rows - row < kBlockRows ? args.rows - row : kBlockRows;
    for (size_t i = 0; i < batches; ++i) {
      const size_t t = i * args.tokens / batches;
      many_tokens<K>(args, at, t, (i + 1) * args.tokens / batches - t, row, rows);
    }
  }
}

enum class One { kHere, kBelow };

template <class K>
void use(KernelTable* table, Format format, One one) {
  LinearFn& entry = table->linear[static_cast<int>(format)];
  if (one == One::kBelow) one_token<K> = entry;
  entry = linear<K>;
}

}  // namespace
}  // namespace pe
