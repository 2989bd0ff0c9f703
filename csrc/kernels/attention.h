// Attention over one chunk of the KV cache as the vector tiers do it: tiles of keys in the first-level cache, rows in
// groups that fit the registers. Private to kernel objects. A tier supplies the register tiles, a struct K:
//
//   K::kFew                    calls of at most so many rows go straight from the cache ("direct"): they would not pay for
//                              widening a tile through memory
//   K::kScoreRows, K::kValueRows   rows of a register tile over a widened tile of keys; kDirectRows: straight from the cache
//   K::widen_keys<T>, widen_values<T>(rows, row_bytes, n, dim, tile)      n rows of the cache as floats, dim padded to 16
//   K::WideKeys, K::WideValues     how score and values read those; value_stride(dim): bytes from key to key
//   K::score<T, R>(q, dim, k, row_bytes, keys, scale, s, ahead)           s[r * kAttnChunk + j] of R rows, j < keys; up to
//                              15 scores past `keys` may be written, but only rows of the keys are read
//   K::weigh(p, n, &max)       p from scores to weights; returns their sum16
//   K::values<T, R>(p, end, v, row_bytes, dim, first, acc, acc_stride, ahead)   acc of R rows continued over a tile of keys,
//                              of which row r sees the first end[r] (ascending); acc starts at +0 in the first tile
//
// T is a type of the cache: F16, F32, Q8_0 with T::kType. What score and values are given as `ahead` they step once for
// every register tile of keys, or not at all.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernels/kernels.h"

namespace pe {
namespace {

// ---- rows in groups of at most N, known at compile time ----

template <int N>
struct Count {
  static constexpr int value = N;
};

template <int N, class F>
inline void rest(size_t n, size_t r, F f) {
  if constexpr (N > 0) {
    if (n == N) {
      f(Count<N>(), r);
    } else {
      rest<N - 1>(n, r, f);
    }
  }
}

// f(Count, first row) over all rows: groups of N, then what is left.
template <int N, class F>
inline void for_groups(size_t rows, F f) {
  size_t r = 0;
  for (; r + N <= rows; r += N) f(Count<N>(), r);
  rest<N - 1>(rows - r, r, f);
}

// Fetches memory that is read next while something else is multiplied: a share of its lines with each step. It may lie
// past the end of the cache: a prefetch reads nothing.
struct Ahead {
  const uint8_t* next;
  const uint8_t* end;
  size_t share;

