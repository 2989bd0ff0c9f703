#include "model/model.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "base/fp_env.h"
#include "base/hash.h"
#include "base/text.h"

namespace pe {

const KernelTable& active_kernels(Tier* tier) {
  const char* wanted = nullptr;
  const KernelTable* table = kernels_active(tier, &wanted);
  if (table) return *table;
  std::string have;
  for (int i = 0; i < kTiers; ++i)
    if (tier_available(static_cast<Tier>(i)))
      have += std::string(have.empty() ? "" : ", ") + tier_name(static_cast<Tier>(i));
  throw Error(
      Status::kCpu, "tier_unavailable",
      "PYENGINE_ISA asks for \"" + printable(wanted) + "\", which this processor or build lacks; available: " + have,
      "PYENGINE_ISA");
}

std::shared_ptr<const Model> Model::of(std::shared_ptr<const gguf::File> file, float rope_attn_scale) {
  const FpEnv fp_env;  // rope frequencies are computed here
  const std::shared_ptr<Model> m(new Model);
  Tier tier;
  m->kernels_ = &active_kernels(&tier);
  m->file_ = std::move(file);
  m->config_ = read_config(*m->file_, rope_attn_scale);
  m->weights_ = bind_weights(*m->file_, m->config_);
  for (const gguf::TensorInfo& t : m->file_->tensors()) {
    m->n_params_ += t.dims[0] * t.dims[1] * t.dims[2] * t.dims[3];  // the reader has checked the product
    m->weight_bytes_ += t.size;
  }
  m->mapper_ = std::make_unique<const MapAhead>(m->file_->mappings());
  return m;
}

std::shared_ptr<const Model> Model::open(const std::string& path, const ModelOptions& options) {
  const auto report = [&options](float fraction) {
    if (options.progress && options.progress(fraction))
      throw Error(Status::kCancelled, "cancelled", "opening the model was cancelled");
  };
  Tier tier;
  active_kernels(&tier);  // fails before anything is read
  report(0.0f);
  auto m = of(gguf::File::open(path, options.load, options.progress), options.rope_attn_scale);
  report(1.0f);
  return m;
}

namespace {

constexpr uint64_t kSamples = 4, kSampleBytes = 256;  // of a tensor, evenly spread

uint64_t hash_config(uint64_t h, const ModelConfig& c) {
  h = hash_bytes(h, c.arch->name, std::strlen(c.arch->name));
  for (const size_t n : {c.n_vocab, c.n_layers, c.n_embd, c.n_ff, c.n_heads, c.n_kv_heads, c.head_dim_k, c.head_dim_v,
                         c.rope.dims, static_cast<size_t>(c.rope.scaling)})
    h = hash_word(h, n);
  for (const double x : {static_cast<double>(c.rms_eps), c.rope.base, c.rope.factor, c.rope.orig_ctx, c.rope.beta_fast,
                         c.rope.beta_slow, c.rope.attn_scale})
    h = hash_bytes(h, &x, sizeof x);
  return h;
}

uint64_t hash_tensor(uint64_t h, const gguf::TensorInfo& t) {
  h = hash_word(hash_bytes(h, t.name.data(), t.name.size()), t.type);
  h = hash_bytes(h, t.dims, sizeof t.dims);
  const uint64_t n = std::min(kSampleBytes, t.size);
  for (uint64_t i = 0; i < kSamples; ++i) h = hash_bytes(h, t.data + (t.size - n) / (kSamples - 1) * i, n);
  return h;
}

}  // namespace

// Threads may compute it at once, with the same result: a lock could be held at a fork.
uint64_t Model::fingerprint() const {
  if (const uint64_t known = fingerprint_.load()) return known;
  uint64_t h = hash_config(3, config_);
  for (const gguf::TensorInfo& t : file_->tensors()) h = hash_tensor(h, t);
  file_->check_unchanged();
  fingerprint_.store(h);
  return h;
}

}  // namespace pe
