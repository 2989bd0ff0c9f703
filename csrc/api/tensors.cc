// The C interface of the library itself, its tiers and its tensor formats.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "api/kv_type.h"
#include "api/last_error.h"
#include "api/pyengine.h"
#include "base/aligned_buffer.h"
#include "base/checked.h"
#include "base/fp_env.h"
#include "base/text.h"
#include "gguf/types.h"
#include "kernels/kernels.h"
#include "model/model.h"
#include "model/numerics_epoch.h"
#include "quant/formats.h"
#include "quant/fp16.h"
#include "runtime/thread_pool.h"

using namespace pe;

namespace {

constexpr uint32_t kMaxQuantiseThreads = 512;
constexpr size_t kMaxAttendHeads = 65536, kMaxAttendDim = 65536;
constexpr size_t kQuantiseRows = 8;  // rows a thread takes at a time

Format format_of(int32_t type) {
  Format format;
  if (!format_from_type(type, &format))
    throw Error(Status::kUnsupported, "unsupported_tensor_type",
                "tensor type " + gguf::type_name(static_cast<uint32_t>(type)) +
                    " is not supported; known: " + gguf::runnable_types());
  return format;
}

// Bytes of a matrix, checked against what the caller has.
size_t row_bytes_of(Format format, size_t rows, size_t cols, size_t packed_bytes, size_t count, bool count_matters) {
  const FormatInfo& info = format_info(format);
  if (rows == 0 || cols == 0 || cols % info.block || cols > SIZE_MAX / 8)
    throw Error(Status::kArgument, "bad_shape",
                std::to_string(rows) + " x " + std::to_string(cols) + " is no shape for " + info.name +
                    "; expected at least one row, columns a multiple of " + std::to_string(info.block));
  const size_t row = bytes_per_row(format, cols);
  uint64_t bytes = 0;
  uint64_t values = 0;
  if (!checked_mul(row, rows, &bytes) || !checked_mul(rows, cols, &values) || bytes != packed_bytes ||
      (count_matters && values != count))
    throw Error(
        Status::kArgument, "bad_shape",
        "the buffers do not fit a " + std::to_string(rows) + " x " + std::to_string(cols) + " matrix of " + info.name);
  return row;
}

// What the quantisers take: the importance of columns relative to their mean, no column quite without. Empty: all alike.
std::vector<float> relative_importance(const float* importance, size_t cols) {
  if (importance == nullptr) return {};
  double sum = 0;
  for (size_t k = 0; k < cols; ++k) {
    if (!(importance[k] >= 0 && is_finite(importance[k])))
      throw Error(Status::kArgument, "bad_importance",
                  "the importance of column " + std::to_string(k) + " is NaN, infinite or negative", "importance");
    sum += static_cast<double>(importance[k]);
  }
  if (!(sum > 0)) return {};
  std::vector<float> relative(cols);
  const double scale = static_cast<double>(cols) / sum;
  for (size_t k = 0; k < cols; ++k)
    relative[k] = static_cast<float>(std::clamp(static_cast<double>(importance[k]) * scale, 1e-5, 1e6));
  return relative;
}

Tier tier_of(const char* name) {
  for (int i = 0; i < kTiers; ++i) {
    const Tier tier = static_cast<Tier>(i);
    if (std::strcmp(tier_name(tier), name) != 0) continue;
    if (!tier_available(tier))
      throw Error(Status::kCpu, "tier_unavailable", std::string("this processor or build lacks the tier ") + name,
                  "tier");
    return tier;
  }
  throw Error(Status::kArgument, "unknown_tier", "unknown instruction-set tier \"" + printable(name) + "\"", "tier");
}

// pe_convert_rows, row by row: a row and what is read back of it stay in the cache.
void convert_rows(Format from, const void* src, size_t src_size, int32_t type, size_t rows, size_t cols,
                  const float* importance, void* dst, size_t dst_size, double* lost, uint32_t n_threads) {
  const FpEnv fp_env;
  Tier tier;
  const Format format = format_of(type);
  if (!can_quantise(format))
    throw Error(Status::kUnsupported, "read_only_format",
                std::string(format_info(format).name) + " can be read, but not written");
  const auto* in = static_cast<const uint8_t*>(src);
  auto* out = static_cast<uint8_t*>(dst);
  not_null(in, "src");
  not_null(out, "dst");
  if (n_threads > kMaxQuantiseThreads) bad_argument("n_threads", "is more than 512");
  const size_t in_stride = row_bytes_of(from, rows, cols, src_size, 0, false);
  const size_t out_stride = row_bytes_of(format, rows, cols, dst_size, 0, false);
  const KernelTable& kernels = active_kernels(&tier);
  const DequantiseFn widen = kernels.dequantise[static_cast<int>(from)];
  const DequantiseFn read_back = kernels.dequantise[static_cast<int>(format)];
  const QuantiseFn quantise_row = kernels.quantise[static_cast<int>(format)];
  const bool in_place = from == Format::F32 && reinterpret_cast<uintptr_t>(in) % alignof(float) == 0;
  const std::vector<float> weights = relative_importance(importance, cols);
  const float* row_weights = weights.empty() ? nullptr : weights.data();
  const size_t n_team = std::clamp<size_t>(n_threads, 1, rows);
  const size_t work =
      (in_place ? 0 : cols) + (lost != nullptr ? cols : 0);  // floats of a thread: a row, what is read back
  uint64_t all_work = 0;
  if (!checked_mul(work, n_team, &all_work)) bad_argument("cols", "is too large");
  std::vector<float> buffers(all_work);
  std::vector<float> sums(lost != nullptr ? 2 * rows : 0);  // of each row: error, energy
  std::atomic<uint64_t> bad{UINT64_MAX};                    // the first value that cannot be stored
  const auto convert = [&](Team& team) {
    float* own = buffers.data() + team.index() * work;
    float* restored = in_place ? own : own + cols;
    team.for_each(rows, kQuantiseRows, [&](size_t begin, size_t end) {
      for (size_t r = begin; r < end; ++r) {
        const float* x = reinterpret_cast<const float*>(in + r * in_stride);
        if (!in_place) {
          widen(in + r * in_stride, cols, own);
          x = own;
        }
        const size_t ok = quantise_row(x, row_weights, cols, out + r * out_stride);
        uint64_t seen = bad.load();
        while (ok != cols && r * cols + ok < seen && !bad.compare_exchange_weak(seen, r * cols + ok)) {
        }
        if (lost == nullptr || ok != cols) continue;
        read_back(out + r * out_stride, cols, restored);
        kernels.loss(x, restored, cols, &sums[2 * r], &sums[2 * r + 1]);
      }
    });
  };
  ThreadPool(static_cast<int>(n_team)).run(static_cast<int>(n_team), convert);
  if (bad.load() != UINT64_MAX)
    throw Error(Status::kArgument, "not_storable",
                "the value in row " + std::to_string(bad.load() / cols) + ", column " +
                    std::to_string(bad.load() % cols) + " is NaN, infinite or too large for " +
                    format_info(format).name);
  if (lost == nullptr) return;
  lost[0] = lost[1] = 0;
  for (size_t r = 0; r < rows; ++r) {
    lost[0] += static_cast<double>(sums[2 * r]);
    lost[1] += static_cast<double>(sums[2 * r + 1]);
  }
}

}  // namespace

