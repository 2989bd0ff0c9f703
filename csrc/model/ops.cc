#include "model/ops.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

namespace pe {

namespace {

// Few tokens: rows of a task, whole tiles. Kernels fetch the rows they come to next, so a thread reads at full speed as long
// as it goes straight on; each jump to another task starts cold. The last quarter of an operation is handed out in tasks of
// a quarter of that: nobody waits long for the thread that took the last one.
constexpr size_t kFewTokens = 8;
constexpr size_t kTaskRowsMin = 32;
constexpr size_t kTaskRowsMax = 4096;  // of one token, fewer of several: a cancel is polled between tasks
constexpr size_t kTasksPerThread = 2;
// Many tokens: tasks of as many rows as the kernels want, if every thread gets some. The slowest kernel, the scalar one,
// takes 0.15 s for its 16 rows.
constexpr size_t kTasksPerThreadMany = 4;
constexpr size_t kTileRows = 32;
// Attention of few tokens: chunks a thread takes at once, because a kernel fetches the keys that follow its own, and how
// many such runs it gets at least.
constexpr size_t kRunChunks = 4;
constexpr size_t kRunsPerThread = 16;
// Attention of many tokens: tiles a thread gets at least, where there are enough tokens.
constexpr size_t kTilesPerThread = 4;

// body(i) for every task i, one at a time on whichever thread is free; ends in a barrier.
template <typename Body>
void each(Team& team, size_t n, Body&& body) {
  team.for_each(n, 1, [&](size_t begin, size_t) { body(begin); });
}

constexpr size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
constexpr size_t whole_tiles(size_t rows, size_t low, size_t high) {
  return std::clamp(rows / kTileRows * kTileRows, low, high);
}

// The rows 0 .. rows - 1 of an operation as tasks: long ones, then short ones.
struct Tasks {
  size_t rows, long_rows, short_rows, n_long, count;

