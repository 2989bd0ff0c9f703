// One pass of the decoder over a batch of consecutive tokens of one session.
#pragma once

#include <atomic>

#include "kernels/kernels.h"
#include "model/inputs.h"
#include "model/weights.h"
#include "runtime/kv_cache.h"
#include "runtime/thread_pool.h"

namespace pe {

// Where the intermediate values of a batch live: one allocation, laid out once per session. T: tokens of a chunk.
// Row strides are padded to 64 bytes, so that a float row is also its own Act::F32 activation row.
struct Scratch {
  struct Rows {
    size_t at = 0;      // bytes from the start of the allocation
    size_t stride = 0;  // bytes from row to row
  };
  Rows x;                  // residual stream         [T][n_embd] float
  Rows h;                  // normed, attention out: what the next linear reads [max(T, threads)][max(n_embd, o_dim)]
  Rows act[kActs];         // h, quantised            [max(T, threads)] activation rows (Q32, Q256)
  Rows q, k, v;            // [T][q_dim | k_dim | v_dim]
  Rows gate, up;           // [T][n_ff]; silu(gate) * up takes the place of gate
  Rows ff[kActs];          // that, quantised         [T] activation rows (Q32, Q256)
  Rows done;               // [1][n_ff / 32] uint32: how much of a block of gate there is
  Rows out;                // [T][n_embd], what a block adds to the residual stream
  Rows angles;             // [T][rope dims / 2][2]
  Rows acc;                // attention over some chunks, before the division by sum: [slots][acc_stride], with
  Rows max, sum;           // [1][slots]. Which slots stand for what: ops.cc
  Rows work;               // [threads][attn_work]
  size_t acc_stride = 0;   // floats, head_dim_v padded
  size_t tile_tokens = 0;  // tokens whose queries of a KV head's group meet the keys together in prefill
  size_t bytes = 0;
};

// Up to so many tokens, attention is split over the chunks of the cache too, and merged afterwards.
inline constexpr size_t kSplitTokens = 8;

Scratch scratch_layout(const ModelConfig& config, size_t n_ctx, size_t n_chunk, size_t n_threads);

struct Batch {
  const ModelConfig& config;
  const Weights& weights;
  const KernelTable& kernels;
  const Scratch& layout;
  uint8_t* memory;  // layout.bytes, 64-byte aligned
  KvCache& kv;
  const int32_t* tokens;            // [n]
  size_t n;                         // 1 .. chunk
  size_t pos;                       // of the first token
  size_t first_row;                 // logits for tokens first_row .. n - 1
  float* logits;                    // [n - first_row][n_vocab], or nullptr
  InputSums* inputs;                // what linear operations read is added here, or nullptr
  const std::atomic<bool>& cancel;  // polled between tasks
  std::atomic<bool> spoilt{false};  // a task was skipped: nothing of the result is valid
  std::atomic<bool> leave{false};   // thread 0's decision, taken before a barrier, that all return after it

  float* row(const Scratch::Rows& r, size_t i) const { return reinterpret_cast<float*>(memory + r.at + i * r.stride); }
};

// Runs on every thread of the team. Fills the KV cache at pos .. pos + n - 1 and writes the asked logits.
void forward(Team& team, Batch& batch);

}  // namespace pe
