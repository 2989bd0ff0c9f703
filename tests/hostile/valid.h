// Small valid models to break: each architecture, both versions, any tensor format.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "api/pyengine.h"
#include "quant/formats.h"
#include "random.h"
#include "writer.h"

namespace hostile {

inline const std::vector<std::string> kArchs = {"llama", "qwen2", "qwen3"};

struct Shape {
  std::string arch = "llama";
  uint32_t version = 3;
  pe::Format format = pe::Format::F32;  // of the matrices
  uint64_t n_embd = 32, n_ff = 64, n_heads = 2, n_kv_heads = 1, head_dim = 16;
  bool whole_vocabulary = false;  // all 256 bytes, so that any text can be encoded; else 24 tokens
};

namespace detail {

// The byte-level alphabet: printable bytes stand for themselves, the others for U+0100, U+0101, ...
inline std::string byte_letter(unsigned byte) {
  const auto printable = [](unsigned b) { return (b >= 0x21 && b < 0x7F) || (b >= 0xA1 && b < 0xAD) || b >= 0xAE; };
  unsigned code = byte;
  if (!printable(byte)) {
    code = 256;
    for (unsigned b = 0; b < byte; ++b) code += !printable(b);
  }
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
}

struct Vocabulary {
  std::vector<std::string> tokens, merges;
  std::vector<int32_t> types;
  std::vector<float> scores;

