// The numbers of a model, read from the file once and range-checked; the forward pass believes them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "model/angles.h"

namespace pe {

namespace gguf {
class File;
}

// What an architecture says about the common decoder block. A model that does not fit that block gets a block function of
// its own, never more switches here.
struct ArchSpec {
  enum class Presence { kNever, kOptional, kRequired };

  const char* name;    // general.architecture, and the prefix of its keys
  bool adjacent_rope;  // rotation pairs (2i, 2i + 1), as Llama files store Q and K; otherwise (i, i + dims / 2)
  Presence qkv_bias;   // attn_{q,k,v}.bias
  Presence out_bias;   // attn_output.bias
  Presence qk_norm;    // attn_{q,k}_norm.weight, over each head before the rotation
};

// The descriptor of an architecture, nullptr when there is none. `known_archs` names them all for error messages.
const ArchSpec* find_arch(const std::string& name);
std::string known_archs();

struct ModelConfig {
  const ArchSpec* arch = nullptr;
  size_t n_vocab = 0;      // rows of the token embedding = columns of the logits
  size_t n_ctx_train = 0;  // positions
  size_t n_layers = 0;
  size_t n_embd = 0;
  size_t n_ff = 0;
  size_t n_heads = 0;
  size_t n_kv_heads = 0;  // divides n_heads
  size_t head_dim_k = 0;  // of a query or key head
  size_t head_dim_v = 0;
  float rms_eps = 0;
  RopeSpec rope;      // frequencies, scaling; factors point into Weights
  std::string notes;  // lines for a careful user

  size_t q_dim() const { return n_heads * head_dim_k; }
  size_t k_dim() const { return n_kv_heads * head_dim_k; }
  size_t v_dim() const { return n_kv_heads * head_dim_v; }
  size_t o_dim() const { return n_heads * head_dim_v; }
  size_t heads_per_kv() const { return n_heads / n_kv_heads; }
};

inline constexpr uint32_t kMaxWidth = 1u << 20;  // of any dimension of the block; the largest published model has 2^17

// Reads and checks every key of the architecture's schema. rope_attn_scale > 0 overrides the file's YaRN attention scale.
// Throws Error: kFormat (a key is missing, mistyped, out of range), kUnsupported (unknown architecture, experts).
ModelConfig read_config(const gguf::File& file, float rope_attn_scale);

}  // namespace pe
