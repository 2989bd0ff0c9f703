// Checks attention over the KV cache: every tier against the scalar specification bit for bit, and the scalar one against
// one softmax in long double. Prints a summary; exit status 1 on failure.
//
//   attention_check --bench [THREADS [WORD...]]   the speed instead: prefill against the limit of fp32 fma (16 MAC a cycle and
//                                                 core with AVX2, 32 with AVX-512), decode against the machine's read stream;
//                                                 only lines that contain every WORD
#include <algorithm>
#include <atomic>
#include <memory>

#include "base/aligned_buffer.h"
#include "bits.h"
#include "kernels/kernels.h"
#include "speed.h"

namespace {

using namespace pe;

struct AttnCase {
  Kv type;
  size_t tokens, heads, q_stride, keys, dim_k, dim_v, acc_stride;
  float scale;
  std::vector<float> q, k, v;

  size_t rows() const { return tokens * heads; }
  size_t stored() const { return std::min(keys + tokens - 1, kAttnChunk); }  // keys readable
};

const char* kv_name(Kv type) { return type == Kv::F16 ? "f16" : type == Kv::F32 ? "f32" : "q8_0"; }

// n rows of `dim` floats as the cache stores them.
std::vector<uint8_t> stored(Kv type, const std::vector<float>& x, size_t dim) {
  const size_t row = kv_row_bytes(type, dim), n = x.size() / dim;
  std::vector<uint8_t> out(n * row);
  const StoreKvFn store = kernels_for(Tier::kScalar)->store_kv[static_cast<int>(type)];
  for (size_t i = 0; i < n; ++i) store(x.data() + i * dim, dim, out.data() + i * row);
  return out;
}

// acc [rows][dim_v], m and sum in one vector. What lies behind acc's last row, or before a guard page, must not be touched.
std::vector<float> run_attn(const KernelTable& table, const AttnCase& c) {
  const std::vector<uint8_t> k = stored(c.type, c.k, c.dim_k), v = stored(c.type, c.v, c.dim_v);
  Guarded<float> q(c.q.size());
  Guarded<uint8_t> k_rows(k.size()), v_rows(v.size());
  Guarded<float> acc(c.rows() * c.acc_stride), m(c.rows()), sum(c.rows());
  Guarded<float> work(pad16(attn_work(c.dim_k, c.dim_v)));
  q.set(c.q), k_rows.set(k), v_rows.set(v);
  work.set(std::vector<float>(work.size(), NAN));  // what an earlier call left behind must not matter
  table.attn_chunk[static_cast<int>(c.type)]({q.get(), c.tokens, c.heads, c.q_stride, k_rows.get(), v_rows.get(),
                                              c.keys, c.dim_k, c.dim_v, c.scale, acc.get(), c.acc_stride, m.get(),
                                              sum.get(), work.get()});
  std::vector<float> out;
  for (size_t r = 0; r < c.rows(); ++r)
    out.insert(out.end(), acc.get() + r * c.acc_stride, acc.get() + r * c.acc_stride + c.dim_v);
  for (const auto& part : {m.copy(), sum.copy()}) out.insert(out.end(), part.begin(), part.end());
  return out;
}

AttnCase draw_attn(Kv type, size_t tokens, size_t heads, size_t dim_k, size_t dim_v, size_t keys, Values values) {
  AttnCase c{type, tokens, heads, heads * dim_k + below(3), keys, dim_k, dim_v, pad16(dim_v) + 16 * below(2), 0.25f,
             {},   {},     {}};
  const Values plain = values == Values::kHostile ? Values::kPlain : values;
  c.q = floats((tokens - 1) * c.q_stride + heads * dim_k, plain);
  c.k = floats(c.stored() * dim_k, plain);
  c.v = floats(c.stored() * dim_v, values);
  if (values == Values::kHostile) {  // a few odd values: with many, everything is NaN
    c.q[below(c.q.size())] = draw(values);
    c.k[below(c.k.size())] = draw(values);
  }
  return c;
}

// ---- every tier equals the scalar one ----

void check_attention(const KernelTable& scalar, const KernelTable& tier, const std::string& name) {
  const size_t dims[] = {1, 2, 7, 8, 9, 15, 16, 17, 24, 25, 31, 33, 48, 64, 80, 96, 100, 128, 160, 192, 256};
  const size_t keys[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 100, 127, 255, 256};
  const auto compare = [&](const AttnCase& c) {
    check(same(run_attn(scalar, c), run_attn(tier, c)),
          "attn_chunk " + name + " " + kv_name(c.type) + " tokens=" + std::to_string(c.tokens) +
              " heads=" + std::to_string(c.heads) + " keys=" + std::to_string(c.keys) +
              " dims=" + std::to_string(c.dim_k) + "," + std::to_string(c.dim_v));
  };
  for (int i = 0; i < 3 * 1200; ++i) {
    const Kv type = static_cast<Kv>(i % kKvs);
    const auto dim = [&] { return type == Kv::Q8_0 ? 32 * (1 + below(8)) : dims[below(std::size(dims))]; };
    const size_t dim_k = dim(), dim_v = below(3) ? dim_k : dim();
    const Values values = kAllValues[below(std::size(kAllValues))];
    const size_t heads = 1 + below(below(8) ? 5 : 17);
    // one token as in decode, up to nine as in a check of guesses, rarely a tile that crosses the end of the chunk
    const size_t tokens = i % 2 ? 1 : 1 + below(below(8) ? 9 : below(8) ? 60 : 300);
    compare(draw_attn(type, tokens, heads, dim_k, dim_v, keys[below(std::size(keys))], values));
  }
  // the sign of a zero maximum, whichever lane it sits in
  for (size_t n = 1; n <= 40; ++n) {
    AttnCase c = draw_attn(Kv::F32, 1, 1, 1, 1, n, Values::kPlain);
    c.q = {1.0f};
    for (float& k : c.k) k = below(2) ? -0x1p-149f : 0x1p-149f;
    c.scale = 0x1p-10f;  // scores of +0 and -0
    compare(c);
  }
  // weights that come out as 0 or as denormals: every float from -86 down to -106, each next to a score of 0
  AttnCase c = draw_attn(Kv::F32, 1, 1, 1, 1, kAttnChunk, Values::kPlain);
  c.q = {1.0f}, c.scale = 1.0f;
  for (float x = -86.0f; x > -106.0f;) {
    c.k[0] = 0.0f;
    for (size_t j = 1; j < c.k.size(); ++j) c.k[j] = x, x = std::nextafter(x, -INFINITY);
    compare(c);
  }
}

void check_merge(const KernelTable& scalar, const KernelTable& tier, const std::string& name) {
  const float odd[] = {0.0f, 1.5f, -200.0f, 200.0f, INFINITY, -INFINITY, NAN};
  for (const size_t n : {1, 3, 7, 8, 9, 15, 16, 17, 64, 80, 100, 128, 160}) {
    for (const Values values : kAllValues) {
      for (const float m1 : odd) {
        const float m2 = odd[below(std::size(odd))], sum1 = 1 + std::fabs(uniform()), sum2 = draw(values);
        const std::vector<float> first = floats(n, values), second = floats(n, values);
        const auto merged = [&](const KernelTable& k) {
          Guarded<float> acc(n), acc2(n);
          acc.set(first), acc2.set(second);
          float m = m1, sum = sum1;
          k.attn_merge(&m, &sum, acc.get(), m2, sum2, acc2.get(), n);
          std::vector<float> out = acc.copy();
          out.push_back(m), out.push_back(sum);
          return out;
        };
        const auto finished = [&](const KernelTable& k) {
          Guarded<float> acc(n), y(n);
          acc.set(first);
          k.attn_finish(acc.get(), sum2, n, y.get());
          return y.copy();
        };
        check(same(merged(scalar), merged(tier)), "attn_merge " + name);
        check(same(finished(scalar), finished(tier)), "attn_finish " + name);
      }
    }
  }
}

// ---- the specification against long double arithmetic ----

// Several chunks merged and finished, against one softmax in long double.
void check_attention_formula(const KernelTable& table) {
  for (int round = 0; round < 12; ++round) {
    const size_t keys = 300 + below(500), dim = 16 + 4 * below(20);
    AttnCase c = draw_attn(Kv::F32, 1, 1, dim, dim, keys, Values::kPlain);
    c.k = floats(keys * dim, Values::kPlain), c.v = floats(keys * dim, Values::kPlain);
    c.scale = 4.0f;  // peaked enough that the maximum matters
    std::vector<float> acc(dim), y(dim);
    float m = 0, sum = 0;
    for (size_t j = 0; j < keys; j += kAttnChunk) {
      AttnCase part = c;
      part.keys = std::min(kAttnChunk, keys - j);
      part.k.assign(c.k.begin() + static_cast<long>(j * dim), c.k.begin() + static_cast<long>((j + part.keys) * dim));
      part.v.assign(c.v.begin() + static_cast<long>(j * dim), c.v.begin() + static_cast<long>((j + part.keys) * dim));
      const std::vector<float> out = run_attn(table, part);
      if (j == 0) {
        std::copy_n(out.begin(), dim, acc.begin());
        m = out[dim], sum = out[dim + 1];
      } else {
        table.attn_merge(&m, &sum, acc.data(), out[dim], out[dim + 1], out.data(), dim);
      }
    }
    table.attn_finish(acc.data(), sum, dim, y.data());

    std::vector<long double> s(keys);
    for (size_t j = 0; j < keys; ++j) {
      for (size_t d = 0; d < dim; ++d) s[j] += static_cast<long double>(c.q[d]) * c.k[j * dim + d];
      s[j] *= c.scale;
    }
    const long double top = *std::max_element(s.begin(), s.end());
    long double total = 0;
    for (long double& x : s) total += x = expl(x - top);
    for (size_t d = 0; d < dim; ++d) {
      long double exact = 0;
      for (size_t j = 0; j < keys; ++j) exact += s[j] / total * c.v[j * dim + d];
      check(near(y[d], exact, 2e-5L), "attention over merged chunks by long double");
    }
  }
}

// ---- speed of attention ----

struct Shape {
  size_t kv_heads, heads, dim;  // heads: of a KV head
};

// Keys and values of `layers` layers, [layer][KV head][position] as in the cache, every row the same.
struct BenchCache {
  size_t row, positions, kv_heads;
  AlignedBuffer k, v;

