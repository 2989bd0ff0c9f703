#include "model/forward.h"

#include <algorithm>

#include "model/ops.h"

namespace pe {

Scratch scratch_layout(const ModelConfig& c, size_t n_ctx, size_t n_chunk, size_t n_threads) {
  Scratch s;
  const auto add = [&s](size_t rows, size_t row_bytes) {
    const Scratch::Rows r{s.bytes, pad64(row_bytes)};
    s.bytes += rows * r.stride;
    return r;
  };
  const auto floats = [&](size_t n) { return add(n_chunk, n * sizeof(float)); };
  const auto forms = [&](Scratch::Rows* rows, size_t count, size_t n) {
    for (const Act act : {Act::Q32, Act::Q256})
      rows[static_cast<int>(act)] = add(count, act_layout(act, (n + 255) / 256 * 256).bytes);
  };
  const size_t widest = std::max(c.n_embd, c.o_dim());
  const size_t copies = std::max(n_chunk, n_threads);
  s.x = floats(c.n_embd);
  s.h = add(copies, widest * sizeof(float));
  forms(s.act, copies, widest);
  s.q = floats(c.q_dim());
  s.k = floats(c.k_dim());
  s.v = floats(c.v_dim());
  s.gate = floats(c.n_ff);
  s.up = floats(c.n_ff);
  forms(s.ff, n_chunk, c.n_ff);
  s.done = add(1, (c.n_ff + 31) / 32 * sizeof(uint32_t));
  s.out = floats(c.n_embd);
  s.angles = floats(c.rope.dims);
  s.acc_stride = pad16(c.head_dim_v);
  s.tile_tokens = std::max<size_t>(1, kAttnRows / c.heads_per_kv());
  const size_t chunks = (n_ctx + kAttnChunk - 1) / kAttnChunk;
  const size_t split = std::min(n_chunk, kSplitTokens) * c.n_heads * chunks;
  const size_t tiles = 2 * n_threads * s.tile_tokens * c.heads_per_kv();
  const size_t slots = std::max(split, tiles);
  s.acc = add(slots, s.acc_stride * sizeof(float));
  s.max = add(1, slots * sizeof(float));
  s.sum = add(1, slots * sizeof(float));
  s.work = add(n_threads, attn_work(c.head_dim_k, c.head_dim_v) * sizeof(float));
  return s;
}

void forward(Team& team, Batch& b) {
  const Scratch& s = b.layout;
  embed(team, b);
  for (size_t i = 0; i < b.config.n_layers; ++i) {
    const LayerWeights& w = b.weights.layers[i];

    norm(team, b, w.attn_norm, acts_of(w.wq, w.wk, w.wv), 0);
    linear(team, b, std::array{Job{&w.wq, &w.bq, s.q}, Job{&w.wk, &w.bk, s.k}, Job{&w.wv, &w.bv, s.v}});
    rotate_and_store(team, b, i);
    attend(team, b, i);
    quantise(team, b, b.config.o_dim(), acts_of(w.wo));
    linear(team, b, std::array{Job{&w.wo, &w.bo, s.out, true}});

    norm(team, b, w.ffn_norm, acts_of(w.gate, w.up), 0);
    gate_up(team, b, w.gate, w.up, w.down.act);
    // One thread decides for all, before a barrier, whether to go on: threads never part ways.
    if (team.index() == 0) b.leave.store(cancelled(b), std::memory_order_relaxed);
    down(team, b, w.down);
    if (b.leave.load(std::memory_order_relaxed)) return;
  }
  if (!b.logits) return;
  norm(team, b, b.weights.output_norm, acts_of(b.weights.output), b.first_row);
  logits(team, b);
}

}  // namespace pe