  Ahead(const uint8_t* from, size_t bytes, size_t steps)
      : next(from), end(from + bytes), share((bytes / steps + 63) / 64 * 64) {}
  void step() {
    const uint8_t* const stop = share < static_cast<size_t>(end - next) ? next + share : end;
    for (; next < stop; next += 64) _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
  }
};

// Nothing to fetch: a widened tile is in the cache.
struct Here {
  void step() {}
};

// Rows r0 .. r0 + rows of the call, at most kAttnRows.
template <class K, class T, bool kDirect>
void attn_block(const AttnArgs& args, size_t r0, size_t rows) {
  const size_t dim_k = pad16(args.head_dim_k), dim_v = pad16(args.head_dim_v);
  float* const q = args.work;                      // [rows][dim_k], zero-padded
  float* const p = q + kAttnRows * dim_k;          // [rows][kAttnChunk]
  float* const tile = p + kAttnRows * kAttnChunk;  // [kAttnTile][dim]
  float* const acc = args.acc + r0 * args.acc_stride;
  size_t n[kAttnRows];  // keys of each row
  for (size_t r = 0; r < rows; ++r) {
    const size_t t = (r0 + r) / args.heads;
    const float* from = args.q + t * args.q_stride + (r0 + r) % args.heads * args.head_dim_k;
    memcpy(q + r * dim_k, from, args.head_dim_k * sizeof(float));
    memset(q + r * dim_k + args.head_dim_k, 0, (dim_k - args.head_dim_k) * sizeof(float));
    n[r] = args.keys + t < kAttnChunk ? args.keys + t : kAttnChunk;
  }
  const size_t keys = n[rows - 1];

  const uint8_t* k = static_cast<const uint8_t*>(args.k);
  const size_t k_bytes = kv_row_bytes(T::kType, args.head_dim_k);
  const uint8_t* v = static_cast<const uint8_t*>(args.v);
  const size_t v_bytes = kv_row_bytes(T::kType, args.head_dim_v);
  for (size_t j = 0; j < keys; j += kAttnTile, k += kAttnTile * k_bytes) {
    const size_t in_tile = keys - j < kAttnTile ? keys - j : kAttnTile;
    const bool more = j + kAttnTile < keys;
    Ahead ahead(more ? k + kAttnTile * k_bytes : v, kAttnTile * (more ? k_bytes : v_bytes),
                kDirect ? K::kDirectSteps : rows / K::kScoreRows + 1);
    if constexpr (!kDirect) K::template widen_keys<T>(k, k_bytes, in_tile, args.head_dim_k, tile);
    for_groups<kDirect ? K::kDirectRows : K::kScoreRows>(rows, [&](auto count, size_t r) {
      constexpr int R = decltype(count)::value;
      const size_t last = n[r + R - 1];
      if (last <= j) return;
      const size_t seen = last - j < in_tile ? last - j : in_tile;
      float* const scores = p + r * kAttnChunk + j;
      if constexpr (kDirect) {
        K::template score<T, R>(q + r * dim_k, dim_k, k, k_bytes, seen, args.scale, scores, ahead);
      } else {
        ahead.step();
        Here none;
        K::template score<typename K::WideKeys, R>(q + r * dim_k, dim_k, reinterpret_cast<const uint8_t*>(tile),
                                                   dim_k * sizeof(float), seen, args.scale, scores, none);
      }
    });
  }
  for (size_t r = 0; r < rows; ++r) args.sum[r0 + r] = K::weigh(p + r * kAttnChunk, n[r], args.m + r0 + r);

  for (size_t j = 0; j < keys; j += kAttnTile, v += kAttnTile * v_bytes) {
    const size_t in_tile = keys - j < kAttnTile ? keys - j : kAttnTile;
    const bool more = j + kAttnTile < keys;  // else the next chunk's keys
    Ahead ahead(more ? v + kAttnTile * v_bytes : k, kAttnTile * (more ? v_bytes : k_bytes),
                kDirect ? K::kDirectSteps : rows / K::kValueRows + 1);
    if constexpr (!kDirect) K::template widen_values<T>(v, v_bytes, in_tile, args.head_dim_v, tile);
    size_t end[kAttnRows];
    for (size_t r = 0; r < rows; ++r) end[r] = n[r] <= j ? 0 : n[r] - j < in_tile ? n[r] - j : in_tile;
    for_groups<kDirect ? K::kDirectRows : K::kValueRows>(rows, [&](auto count, size_t r) {
      constexpr int R = decltype(count)::value;
      if (end[r + R - 1] == 0) return;
      float* const to = acc + r * args.acc_stride;
      const float* const weights = p + r * kAttnChunk + j;
      if constexpr (kDirect) {
        K::template values<T, R>(weights, end + r, v, v_bytes, dim_v, j == 0, to, args.acc_stride, ahead);
      } else {
        ahead.step();
        Here none;
        K::template values<typename K::WideValues, R>(weights, end + r, reinterpret_cast<const uint8_t*>(tile),
                                                      K::value_stride(dim_v), dim_v, j == 0, to, args.acc_stride, none);
      }
    });
  }
}

template <class K, class T>
void attn_chunk(const AttnArgs& args) {
  const size_t rows = args.tokens * args.heads;
  const bool direct = rows <= K::kFew && args.head_dim_k % 16 == 0 && args.head_dim_v % 16 == 0;
  if (direct) return attn_block<K, T, true>(args, 0, rows);
  for (size_t r = 0; r < rows; r += kAttnRows)
    attn_block<K, T, false>(args, r, rows - r < kAttnRows ? rows - r : kAttnRows);
}

}  // namespace
}  // namespace pe