  void add(std::string token, int32_t type) {
    scores.push_back(-static_cast<float>(tokens.size()));
    tokens.push_back(std::move(token));
    types.push_back(type);
  }
};

inline Vocabulary vocabulary(bool sentencepiece, bool whole) {
  Vocabulary v;
  if (sentencepiece) {
    v.add("<unk>", 2);
    v.add("<s>", 3);
    v.add("</s>", 3);
    for (unsigned byte = whole ? 0 : 0x41; byte < (whole ? 256u : 0x49u); ++byte) {
      static constexpr char kHex[] = "0123456789ABCDEF";
      v.add(std::string("<0x") + kHex[byte / 16] + kHex[byte % 16] + ">", 6);
    }
    for (const char* piece : {"\u2581", "t", "h", "e", "th", "the", "\u2581the", "o", "n", "on", "!", "é", "no"})
      v.add(piece, 1);
  } else {
    for (unsigned byte = whole ? 0 : 'a'; byte < (whole ? 256u : 'm'); ++byte) v.add(byte_letter(byte), 1);
    const std::string space = byte_letter(' ');
    if (!whole) {
      v.add("t", 1);
      v.add(space, 1);
    }
    for (const auto& [left, right] : {std::pair<std::string, std::string>{"h", "e"}, {"t", "he"}, {space, "the"}}) {
      if (!whole && left == "t" && right == "he") continue;
      if (!whole && right == "the") continue;
      v.add(left + right, 1);
      v.merges.push_back(left + " " + right);
    }
    while (v.tokens.size() % 8 != 5) v.add("<unused" + std::to_string(v.tokens.size()) + ">", 5);
    v.add("<|im_start|>", 3);
    v.add("<|im_end|>", 3);
    v.add("<think>", 4);
  }
  return v;
}

// Small weights in any format, the same for every call; blocks that no quantiser writes hold a pattern.
inline std::string weights(pe::Format format, uint64_t rows, uint64_t cols, uint64_t seed) {
  Random random(seed);
  std::vector<float> values(rows * cols);
  for (float& value : values) value = (static_cast<float>(random.below(2001)) - 1000) * 2e-4f;
  std::string out(pe::bytes_per_row(format, cols) * rows, '\0');
  const int32_t type = pe::format_info(format).type;
  if (pe_quantise_rows(type, values.data(), values.size(), rows, cols, nullptr, out.data(), out.size(), 1) != PE_OK)
    for (char& c : out) c = static_cast<char>(random.below(48));
  return out;
}

inline std::string ones(uint64_t n, float value = 1) {
  std::string out;
  for (uint64_t i = 0; i < n; ++i) put(out, value);
  return out;
}

}  // namespace detail

inline constexpr const char* kTemplate =
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

inline Gguf make_valid(const Shape& s) {
  Gguf f;
  f.version = s.version;
  const bool sentencepiece = s.arch == "llama" && s.format != pe::Format::Q8_0;
  const detail::Vocabulary v = detail::vocabulary(sentencepiece, s.whole_vocabulary);
  const uint64_t n_vocab = v.tokens.size();
  const std::string a = s.arch + ".";
  const auto u32 = [&](const std::string& name, uint64_t n) { f.set(name, U32, integer(U32, n)); };
  f.set("general.architecture", STRING, text(s.arch));
  f.set("general.name", STRING, text("a model to break"));
  u32("general.alignment", 32);
  u32("general.file_type", 7);
  u32("general.quantization_version", 2);
  u32(a + "block_count", 2);
  u32(a + "context_length", 64);
  u32(a + "embedding_length", s.n_embd);
  u32(a + "feed_forward_length", s.n_ff);
  u32(a + "attention.head_count", s.n_heads);
  u32(a + "attention.head_count_kv", s.n_kv_heads);
  if (s.arch == "qwen3" || s.n_embd != s.n_heads * s.head_dim) {
    u32(a + "attention.key_length", s.head_dim);
    u32(a + "attention.value_length", s.head_dim);
  }
  f.set(a + "attention.layer_norm_rms_epsilon", F32, real(F32, 1e-6));
  f.set(a + "rope.freq_base", F32, real(F32, 10000));
  u32(a + "rope.dimension_count", s.head_dim);
  if (s.arch == "qwen2") {
    f.set(a + "rope.scaling.type", STRING, text("yarn"));
    f.set(a + "rope.scaling.factor", F32, real(F32, 4));
    u32(a + "rope.scaling.original_context_length", 32);
    f.set(a + "rope.scaling.attn_factor", F32, real(F32, 1));
  }
  f.set("tokenizer.ggml.model", STRING, text(sentencepiece ? "llama" : "gpt2"));
  if (!sentencepiece) f.set("tokenizer.ggml.pre", STRING, text(s.arch == "llama" ? "llama-bpe" : "qwen2"));
  f.set("tokenizer.ggml.tokens", ARRAY, text_array(v.tokens));
  std::string packed;
  for (const float score : v.scores) put(packed, score);
  if (sentencepiece) f.set("tokenizer.ggml.scores", ARRAY, packed_array(F32, n_vocab, packed));
  packed.clear();
  for (const int32_t type : v.types) put(packed, type);
  f.set("tokenizer.ggml.token_type", ARRAY, packed_array(I32, n_vocab, packed));
  if (!sentencepiece) f.set("tokenizer.ggml.merges", ARRAY, text_array(v.merges));
  u32("tokenizer.ggml.bos_token_id", sentencepiece ? 1 : n_vocab - 3);
  u32("tokenizer.ggml.eos_token_id", sentencepiece ? 2 : n_vocab - 2);
  if (sentencepiece) u32("tokenizer.ggml.unknown_token_id", 0);
  f.set("tokenizer.ggml.add_bos_token", BOOL, std::string(1, '\1'));
  f.set("tokenizer.chat_template", STRING, text(kTemplate));

  uint64_t seed = 1;
  const auto matrix = [&](std::string name, uint64_t rows, uint64_t cols) {
    f.tensors.push_back({std::move(name),
                         {cols, rows},
                         static_cast<uint32_t>(pe::format_info(s.format).type),
                         detail::weights(s.format, rows, cols, ++seed),
                         {},
                         {},
                         {}});
  };
  const auto vector = [&](std::string name, uint64_t n, float value = 1) {
    f.tensors.push_back({std::move(name), {n}, 0, detail::ones(n, value), {}, {}, {}});
  };
  const uint64_t q = s.n_heads * s.head_dim, kv = s.n_kv_heads * s.head_dim;
  matrix("token_embd.weight", n_vocab, s.n_embd);
  for (int layer = 0; layer < 2; ++layer) {
    const std::string p = "blk." + std::to_string(layer) + ".";
    vector(p + "attn_norm.weight", s.n_embd);
    matrix(p + "attn_q.weight", q, s.n_embd);
    matrix(p + "attn_k.weight", kv, s.n_embd);
    matrix(p + "attn_v.weight", kv, s.n_embd);
    if (s.arch == "qwen2") {
      vector(p + "attn_q.bias", q, 0.1f);
      vector(p + "attn_k.bias", kv, 0.1f);
      vector(p + "attn_v.bias", kv, 0.1f);
    }
    if (s.arch == "qwen3") {
      vector(p + "attn_q_norm.weight", s.head_dim);
      vector(p + "attn_k_norm.weight", s.head_dim);
    }
    matrix(p + "attn_output.weight", s.n_embd, q);
    vector(p + "ffn_norm.weight", s.n_embd);
    matrix(p + "ffn_gate.weight", s.n_ff, s.n_embd);
    matrix(p + "ffn_up.weight", s.n_ff, s.n_embd);
    matrix(p + "ffn_down.weight", s.n_embd, s.n_ff);
  }
  vector("output_norm.weight", s.n_embd);
  if (s.arch != "qwen2") matrix("output.weight", n_vocab, s.n_embd);  // qwen2: tied
  if (s.arch == "llama") vector("rope_freqs.weight", s.head_dim / 2);
  return f;
}

// The six small files: each architecture in each version, each in another format.
inline constexpr size_t kSmallFiles = 6;

inline Shape small_shape(size_t index, bool whole_vocabulary = false) {
  static constexpr pe::Format kFormats[kSmallFiles] = {pe::Format::F32,  pe::Format::Q8_0, pe::Format::Q4_0,
                                                       pe::Format::BF16, pe::Format::F16,  pe::Format::Q5_1};
  Shape s;
  s.arch = kArchs[index / 2];
  s.version = index % 2 ? 2 : 3;
  s.format = kFormats[index];
  s.whole_vocabulary = whole_vocabulary;
  return s;
}

inline const Gguf& small_file(size_t index, bool whole_vocabulary = false) {
  static std::map<std::pair<size_t, bool>, Gguf> made;
  const auto [place, is_new] = made.try_emplace({index, whole_vocabulary});
  if (is_new) place->second = make_valid(small_shape(index, whole_vocabulary));
  return place->second;
}

// A shape that every format can store: its rows are whole blocks of 256.
inline Shape wide_shape(pe::Format format) {
  Shape s;
  s.format = format;
  s.n_embd = s.n_ff = 256;
  s.n_heads = 4;
  s.head_dim = 64;
  return s;
}

}  // namespace hostile