const char* pe_version(void) { return PE_VERSION; }
uint32_t pe_numerics_epoch(void) { return kNumericsEpoch; }

const char* pe_tier_name(size_t index) { return index < kTiers ? tier_name(static_cast<Tier>(index)) : nullptr; }
int pe_tier_available(size_t index) { return index < kTiers && tier_available(static_cast<Tier>(index)); }

pe_status pe_tier_active(const char** out) {
  return guarded([&] {
    not_null(out, "out") = nullptr;
    Tier tier;
    active_kernels(&tier);
    *out = tier_name(tier);
  });
}

pe_status pe_format_at(size_t index, pe_format* out) {
  return guarded([&] {
    std::memset(&not_null(out, "out"), 0, sizeof *out);
    if (index >= kFormats) bad_argument("index", "is past the last format");
    const FormatInfo& f = kFormatInfo[index];
    *out = {f.type, f.name, f.block, f.bytes, can_quantise(static_cast<Format>(index)) ? 1 : 0};
  });
}

pe_status pe_dequantise_rows(int32_t type, const void* src, size_t src_size, size_t rows, size_t cols, float* dst,
                             size_t dst_count) {
  return guarded([&] {
    const FpEnv fp_env;
    const Format format = format_of(type);
    const auto* p = static_cast<const uint8_t*>(src);
    not_null(p, "src");
    not_null(dst, "dst");
    const size_t stride = row_bytes_of(format, rows, cols, src_size, dst_count, true);
    const DequantiseFn dequantise = kernels_for(Tier::kScalar)->dequantise[static_cast<int>(format)];
    for (size_t r = 0; r < rows; ++r) dequantise(p + r * stride, cols, dst + r * cols);
  });
}

pe_status pe_quantise_rows(int32_t type, const float* src, size_t src_count, size_t rows, size_t cols,
                           const float* importance, void* dst, size_t dst_size, uint32_t n_threads) {
  return guarded([&] {
    uint64_t size = 0;
    if (!checked_mul(src_count, sizeof(float), &size)) bad_argument("src_count", "is too large");
    convert_rows(Format::F32, src, size, type, rows, cols, importance, dst, dst_size, nullptr, n_threads);
  });
}

