#include "model/config.h"

#include <cmath>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "base/text.h"
#include "gguf/limits.h"
#include "gguf/reader.h"

namespace pe {

namespace {

// The keys of one architecture: "{arch}.{suffix}".
class Keys {
 public:
  Keys(const gguf::File& file, const char* arch) : file_(file), prefix_(std::string(arch) + ".") {}

  std::string name(const char* suffix) const { return prefix_ + suffix; }
  uint32_t u32(const char* suffix, uint32_t min, uint32_t max) const { return file_.u32(name(suffix), min, max); }
  uint32_t u32_or(const char* suffix, uint32_t min, uint32_t max, uint64_t fallback) const {
    return file_.maybe_u32(name(suffix), min, max).value_or(static_cast<uint32_t>(fallback));
  }
  // A float in low..high; `fallback` when absent.
  float f32_or(const char* suffix, float low, float high, float fallback) const {
    const auto value = file_.maybe_f32(name(suffix));
    if (!value) return fallback;
    if (!(*value >= low && *value <= high))
      gguf::fail_value(*file_.find(name(suffix)), "value_out_of_range",
                       name(suffix) + " is " + std::to_string(*value) + "; expected " + std::to_string(low) + ".." +
                           std::to_string(high));
    return *value;
  }
  const gguf::Value* find(const char* suffix) const { return file_.find(name(suffix)); }
  std::string_view string_or(const char* suffix, std::string_view fallback) const {
    return file_.maybe_string(name(suffix)).value_or(fallback);
  }
  [[noreturn]] void fail(const char* suffix, const char* code, const std::string& message) const {
    const gguf::Value* value = find(suffix);
    throw Error(Status::kFormat, code, message, name(suffix), value ? value->offset : kNoOffset);
  }
  [[noreturn]] void unsupported(const char* suffix, const std::string& message) const {
    const gguf::Value* value = find(suffix);
    throw Error(Status::kUnsupported, "unsupported_model", message, name(suffix), value ? value->offset : kNoOffset);
  }

