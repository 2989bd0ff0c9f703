#include "model/ops.h"

#include <algorithm>
#include <cmath>

namespace pe {

namespace {

// One token: rows of a task, whole tiles. Kernels fetch the rows they come to next, so a thread reads at full speed as long
// as it goes straight on; each jump to another task starts cold. Long tasks cost balance at the end: kTasksPerThread.
constexpr size_t kTaskRowsMin = 32;
constexpr size_t kTaskRowsMax = 384;
constexpr size_t kTasksPerThread = 8;
// With many tokens a task is up to kTaskRowsBatch rows, whole tiles, and about kTaskWork multiplications: a cancel is
// polled between tasks, and the slowest scalar kernel takes 0.15 s for one.
constexpr size_t kTaskRowsBatch = 64;
constexpr size_t kTaskWork = size_t{1} << 26;
constexpr size_t kTileRows = 16;

// body(i) for every task i, one at a time on whichever thread is free; ends in a barrier.
template <typename Body>
void each(Team& team, size_t n, Body&& body) {
  team.for_each(n, 1, [&](size_t begin, size_t) { body(begin); });
}

constexpr size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

const Scratch::Rows& act_rows(const Batch& b, Act act) {
  return act == Act::F32 ? b.layout.h : b.layout.act[static_cast<int>(act)];
}

// Rows of a task of an operation with `rows` outputs.
size_t task_rows(const Team& team, size_t rows, size_t cols, size_t tokens) {
  if (tokens == 1) {
    const size_t even = rows / (kTasksPerThread * team.size()) / kTileRows * kTileRows;
    return std::clamp(even, kTaskRowsMin, kTaskRowsMax);
  }
  return std::clamp(kTaskWork / (cols * tokens) / kTileRows * kTileRows, kTileRows, kTaskRowsBatch);
}

// The quantised forms of h[t][:n]. Act::F32 is h itself.
void quantise_row(const Batch& b, size_t t, size_t n, unsigned acts) {
  for (const Act act : {Act::Q32, Act::Q256})
    if (acts >> static_cast<int>(act) & 1)
      b.kernels.quantise_act[static_cast<int>(act)](b.row(b.layout.h, t), n, b.row(act_rows(b, act), t));
}

// Rows r0 .. r1 of `w` for tokens t0 .. b.n, into y[t - t0][r0 ..] (floats, `stride` apart).
void linear_rows(const Batch& b, const Tensor& w, size_t r0, size_t r1, size_t t0, float* y, size_t stride) {
  const Scratch::Rows& x = act_rows(b, w.act);
  b.kernels.linear[static_cast<int>(w.format)]({
      .w = w.data + r0 * w.row_bytes,
      .w_stride = w.row_bytes,
      .rows = r1 - r0,
      .cols = w.cols,
      .x = b.row(x, t0),
      .x_stride = x.stride,
      .tokens = b.n - t0,
      .y = y + r0,
      .y_stride = stride,
  });
}

// One group's attention over one chunk: the rows of Scratch::partial.
struct Partial {
  float* acc;  // [heads][acc_stride]
  float* m;    // [heads]
  float* sum;  // [heads]
};

Partial partial(const Batch& b, size_t slot) {
  const size_t heads = b.config.heads_per_kv();
  float* base = b.row(b.layout.partial, slot);
  float* m = base + heads * b.layout.acc_stride;
  return {base, m, m + heads};
}

// Token t's queries of KV head g against chunk c, keys up to and including the token's own position.
void attend_chunk(const Batch& b, size_t layer, size_t g, size_t t, size_t c, const Partial& out) {
  const ModelConfig& m = b.config;
  const size_t first = c * kAttnChunk;
  b.kernels.attn_chunk[static_cast<int>(b.kv.shape().type)]({
      .q = b.row(b.layout.q, t) + g * m.heads_per_kv() * m.head_dim_k,
      .heads = m.heads_per_kv(),
      .q_stride = m.head_dim_k,
      .k = b.kv.k(layer, g, first),
      .v = b.kv.v(layer, g, first),
      .keys = std::min(kAttnChunk, b.pos + t + 1 - first),
      .head_dim_k = m.head_dim_k,
      .head_dim_v = m.head_dim_v,
      .scale = 1.0f / std::sqrt(static_cast<float>(m.head_dim_k)),
      .acc = out.acc,
      .acc_stride = b.layout.acc_stride,
      .m = out.m,
      .sum = out.sum,
  });
}

void merge(const Batch& b, const Partial& into, const Partial& next, size_t head) {
  b.kernels.attn_merge(&into.m[head], &into.sum[head], into.acc + head * b.layout.acc_stride, next.m[head],
                       next.sum[head], next.acc + head * b.layout.acc_stride, b.config.head_dim_v);
}

void finish(const Batch& b, const Partial& done, size_t g, size_t head, size_t t) {
  float* y = b.row(b.layout.h, t) + (g * b.config.heads_per_kv() + head) * b.config.head_dim_v;
  b.kernels.attn_finish(done.acc + head * b.layout.acc_stride, done.sum[head], b.config.head_dim_v, y);
}

// One token: every (KV head, chunk) is a task of its own, so that all threads are busy however few heads there are.
void attend_one(Team& team, Batch& b, size_t layer) {
  const size_t groups = b.config.n_kv_heads;
  const size_t chunks = ceil_div(b.pos + 1, kAttnChunk);
  each(team, groups * chunks, [&](size_t task) {
    if (cancelled(b)) return;
    attend_chunk(b, layer, task / chunks, 0, task % chunks, partial(b, task));
  });
  const size_t heads = b.config.heads_per_kv();
  each(team, b.config.n_heads, [&](size_t task) {
    if (cancelled(b)) return;
    const size_t g = task / heads;
    const size_t head = task % heads;
    const Partial total = partial(b, g * chunks);
    for (size_t c = 1; c < chunks; ++c) merge(b, total, partial(b, g * chunks + c), head);
    finish(b, total, g, head, 0);
  });
}

// Several tokens: a task is one token's group over all chunks, neighbours in time share the group's keys.
void attend_many(Team& team, Batch& b, size_t layer) {
  const Partial total = partial(b, 2 * team.index());
  const Partial next = partial(b, 2 * team.index() + 1);
  each(team, b.config.n_kv_heads * b.n, [&](size_t task) {
    if (cancelled(b)) return;
    const size_t g = task / b.n;
    const size_t t = task % b.n;
    attend_chunk(b, layer, g, t, 0, total);
    for (size_t c = 1; c < ceil_div(b.pos + t + 1, kAttnChunk); ++c) {
      if (cancelled(b)) return;  // at 64k positions a task is long
      attend_chunk(b, layer, g, t, c, next);
      for (size_t head = 0; head < b.config.heads_per_kv(); ++head) merge(b, total, next, head);
    }
    for (size_t head = 0; head < b.config.heads_per_kv(); ++head) finish(b, total, g, head, t);
  });
}

}  // namespace

void embed(Team& team, Batch& b) {
  const Tensor& w = b.weights.tok_embd;
  each(team, b.n, [&](size_t t) {
    const auto id = static_cast<size_t>(b.tokens[t]);
    b.kernels.dequantise[static_cast<int>(w.format)](w.data + id * w.row_bytes, w.cols, b.row(b.layout.x, t));
    rope_angles(b.weights.inv_freq, b.config.rope.attn_scale, b.pos + t, 1, b.row(b.layout.angles, t));
  });
}

void norm(Team& team, Batch& b, const Vector& w, unsigned acts, size_t first) {
  each(team, b.n - first, [&](size_t i) {
    const size_t t = first + i;
    b.kernels.rms_norm(b.row(b.layout.x, t), w.data(), b.config.n_embd, b.config.rms_eps, b.row(b.layout.h, t));
    quantise_row(b, t, b.config.n_embd, acts);
  });
}

void quantise(Team& team, Batch& b, size_t n, unsigned acts) {
  if (acts == 1u << static_cast<int>(Act::F32)) return;
  each(team, b.n, [&](size_t t) { quantise_row(b, t, n, acts); });
}

void linear(Team& team, Batch& b, const Job* jobs, size_t count) {
  size_t rows = 0;
  for (size_t j = 0; j < count; ++j) rows += jobs[j].w->rows;
  const size_t step = task_rows(team, rows, jobs[0].w->cols, b.n);  // all jobs read h: they have the same columns
  size_t tasks = 0;
  for (size_t j = 0; j < count; ++j) tasks += ceil_div(jobs[j].w->rows, step);
  each(team, tasks, [&](size_t task) {
    if (cancelled(b)) return;
    const Job* job = jobs;
    while (task >= ceil_div(job->w->rows, step)) task -= ceil_div(job++->w->rows, step);
    const size_t r0 = task * step;
    const size_t r1 = std::min(r0 + step, job->w->rows);
    linear_rows(b, *job->w, r0, r1, 0, b.row(job->y, 0), job->y.stride / sizeof(float));
    const bool bias = job->bias && !job->bias->empty();
    if (!bias && !job->residual) return;
    for (size_t t = 0; t < b.n; ++t) {
      float* y = b.row(job->y, t) + r0;
      float* x = b.row(b.layout.x, t) + r0;
      if (bias) b.kernels.add(y, job->bias->data() + r0, r1 - r0, y);
      if (job->residual) b.kernels.add(x, y, r1 - r0, x);
    }
  });
}

void rotate_and_store(Team& team, Batch& b, size_t layer) {
  const ModelConfig& m = b.config;
  const LayerWeights& w = b.weights.layers[layer];
  const StoreKvFn store = b.kernels.store_kv[static_cast<int>(b.kv.shape().type)];
  const auto prepare = [&](size_t t, float* x, size_t heads, const Vector& head_norm) {
    for (size_t h = 0; h < heads && !head_norm.empty(); ++h)
      b.kernels.rms_norm(x + h * m.head_dim_k, head_norm.data(), m.head_dim_k, m.rms_eps, x + h * m.head_dim_k);
    b.kernels.rope({.x = x,
                    .heads = heads,
                    .stride = m.head_dim_k,
                    .dims = m.rope.dims,
                    .cs = b.row(b.layout.angles, t),
                    .adjacent = m.arch->adjacent_rope});
  };
  each(team, b.n, [&](size_t t) {
    prepare(t, b.row(b.layout.q, t), m.n_heads, w.q_norm);
    float* k = b.row(b.layout.k, t);
    prepare(t, k, m.n_kv_heads, w.k_norm);
    const float* v = b.row(b.layout.v, t);
    for (size_t g = 0; g < m.n_kv_heads; ++g) {
      store(k + g * m.head_dim_k, m.head_dim_k, b.kv.k(layer, g, b.pos + t));
      store(v + g * m.head_dim_v, m.head_dim_v, b.kv.v(layer, g, b.pos + t));
    }
  });
}

void attend(Team& team, Batch& b, size_t layer) { b.n == 1 ? attend_one(team, b, layer) : attend_many(team, b, layer); }

void silu_mul(Team& team, Batch& b, unsigned acts) {
  each(team, b.n, [&](size_t t) {
    b.kernels.silu_mul(b.row(b.layout.gate, t), b.row(b.layout.up, t), b.config.n_ff, b.row(b.layout.h, t));
    quantise_row(b, t, b.config.n_ff, acts);
  });
}

void logits(Team& team, Batch& b) {
  const Tensor& w = b.weights.output;
  const size_t step = task_rows(team, w.rows, w.cols, b.n - b.first_row);
  each(team, ceil_div(w.rows, step), [&](size_t task) {
    if (cancelled(b)) return;
    linear_rows(b, w, task * step, std::min(task * step + step, w.rows), b.first_row, b.logits, b.config.n_vocab);
  });
}

}  // namespace pe