pe_status pe_convert_rows(int32_t src_type, const void* src, size_t src_size, int32_t type, size_t rows, size_t cols,
                          const float* importance, void* dst, size_t dst_size, double* lost, uint32_t n_threads) {
  return guarded([&] {
    convert_rows(format_of(src_type), src, src_size, type, rows, cols, importance, dst, dst_size, lost, n_threads);
  });
}

pe_status pe_linear(const char* tier, int32_t type, const void* w, size_t w_size, size_t rows, size_t cols,
                    const float* x, size_t n_tokens, float* y) {
  return guarded([&] {
    const FpEnv fp_env;
    const KernelTable& kernels = *kernels_for(tier_of(&not_null(tier, "tier")));
    const Format format = format_of(type);
    not_null(static_cast<const uint8_t*>(w), "w");
    not_null(x, "x");
    not_null(y, "y");
    const size_t stride = row_bytes_of(format, rows, cols, w_size, 0, false);
    uint64_t scratch = 0;
    const Act act = format_info(format).act;
    const ActLayout layout = act_layout(act, cols);
    if (n_tokens == 0 || !checked_mul(layout.bytes, n_tokens, &scratch)) bad_argument("n_tokens", "must be at least 1");
    AlignedBuffer acts(scratch);
    for (size_t t = 0; t < n_tokens; ++t)
      kernels.quantise_act[static_cast<int>(act)](x + t * cols, cols, acts.data() + t * layout.bytes);
    kernels.linear[static_cast<int>(format)]({.w = w,
                                              .w_stride = stride,
                                              .rows = rows,
                                              .cols = cols,
                                              .x = acts.data(),
                                              .x_stride = layout.bytes,
                                              .tokens = n_tokens,
                                              .y = y,
                                              .y_stride = rows});
  });
}

pe_status pe_attend(const char* tier, int32_t kv_type, const void* keys, const void* values, size_t size, size_t n_keys,
                    size_t head_dim, const float* q, size_t n_heads, float* y) {
  return guarded([&] {
    const FpEnv fp_env;
    const KernelTable& kernels = *kernels_for(tier_of(&not_null(tier, "tier")));
    const Kv type = kv_of(kv_type);
    const auto* k = static_cast<const uint8_t*>(keys);
    const auto* v = static_cast<const uint8_t*>(values);
    not_null(k, "keys");
    not_null(v, "values");
    not_null(q, "q");
    not_null(y, "y");
    uint64_t bytes = 0;
    if (n_keys == 0 || n_heads == 0 || n_heads > kMaxAttendHeads || head_dim == 0 || head_dim > kMaxAttendDim ||
        head_dim % 32 || !checked_mul(kv_row_bytes(type, head_dim), n_keys, &bytes) || bytes != size)
      throw Error(Status::kArgument, "bad_shape",
                  std::to_string(n_keys) + " keys of " + std::to_string(head_dim) + " values for " +
                      std::to_string(n_heads) + " heads do not fit " + std::to_string(size) +
                      " bytes; expected head dimensions that are multiples of 32");
    const size_t row = kv_row_bytes(type, head_dim), stride = pad16(head_dim);
    AlignedBuffer memory((attn_work(head_dim, head_dim) + 2 * n_heads * (stride + 2)) * sizeof(float));
    float* work = memory.as<float>();
    // Two of each: the total's, and a chunk's.
    float* const acc[2] = {work + attn_work(head_dim, head_dim),
                           work + attn_work(head_dim, head_dim) + n_heads * stride};
    float* const m[2] = {acc[1] + n_heads * stride, acc[1] + n_heads * (stride + 1)};
    float* const sum[2] = {m[1] + n_heads, m[1] + 2 * n_heads};
    for (size_t at = 0; at < n_keys; at += kAttnChunk) {
      const int to = at ? 1 : 0;
      kernels.attn_chunk[static_cast<int>(type)]({.q = q,
                                                  .tokens = 1,
                                                  .heads = n_heads,
                                                  .q_stride = n_heads * head_dim,
                                                  .k = k + at * row,
                                                  .v = v + at * row,
                                                  .keys = std::min(kAttnChunk, n_keys - at),
                                                  .head_dim_k = head_dim,
                                                  .head_dim_v = head_dim,
                                                  .scale = 1.0f / std::sqrt(static_cast<float>(head_dim)),
                                                  .acc = acc[to],
                                                  .acc_stride = stride,
                                                  .m = m[to],
                                                  .sum = sum[to],
                                                  .work = work});
      for (size_t h = 0; to && h < n_heads; ++h)
        kernels.attn_merge(m[0] + h, sum[0] + h, acc[0] + h * stride, m[1][h], sum[1][h], acc[1] + h * stride,
                           head_dim);
    }
    for (size_t h = 0; h < n_heads; ++h)
      kernels.attn_finish(acc[0] + h * stride, sum[0][h], head_dim, y + h * head_dim);
  });
}