  Tasks(const Team& team, const Batch& b, size_t rows_, size_t tokens) : rows(rows_) {
    if (tokens <= kFewTokens) {
      const size_t most = kTaskRowsMax / tokens / kTileRows * kTileRows;
      long_rows = whole_tiles(rows / (kTasksPerThread * team.size()), kTaskRowsMin, most);
      short_rows = whole_tiles(long_rows / 4, kTaskRowsMin, most);
    } else {
      const size_t wanted = b.kernels.linear_rows;
      long_rows = whole_tiles(rows / (kTasksPerThreadMany * team.size()), std::min(wanted, kTileRows), wanted);
      short_rows = long_rows;
    }
    n_long = rows * 3 / 4 / long_rows;
    count = n_long + ceil_div(rows - n_long * long_rows, short_rows);
  }
  size_t begin(size_t task) const {
    return task <= n_long ? task * long_rows : n_long * long_rows + (task - n_long) * short_rows;
  }
  size_t end(size_t task) const { return std::min(begin(task + 1), rows); }
};

// What a linear operation reads: the forms of its input and the row of the first token.
struct Input {
  const Scratch::Rows* form[kActs];
  size_t row;
};

// h. A single token's is computed by every thread for itself, which costs less than to wait for one that does it for all:
// thread i's copy is row i.
size_t own_row(const Team& team, size_t tokens, size_t first = 0) { return tokens == 1 ? team.index() : first; }
Input hidden(const Team& team, const Batch& b, size_t first = 0) {
  return {{&b.layout.h, &b.layout.act[1], &b.layout.act[2]}, own_row(team, b.n - first, first)};
}
// silu(gate) * up
Input feed_forward(const Batch& b) { return {{&b.layout.gate, &b.layout.ff[1], &b.layout.ff[2]}, 0}; }

// The quantised forms of h[from][:n], in row `to`.
void quantise_row(const Batch& b, size_t from, size_t to, size_t n, unsigned acts) {
  for (const Act act : {Act::Q32, Act::Q256})
    if (acts >> static_cast<int>(act) & 1)
      b.kernels.quantise_act[static_cast<int>(act)](b.row(b.layout.h, from), n,
                                                    b.row(b.layout.act[static_cast<int>(act)], to));
}

// Quantises x[k .. k + n) of a row of `cols` values: whole blocks of it.
void quantise_part(const Batch& b, Act act, const float* x, size_t cols, size_t k, size_t n, void* row) {
  constexpr size_t kPiece = 1024;
  alignas(64) uint8_t piece[2 * kPiece];
  const size_t block = act_block(act);
  const ActLayout to = act_layout(act, cols);
  auto* out = static_cast<uint8_t*>(row);
  for (const size_t end = k + n; k < end; k += kPiece) {
    const size_t m = std::min(kPiece, end - k);
    const ActLayout from = act_layout(act, m);
    b.kernels.quantise_act[static_cast<int>(act)](x + k, m, piece);
    std::memcpy(out + k, piece, m);
    std::memcpy(out + to.scale_at + k / block * sizeof(float), piece + from.scale_at, m / block * sizeof(float));
    std::memcpy(out + to.sum_at + k / 8 * sizeof(int16_t), piece + from.sum_at, m / 8 * sizeof(int16_t));
    std::memcpy(out + to.sum16_at + k / 16 * sizeof(int16_t), piece + from.sum16_at, m / 16 * sizeof(int16_t));
    std::memcpy(out + to.sum32_at + k / 32 * sizeof(int16_t), piece + from.sum32_at, m / 32 * sizeof(int16_t));
  }
}

// What `w` and the matrices beside it are about to read is added up where somebody asked for it. Thread 0 does it without a
// barrier: nobody writes the input before the end of the operation, whose tasks the other threads take meanwhile.
void observe(const Team& team, const Batch& b, const Tensor& w, const Input& x, size_t tokens) {
  if (!b.inputs || team.index() != 0) return;
  const Scratch::Rows& floats = *x.form[static_cast<int>(Act::F32)];
  b.inputs->add(w, b.row(floats, x.row), floats.stride, tokens);
}

// Rows r0 .. r1 of `w` times `tokens` rows of x, into y[t][r0 ..] (floats, `stride` apart).
void linear_rows(const Batch& b, const Tensor& w, const Input& x, size_t tokens, size_t r0, size_t r1, float* y,
                 size_t stride) {
  const Scratch::Rows& form = *x.form[static_cast<int>(w.act)];
  b.kernels.linear[static_cast<int>(w.format)]({
      .w = w.data + r0 * w.row_bytes,
      .w_stride = w.row_bytes,
      .rows = r1 - r0,
      .cols = w.cols,
      .x = b.row(form, x.row),
      .x_stride = form.stride,
      .tokens = tokens,
      .y = y + r0,
      .y_stride = stride,
  });
}

// Tokens t0 .. t1 of the batch against KV head `group`: its heads share the keys. Slot `slot` + (t - t0) * heads + head
// belongs to token t and that head of the group.
struct Tile {
  size_t group, t0, t1;
};

// The first token of the tile that sees chunk c.
size_t first_seeing(const Batch& b, const Tile& tile, size_t c) {
  const size_t first = c * kAttnChunk;
  return first > b.pos + tile.t0 ? first - b.pos : tile.t0;
}

// The tile against chunk c, keys up to and including each token's own position.
void attend_chunk(const Team& team, const Batch& b, size_t layer, const Tile& tile, size_t c, size_t slot) {
  const ModelConfig& m = b.config;
  const size_t first = c * kAttnChunk;
  const size_t t = first_seeing(b, tile, c);
  slot += (t - tile.t0) * m.heads_per_kv();
  b.kernels.attn_chunk[static_cast<int>(b.kv.shape().type)]({
      .q = b.row(b.layout.q, t) + tile.group * m.heads_per_kv() * m.head_dim_k,
      .tokens = tile.t1 - t,
      .heads = m.heads_per_kv(),
      .q_stride = b.layout.q.stride / sizeof(float),
      .k = b.kv.k(layer, tile.group, first),
      .v = b.kv.v(layer, tile.group, first),
      .keys = std::min(kAttnChunk, b.pos + t + 1 - first),
      .head_dim_k = m.head_dim_k,
      .head_dim_v = m.head_dim_v,
      .scale = 1.0f / std::sqrt(static_cast<float>(m.head_dim_k)),
      .acc = b.row(b.layout.acc, slot),
      .acc_stride = b.layout.acc_stride,
      .m = b.row(b.layout.max, 0) + slot,
      .sum = b.row(b.layout.sum, 0) + slot,
      .work = b.row(b.layout.work, team.index()),
  });
}

void merge(const Batch& b, size_t into, size_t next) {
  float* m = b.row(b.layout.max, 0);
  float* sum = b.row(b.layout.sum, 0);
  b.kernels.attn_merge(m + into, sum + into, b.row(b.layout.acc, into), m[next], sum[next], b.row(b.layout.acc, next),
                       b.config.head_dim_v);
}

// head: of all n_heads
void finish(const Batch& b, size_t slot, size_t t, size_t head) {
  b.kernels.attn_finish(b.row(b.layout.acc, slot), b.row(b.layout.sum, 0)[slot], b.config.head_dim_v,
                        b.row(b.layout.h, t) + head * b.config.head_dim_v);
}

// Few tokens: every (KV head, chunk) is a task of its own, so that all threads are busy however few heads there are, and
// keys and values are read once for all tokens.
void attend_few(Team& team, Batch& b, size_t layer) {
  const size_t chunks = ceil_div(b.pos + b.n, kAttnChunk);
  const size_t heads = b.config.heads_per_kv();
  const size_t rows = b.n * heads;  // of a (KV head, chunk)
  const size_t tasks = b.config.n_kv_heads * chunks;
  team.for_each(tasks, std::clamp<size_t>(tasks / (kRunsPerThread * team.size()), 1, kRunChunks),
                [&](size_t begin, size_t end) {
                  for (size_t task = begin; task < end && !cancelled(b); ++task)
                    attend_chunk(team, b, layer, {task / chunks, 0, b.n}, task % chunks, task * rows);
                });
  each(team, b.n * b.config.n_heads, [&](size_t task) {
    if (cancelled(b)) return;
    const size_t t = task / b.config.n_heads;
    const size_t head = task % b.config.n_heads;
    const size_t total = head / heads * chunks * rows + t * heads + head % heads;
    for (size_t c = 1; c < ceil_div(b.pos + t + 1, kAttnChunk); ++c) merge(b, total, total + c * rows);
    finish(b, total, t, head);
  });
}

// Many tokens: a task is a tile of them over all chunks. Tasks next to each other in time share a KV head, the longest first.
void attend_many(Team& team, Batch& b, size_t layer) {
  const size_t heads = b.config.heads_per_kv();
  const size_t groups = b.config.n_kv_heads;
  const size_t even = ceil_div(b.n * groups, kTilesPerThread * team.size());
  const size_t step = std::min(b.layout.tile_tokens, even);
  const size_t tiles = ceil_div(b.n, step);
  const size_t total = 2 * team.index() * b.layout.tile_tokens * heads;
  const size_t next = total + b.layout.tile_tokens * heads;
  each(team, groups * tiles, [&](size_t task) {
    const size_t t0 = (tiles - 1 - task % tiles) * step;
    const Tile tile{task / tiles, t0, std::min(t0 + step, b.n)};
    for (size_t c = 0; c < ceil_div(b.pos + tile.t1, kAttnChunk); ++c) {
      if (cancelled(b)) return;
      attend_chunk(team, b, layer, tile, c, c == 0 ? total : next);
      if (c == 0) continue;
      for (size_t t = first_seeing(b, tile, c); t < tile.t1; ++t)
        for (size_t i = (t - t0) * heads; i < (t - t0 + 1) * heads; ++i) merge(b, total + i, next + i);
    }
    for (size_t t = t0; t < tile.t1; ++t)
      for (size_t head = 0; head < heads; ++head)
        finish(b, total + (t - t0) * heads + head, t, tile.group * heads + head);
  });
}

}  // namespace

void embed(Team& team, Batch& b) {
  const Tensor& w = b.weights.tok_embd;
  if (team.index() == 0)
    std::memset(b.row(b.layout.done, 0), 0, b.layout.done.stride);  // a cancelled batch leaves counts
  each(team, b.n, [&](size_t t) {
    const auto id = static_cast<size_t>(b.tokens[t]);
    b.kernels.dequantise[static_cast<int>(w.format)](w.data + id * w.row_bytes, w.cols, b.row(b.layout.x, t));
    rope_angles(b.weights.inv_freq, b.config.rope.attn_scale, b.pos + t, 1, b.row(b.layout.angles, t));
  });
}

void norm(Team& team, Batch& b, const Vector& w, unsigned acts, size_t first) {
  const auto one = [&](size_t t, size_t to) {
    b.kernels.rms_norm(b.row(b.layout.x, t), w.data(), b.config.n_embd, b.config.rms_eps, b.row(b.layout.h, to));
    quantise_row(b, to, to, b.config.n_embd, acts);
  };
  if (b.n - first == 1) return one(first, own_row(team, 1));
  each(team, b.n - first, [&](size_t i) { one(first + i, first + i); });
}

void quantise(Team& team, Batch& b, size_t n, unsigned acts) {
  const bool floats = acts >> static_cast<int>(Act::F32) & 1;
  if (b.n == 1) {
    const size_t own = own_row(team, 1);
    quantise_row(b, 0, own, n, acts);
    if (floats && own != 0) std::memcpy(b.row(b.layout.h, own), b.row(b.layout.h, 0), n * sizeof(float));
  } else if (acts != 1u << static_cast<int>(Act::F32)) {
    each(team, b.n, [&](size_t t) { quantise_row(b, t, t, n, acts); });
  }
}

namespace {

void linear_from(Team& team, Batch& b, const Input& x, const Job* jobs, size_t count) {
  size_t rows = 0;
  for (size_t j = 0; j < count; ++j) rows += jobs[j].w->rows;
  const Tasks tasks(team, b, rows, b.n);
  observe(team, b, *jobs[0].w, x, b.n);
  each(team, tasks.count, [&](size_t task) {
    const size_t begin = tasks.begin(task), end = tasks.end(task);
    size_t first = 0;  // the job's first row among all rows
    for (const Job* job = jobs; job != jobs + count; first += job++->w->rows) {
      if (cancelled(b)) return;
      const size_t r0 = std::max(begin, first) - first;
      const size_t r1 = std::min(end, first + job->w->rows) - std::min(end, first);
      if (r0 >= r1) continue;
      linear_rows(b, *job->w, x, b.n, r0, r1, b.row(job->y, 0), job->y.stride / sizeof(float));
      const bool bias = job->bias && !job->bias->empty();
      if (!bias && !job->residual) continue;
      for (size_t t = 0; t < b.n; ++t) {
        float* y = b.row(job->y, t) + r0;
        float* residual = b.row(b.layout.x, t) + r0;
        if (bias) b.kernels.add(y, job->bias->data() + r0, r1 - r0, y);
        if (job->residual) b.kernels.add(residual, y, r1 - r0, residual);
      }
    }
  });
}

// Quantises what became complete of gate's rows when r0 .. r1 did: whole blocks at once, a block that several tasks share
// when the last of them comes.
void quantise_finished(Batch& b, Act act, size_t r0, size_t r1) {
  if (act == Act::F32) return;
  const size_t block = act_block(act), n_ff = b.config.n_ff;
  const auto ready = [&](size_t k, size_t n) {
    for (size_t t = 0; t < b.n && n != 0; ++t)
      quantise_part(b, act, b.row(b.layout.gate, t), n_ff, k, n, b.row(b.layout.ff[static_cast<int>(act)], t));
  };
  const auto part = [&](size_t k, size_t n) {
    if (n == 0) return;
    const std::atomic_ref done(reinterpret_cast<uint32_t*>(b.row(b.layout.done, 0))[k / block]);
    if (done.fetch_add(static_cast<uint32_t>(n), std::memory_order_acq_rel) + n != block) return;
    done.store(0, std::memory_order_relaxed);
    ready(k / block * block, block);
  };
  const size_t first = std::min(ceil_div(r0, block) * block, r1);
  const size_t last = std::max(r1 / block * block, first);
  part(r0, first - r0);
  ready(first, last - first);
  part(last, r1 - last);
}

}  // namespace

void linear(Team& team, Batch& b, const Job* jobs, size_t count) { linear_from(team, b, hidden(team, b), jobs, count); }

void gate_up(Team& team, Batch& b, const Tensor& gate, const Tensor& up, Act act) {
  const Input x = hidden(team, b);
  const Tasks tasks(team, b, b.config.n_ff, b.n);
  observe(team, b, gate, x, b.n);
  const auto multiply = [&](const Tensor& w, const Scratch::Rows& y, size_t r0, size_t r1) {
    linear_rows(b, w, x, b.n, r0, r1, b.row(y, 0), y.stride / sizeof(float));
  };
  each(team, tasks.count, [&](size_t task) {
    if (cancelled(b)) return;
    const size_t r0 = tasks.begin(task), r1 = tasks.end(task);
    multiply(gate, b.layout.gate, r0, r1);
    multiply(up, b.layout.up, r0, r1);
    for (size_t t = 0; t < b.n; ++t) {
      float* y = b.row(b.layout.gate, t) + r0;
      b.kernels.silu_mul(y, b.row(b.layout.up, t) + r0, r1 - r0, y);
    }
    quantise_finished(b, act, r0, r1);
  });
}

void down(Team& team, Batch& b, const Tensor& w) {
  const Job job{&w, nullptr, b.layout.out, true};
  linear_from(team, b, feed_forward(b), &job, 1);
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

void attend(Team& team, Batch& b, size_t layer) {
  b.n <= kSplitTokens ? attend_few(team, b, layer) : attend_many(team, b, layer);
}

void logits(Team& team, Batch& b) {
  const Tensor& w = b.weights.output;
  const size_t tokens = b.n - b.first_row;
  const Input x = hidden(team, b, b.first_row);
  const Tasks tasks(team, b, w.rows, tokens);
  observe(team, b, w, x, tokens);
  each(team, tasks.count, [&](size_t task) {
    if (cancelled(b)) return;
    linear_rows(b, w, x, tokens, tasks.begin(task), tasks.end(task), b.logits, b.config.n_vocab);
  });
}

}  // namespace pe