  BenchCache(const Shape& s, Kv type, size_t layers, size_t n)
      : row(kv_row_bytes(type, s.dim)),
        positions(n),
        kv_heads(s.kv_heads),
        k(layers * s.kv_heads * n * row),
        v(layers * s.kv_heads * n * row) {
    const std::vector<uint8_t> one = stored(type, floats(s.dim, Values::kPlain), s.dim);
    for (size_t i = 0; i < layers * s.kv_heads * n; ++i) {
      std::memcpy(k.as<uint8_t>() + i * row, one.data(), row);
      std::memcpy(v.as<uint8_t>() + i * row, one.data(), row);
    }
  }
  size_t at(size_t layer, size_t g, size_t pos) const { return ((layer * kv_heads + g) * positions + pos) * row; }
};

// One thread's queries, results and work for tiles of `tokens`.
struct BenchRows {
  size_t rows, stride;
  AlignedBuffer q, acc, next, stats, work;

  BenchRows(const Shape& s, size_t tokens)
      : rows(tokens * s.heads),
        stride(s.kv_heads * s.heads * s.dim),
        q(tokens * stride * sizeof(float)),
        acc(rows * pad16(s.dim) * sizeof(float)),
        next(rows * pad16(s.dim) * sizeof(float)),
        stats(4 * rows * sizeof(float)),
        work(attn_work(s.dim, s.dim) * sizeof(float)) {
    for (size_t i = 0; i < tokens * stride; ++i) q.as<float>()[i] = uniform();
  }