 private:
  const gguf::File& file_;
  std::string prefix_;
};

// A scalar of any numeric type; bools are 0 and 1.
double number_of(const gguf::Value& value) {
  switch (value.type) {
    case gguf::ValueType::kBool: return gguf::boolean_at(value, 0);
    case gguf::ValueType::kFloat32:
    case gguf::ValueType::kFloat64: return gguf::number_at(value, 0);
    default: return static_cast<double>(gguf::integer_at(value, 0, 0, UINT64_MAX));
  }
}

// Keys that change the computation in a way this decoder block does not know. Neutral values are accepted; an array (one
// value per layer) never is.
void refuse_foreign(const Keys& keys) {
  struct Foreign {
    const char* suffix;
    double neutral;
    const char* what;
  };
  static constexpr Foreign kForeign[] = {
      {"expert_count", 0, "experts"},
      {"expert_used_count", 0, "experts"},
      {"attention.causal", 1, "attention to later tokens"},
      {"attention.sliding_window", 0, "sliding-window attention"},
      {"attention.scale", 0, "an own attention scale"},
      {"attention.max_alibi_bias", 0, "ALiBi position biases"},
      {"attention.clamp_kqv", 0, "clamped queries and keys"},
      {"logit_scale", 1, "scaled logits"},
      {"residual_scale", 1, "a scaled residual stream"},
      {"embedding_scale", 1, "scaled embeddings"},
      {"attn_logit_softcapping", 0, "soft-capped attention"},
      {"final_logit_softcapping", 0, "soft-capped logits"},
  };
  for (const Foreign& f : kForeign) {
    const gguf::Value* value = keys.find(f.suffix);
    if (!value) continue;
    if (value->type == gguf::ValueType::kArray || number_of(*value) != f.neutral)
      keys.unsupported(f.suffix, "the model uses " + std::string(f.what) + " (" + keys.name(f.suffix) +
                                     "), which this engine does not run for this architecture");
  }
}

void read_yarn(const Keys& keys, float override_scale, ModelConfig& c) {
  RopeSpec& r = c.rope;
  r.scaling = RopeScaling::kYarn;
  r.orig_ctx = keys.u32_or("rope.scaling.original_context_length", 1, gguf::kMaxContext, c.n_ctx_train);
  r.beta_fast = keys.f32_or("rope.scaling.yarn_beta_fast", 1e-3f, 1e6f, 32.0f);
  r.beta_slow = keys.f32_or("rope.scaling.yarn_beta_slow", 1e-3f, 1e6f, 1.0f);
  const float ext = keys.f32_or("rope.scaling.yarn_ext_factor", -1.0f, 1.0f, 1.0f);
  if (ext != 1.0f && ext != -1.0f)  // -1 is how some writers say "the default"
    keys.unsupported("rope.scaling.yarn_ext_factor",
                     "a YaRN extrapolation factor of " + std::to_string(ext) + " is not supported; expected 1");
  r.attn_scale *= yarn_attn_scale(r.factor);
  if (override_scale > 0) {
    r.attn_scale = override_scale;
  } else if (!keys.find("rope.scaling.attn_factor")) {
    c.notes += "YaRN attention scale " + std::to_string(r.attn_scale) + " assumed: the file has no " +
               keys.name("rope.scaling.attn_factor") + " (--rope-attn-scale overrides it)\n";
  }
}

void read_rope(const Keys& keys, float override_scale, ModelConfig& c) {
  RopeSpec& r = c.rope;
  r.dims = keys.u32_or("rope.dimension_count", 2, static_cast<uint32_t>(c.head_dim_k), c.head_dim_k);
  if (r.dims % 2) {
    const char* from = "attention.head_count";  // of the keys that may have said so, the one that did
    for (const char* suffix : {"attention.key_length", "rope.dimension_count"})
      if (keys.find(suffix)) from = suffix;
    keys.fail(from, "value_out_of_range",
              keys.name(from) + " makes " + std::to_string(r.dims) +
                  " values of a head turn with the position; expected an even number");
  }
  r.base = keys.f32_or("rope.freq_base", 1.0f, 1e12f, 10000.0f);
  r.attn_scale = keys.f32_or("rope.scaling.attn_factor", 1e-3f, 1e3f, 1.0f);
  r.factor = keys.f32_or("rope.scaling.factor", 0.0f, 1e6f, 1.0f);
  if (r.factor == 0) r.factor = 1;  // "none" of older writers
  const std::string_view type = keys.string_or("rope.scaling.type", "");
  if ((type == "yarn" || type == "linear") && !keys.find("rope.scaling.factor"))
    keys.fail("rope.scaling.factor", "missing_key",
              "the file asks for rope scaling but has no " + keys.name("rope.scaling.factor"));
  if (type.empty() && r.factor != 1)
    keys.fail("rope.scaling.type", "missing_key",
              "the file has a " + keys.name("rope.scaling.factor") + " but does not say of which kind: it has no " +
                  keys.name("rope.scaling.type"));
  if (type == "yarn") {
    read_yarn(keys, override_scale, c);
    return;
  }
  if (type == "linear") {
    r.scaling = RopeScaling::kLinear;
  } else if (type.empty() && keys.find("rope.scale_linear")) {  // the key of files from 2023
    r.scaling = RopeScaling::kLinear;
    r.factor = keys.f32_or("rope.scale_linear", 1e-6f, 1e6f, 1.0f);
  } else if (type.empty() || type == "none") {
    r.factor = 1;
  } else {
    keys.unsupported("rope.scaling.type",
                     "rope scaling \"" + printable(type) + "\" is not supported; known: none, linear, yarn");
  }
  if (override_scale > 0)
    throw Error(Status::kArgument, "bad_option",
                "rope_attn_scale is for models with YaRN scaling, and this one has none", "rope_attn_scale");
}

void read_heads(const Keys& keys, ModelConfig& c) {
  for (const char* suffix : {"attention.head_count", "attention.head_count_kv", "feed_forward_length"}) {
    const gguf::Value* value = keys.find(suffix);
    if (value && value->type == gguf::ValueType::kArray)
      keys.unsupported(suffix, keys.name(suffix) + " differs from layer to layer, which this engine does not run");
  }
  c.n_heads = keys.u32("attention.head_count", 1, 65536);
  c.n_kv_heads = keys.u32_or("attention.head_count_kv", 1, 65536, c.n_heads);
  if (c.n_heads % c.n_kv_heads)
    keys.fail("attention.head_count_kv", "value_out_of_range",
              std::to_string(c.n_heads) + " attention heads cannot share " + std::to_string(c.n_kv_heads) +
                  " KV heads: " + keys.name("attention.head_count_kv") + " must divide " +
                  keys.name("attention.head_count"));
  const auto head_dim = [&](const char* suffix) -> size_t {
    if (keys.find(suffix)) return keys.u32(suffix, 1, 65536);
    if (c.n_embd % c.n_heads)
      keys.fail("attention.head_count", "value_out_of_range",
                keys.name("attention.head_count") + " is " + std::to_string(c.n_heads) +
                    ", which does not divide the " + std::to_string(c.n_embd) + " columns, and the file has no " +
                    keys.name(suffix));
    return c.n_embd / c.n_heads;
  };
  c.head_dim_k = head_dim("attention.key_length");
  c.head_dim_v = head_dim("attention.value_length");
  for (const auto& [suffix, dim] :
       {std::pair{"attention.key_length", c.q_dim()}, {"attention.value_length", c.o_dim()}})
    if (dim > kMaxWidth)
      keys.fail(suffix, "value_out_of_range",
                std::to_string(c.n_heads) + " heads of " + std::to_string(dim / c.n_heads) + " values (" +
                    keys.name(suffix) + ") are " + std::to_string(dim) + " columns; expected at most " +
                    std::to_string(kMaxWidth));
}

// The engine works on ids alone, but an id that names nothing would reach it from these keys sooner or later. A file may
// list fewer tokens than the embedding has rows (padding), never more; a model without a vocabulary is runnable.
void check_vocabulary(const gguf::File& file, size_t n_vocab) {
  constexpr std::string_view kPrefix = "tokenizer.ggml.";
  constexpr std::string_view kSuffix = "_token_id";
  uint64_t n = n_vocab;
  if (file.find("tokenizer.ggml.tokens"))
    n = file.array("tokenizer.ggml.tokens", gguf::ElementKind::kString, 1, n_vocab).count;
  if (file.find("tokenizer.ggml.scores")) file.array("tokenizer.ggml.scores", gguf::ElementKind::kFloat, n, n);
  if (file.find("tokenizer.ggml.token_type"))
    file.array("tokenizer.ggml.token_type", gguf::ElementKind::kInteger, n, n);
  if (file.find("tokenizer.ggml.merges"))
    file.array("tokenizer.ggml.merges", gguf::ElementKind::kString, 0, gguf::kMaxArrayLength);
  for (const gguf::Value& value : file.values()) {
    const std::string_view key = value.key;
    if (key.starts_with(kPrefix) && key.ends_with(kSuffix)) file.integer(key, 0, n - 1);
  }
}

// The vocabulary's size is the embedding's.
size_t read_vocabulary(const gguf::File& file, size_t n_embd) {
  const gguf::TensorInfo* embedding = file.find_tensor("token_embd.weight");
  if (!embedding)
    throw Error(Status::kFormat, "missing_tensor",
                file.tensors().empty() ? "the file holds a vocabulary only, no weights: it cannot be run"
                                       : "the tensor token_embd.weight is missing",
                "token_embd.weight");
  if (embedding->n_dims != 2 || embedding->dims[0] != n_embd || embedding->dims[1] > gguf::kMaxVocabulary)
    throw Error(Status::kFormat, "wrong_shape",
                "token_embd.weight is " + std::to_string(embedding->dims[0]) + " x " +
                    std::to_string(embedding->dims[1]) + "; expected " + std::to_string(n_embd) +
                    " x the vocabulary (1.." + std::to_string(gguf::kMaxVocabulary) + ")",
                "token_embd.weight", embedding->entry);
  check_vocabulary(file, embedding->dims[1]);
  return embedding->dims[1];
}

}  // namespace

ModelConfig read_config(const gguf::File& file, float rope_attn_scale) {
  ModelConfig c;
  const std::string name(file.string("general.architecture"));
  c.arch = find_arch(name);
  if (!c.arch)
    throw Error(Status::kUnsupported, "unknown_architecture",
                "the architecture \"" + printable(name) + "\" is not supported; known: " + known_archs(),
                "general.architecture", file.find("general.architecture")->offset);
  const Keys keys(file, c.arch->name);
  refuse_foreign(keys);
  c.n_layers = keys.u32("block_count", 1, gguf::kMaxLayers);
  c.n_ctx_train = keys.u32("context_length", 1, gguf::kMaxContext);
  c.n_embd = keys.u32("embedding_length", 1, kMaxWidth);
  read_heads(keys, c);
  c.n_ff = keys.u32("feed_forward_length", 1, kMaxWidth);
  if (!keys.find("attention.layer_norm_rms_epsilon"))
    keys.fail("attention.layer_norm_rms_epsilon", "missing_key",
              "the key " + keys.name("attention.layer_norm_rms_epsilon") + " is missing");
  c.rms_eps = keys.f32_or("attention.layer_norm_rms_epsilon", 0.0f, 1.0f, 0.0f);
  read_rope(keys, rope_attn_scale, c);
  c.n_vocab = read_vocabulary(file, c.n_embd);
  return c;
}

}  // namespace pe
