#include "model/weights.h"

#include <set>
#include <string>

#include "base/error.h"
#include "base/text.h"
#include "gguf/reader.h"
#include "gguf/types.h"
#include "quant/formats.h"

namespace pe {

namespace {

// Takes tensors out of a file by name, each at most once, and remembers which were taken.
class Binder {
 public:
  explicit Binder(const gguf::File& file) : file_(file) {}

  Tensor matrix(const std::string& name, size_t rows, size_t cols) {
    const gguf::TensorInfo& t = need(name, cols, rows);
    Tensor out;
    out.name = t.name.c_str();
    if (!format_from_type(t.type, &out.format))
      throw Error(Status::kUnsupported, "unsupported_tensor_type",
                  "the tensor " + printable(name) + " has type " + gguf::type_name(t.type) + "; this build runs " +
                      gguf::runnable_types(),
                  name, t.entry);
    out.act = format_info(out.format).act;
    out.rows = rows;
    out.cols = cols;
    out.row_bytes = bytes_per_row(out.format, cols);
    out.data = t.data;
    return out;
  }

  Vector vector(const std::string& name, size_t n) {
    const gguf::TensorInfo& t = need(name, n, 1);
    if (t.type != static_cast<uint32_t>(format_info(Format::F32).type))
      throw Error(Status::kUnsupported, "unsupported_tensor_type",
                  "the tensor " + printable(name) + " has type " + gguf::type_name(t.type) +
                      "; norms, biases and factors must be F32",
                  name, t.entry);
    return {reinterpret_cast<const float*>(t.data), n};
  }

  Vector vector(const std::string& name, size_t n, ArchSpec::Presence presence) {
    const bool there = file_.find_tensor(name) != nullptr;
    // kNever: left untaken, so finish() reports it.
    if (presence == ArchSpec::Presence::kNever || (presence == ArchSpec::Presence::kOptional && !there)) return {};
    return vector(name, n);
  }

  bool has(const std::string& name) const { return file_.find_tensor(name) != nullptr; }

  // A tensor that nobody asked for means a model that computes something else: its answers would be wrong.
  void finish(const char* arch) const {
    for (const gguf::TensorInfo& t : file_.tensors())
      if (!taken_.count(t.name))
        throw Error(Status::kUnsupported, "unexpected_tensor",
                    "the tensor " + printable(t.name) + " has no place in the architecture " + arch +
                        ": running without it would give wrong answers",
                    printable(t.name), t.entry);
  }

 private:
  const gguf::TensorInfo& need(const std::string& name, size_t d0, size_t d1) {
    const gguf::TensorInfo* t = file_.find_tensor(name);
    if (!t) throw Error(Status::kFormat, "missing_tensor", "the tensor " + name + " is missing", name);
    if (t->dims[0] != d0 || t->dims[1] != d1 || t->dims[2] != 1 || t->dims[3] != 1) {
      std::string found = std::to_string(t->dims[0]);
      for (uint32_t i = 1; i < t->n_dims; ++i) found += " x " + std::to_string(t->dims[i]);
      throw Error(Status::kFormat, "wrong_shape",
                  "the tensor " + name + " is " + found + "; expected " + std::to_string(d0) +
                      (d1 == 1 ? "" : " x " + std::to_string(d1)),
                  name, t->entry);
    }
    taken_.insert(name);
    return *t;
  }

  const gguf::File& file_;
  std::set<std::string> taken_;
};

LayerWeights bind_layer(Binder& bind, const ModelConfig& c, size_t layer) {
  const std::string p = "blk." + std::to_string(layer) + ".";
  const ArchSpec& a = *c.arch;
  LayerWeights w;
  w.attn_norm = bind.vector(p + "attn_norm.weight", c.n_embd);
  w.wq = bind.matrix(p + "attn_q.weight", c.q_dim(), c.n_embd);
  w.wk = bind.matrix(p + "attn_k.weight", c.k_dim(), c.n_embd);
  w.wv = bind.matrix(p + "attn_v.weight", c.v_dim(), c.n_embd);
  w.bq = bind.vector(p + "attn_q.bias", c.q_dim(), a.qkv_bias);
  w.bk = bind.vector(p + "attn_k.bias", c.k_dim(), a.qkv_bias);
  w.bv = bind.vector(p + "attn_v.bias", c.v_dim(), a.qkv_bias);
  w.q_norm = bind.vector(p + "attn_q_norm.weight", c.head_dim_k, a.qk_norm);
  w.k_norm = bind.vector(p + "attn_k_norm.weight", c.head_dim_k, a.qk_norm);
  w.wo = bind.matrix(p + "attn_output.weight", c.n_embd, c.o_dim());
  w.bo = bind.vector(p + "attn_output.bias", c.n_embd, a.out_bias);
  w.ffn_norm = bind.vector(p + "ffn_norm.weight", c.n_embd);
  w.gate = bind.matrix(p + "ffn_gate.weight", c.n_ff, c.n_embd);
  w.up = bind.matrix(p + "ffn_up.weight", c.n_ff, c.n_embd);
  w.down = bind.matrix(p + "ffn_down.weight", c.n_embd, c.n_ff);
  return w;
}

}  // namespace

Weights bind_weights(const gguf::File& file, const ModelConfig& c) {
  Binder bind(file);
  Weights w;
  w.tok_embd = bind.matrix("token_embd.weight", c.n_vocab, c.n_embd);
  for (size_t i = 0; i < c.n_layers; ++i) w.layers.push_back(bind_layer(bind, c, i));
  w.output_norm = bind.vector("output_norm.weight", c.n_embd);
  w.output = bind.has("output.weight") ? bind.matrix("output.weight", c.n_vocab, c.n_embd) : w.tok_embd;
  w.rope_freqs = bind.vector("rope_freqs.weight", c.rope.dims / 2, ArchSpec::Presence::kOptional);
  RopeSpec rope = c.rope;
  rope.freq_factors = w.rope_freqs.empty() ? nullptr : w.rope_freqs.data();
  w.inv_freq = rope_inv_freq(rope);
  bind.finish(c.arch->name);
  return w;
}

}  // namespace pe