  void chunk(const KernelTable& kernels, const Shape& s, Kv type, size_t g, const void* k, const void* v, bool first) {
    float* m = stats.as<float>() + (first ? 0 : 2 * rows);
    float* to = (first ? acc : next).as<float>();
    kernels.attn_chunk[static_cast<int>(type)]({q.as<float>() + g * s.heads * s.dim, rows / s.heads, s.heads, stride, k,
                                                v, kAttnChunk, s.dim, s.dim, 0.1f, to, pad16(s.dim), m, m + rows,
                                                work.as<float>()});
    for (size_t r = 0; r < rows && !first; ++r) {
      float* total = stats.as<float>() + r;
      kernels.attn_merge(total, total + rows, acc.as<float>() + r * pad16(s.dim), m[r], m[rows + r],
                         to + r * pad16(s.dim), s.dim);
    }
  }
};

void bench_attention(Tier tier, size_t threads, const std::vector<std::string>& words) {
  const KernelTable& kernels = *kernels_for(tier);
  for (const Shape s : {Shape{8, 4, 128}, Shape{64, 1, 64}}) {
    for (const Kv type : {Kv::F16, Kv::Q8_0, Kv::F32}) {
      char name[64];
      std::snprintf(name, sizeof name, "%-6s %2zu KV heads x %zu x %3zu, %-4s", tier_name(tier), s.kv_heads, s.heads,
                    s.dim, kv_name(type));
      if (!std::all_of(words.begin(), words.end(), [&](const auto& w) { return std::strstr(name, w.c_str()); }))
        continue;
      std::printf("%s", name);
      // prefill: a tile of every KV head against 4096 keys
      {
        constexpr size_t kKeys = 4096;
        const BenchCache cache(s, type, 1, kKeys);
        std::vector<std::unique_ptr<BenchRows>> rows;
        for (size_t i = 0; i < threads; ++i) rows.push_back(std::make_unique<BenchRows>(s, kAttnRows / s.heads));
        const double time = best_time(threads, [&](size_t i) {
          for (size_t g = i; g < s.kv_heads; g += threads) {
            for (size_t j = 0; j < kKeys; j += kAttnChunk) {
              const size_t at = cache.at(0, g, j);
              rows[i]->chunk(kernels, s, type, g, cache.k.as<uint8_t>() + at, cache.v.as<uint8_t>() + at, j == 0);
            }
          }
        });
        const double macs = static_cast<double>(s.kv_heads * rows[0]->rows * kKeys * 2 * s.dim);
        std::printf("  prefill %6.2f MAC/cycle/core", macs / time / clock_rate() / static_cast<double>(threads));
      }
      // decode at 8192 keys: layers until no cache holds them
      constexpr size_t kKeys = 8192;
      const size_t layer = s.kv_heads * kKeys * 2 * kv_row_bytes(type, s.dim), layers = (size_t{256} << 20) / layer;
      const BenchCache cache(s, type, layers, kKeys);
      for (const size_t tokens : {1, 4}) {
        std::vector<std::unique_ptr<BenchRows>> rows;
        for (size_t i = 0; i < threads; ++i) rows.push_back(std::make_unique<BenchRows>(s, tokens));
        std::atomic<size_t> next{0};
        const size_t chunks = kKeys / kAttnChunk, tasks = layers * s.kv_heads * chunks;
        const double time = best_time(threads, [&](size_t i) {
          for (;;) {
            const size_t task = next.fetch_add(1);
            if (task % (tasks + threads) >= tasks) return;  // each thread takes one task too many
            const size_t n = task % (tasks + threads), group = n / chunks;
            const size_t at = cache.at(group / s.kv_heads, group % s.kv_heads, n % chunks * kAttnChunk);
            rows[i]->chunk(kernels, s, type, group % s.kv_heads, cache.k.as<uint8_t>() + at, cache.v.as<uint8_t>() + at,
                           true);
          }
        });
        std::printf("  %zu token%s %6.2f GB/s", tokens, tokens == 1 ? "" : "s",
                    static_cast<double>(layers * layer) / time * 1e-9);
      }
      std::printf("\n");
      std::fflush(stdout);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "--bench") == 0) {
    const size_t threads = argc > 2 ? std::max(1ul, std::strtoul(argv[2], nullptr, 10)) : 1;
    std::printf("clock %.2f GHz, read stream of %zu %.2f GB/s\n", clock_rate() * 1e-9, threads, read_stream(threads));
    AttnChunkFn last = kernels_for(Tier::kScalar)->attn_chunk[0];
    for (int i = 1; i < kTiers; ++i) {
      const KernelTable* tier = kernels_for(static_cast<Tier>(i));
      if (!tier || tier->attn_chunk[0] == last) continue;  // the kernels of the tier below
      bench_attention(static_cast<Tier>(i), threads, {argv + std::min(argc, 3), argv + argc});
      last = tier->attn_chunk[0];
    }
    return 0;
  }
  const KernelTable& scalar = *kernels_for(Tier::kScalar);
  std::string tiers = tier_name(Tier::kScalar);
  check_attention_formula(scalar);
  for (int i = 1; i < kTiers; ++i) {
    const KernelTable* tier = kernels_for(static_cast<Tier>(i));
    if (!tier) continue;
    const std::string name = tier_name(static_cast<Tier>(i));
    tiers += ", " + name;
    check_attention(scalar, *tier, name);
    check_merge(scalar, *tier, name);
  }
  std::printf("tiers: %s\n", tiers.c_str());
  std::printf("attention_check: %ld checks, %ld failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
