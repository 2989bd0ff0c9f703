// The weights of a model, bound once: every tensor with the shape and type the configuration demands.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "kernels/kernels.h"
#include "model/config.h"

namespace pe {

// A matrix in the file: a view, the mapping owns the bytes. y = W x has `rows` outputs from `cols` inputs.
struct Tensor {
  const char* name = "";  // in the file
  Format format = Format::F32;
  Act act = Act::F32;
  size_t rows = 0;
  size_t cols = 0;
  size_t row_bytes = 0;
  const uint8_t* data = nullptr;

  explicit operator bool() const { return data != nullptr; }
};

// Norms, biases, factors: F32 in the file. The reader demands an alignment of 8 at least. Empty where there is none.
using Vector = std::span<const float>;

struct LayerWeights {
  Vector attn_norm;       // [n_embd]
  Tensor wq, wk, wv;      // [q_dim | k_dim | v_dim][n_embd]
  Vector bq, bk, bv;      // [q_dim | k_dim | v_dim]
  Vector q_norm, k_norm;  // [head_dim_k]
  Tensor wo;              // [n_embd][o_dim]
  Vector bo;              // [n_embd]
  Vector ffn_norm;        // [n_embd]
  Tensor gate, up;        // [n_ff][n_embd]
  Tensor down;            // [n_embd][n_ff]
};

struct Weights {
  Tensor tok_embd;  // [n_vocab][n_embd]
  std::vector<LayerWeights> layers;
  Vector output_norm;            // [n_embd]
  Tensor output;                 // [n_vocab][n_embd]; tok_embd when tied
  Vector rope_freqs;             // [rope dims / 2] divisors, or empty
  std::vector<double> inv_freq;  // [rope dims / 2] radians per position, scaling included
};

// Throws Error: kFormat (missing, misshaped), kUnsupported (a type or a tensor this block has no place for).
Weights bind_weights(const gguf::File& file, const ModelConfig& config);

}  // namespace pe
