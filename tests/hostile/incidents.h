// One self-made file for each publicly known kind of vulnerability in readers of GGUF models: the mistake that was made
// elsewhere, the class it belongs to, and what this engine answers. No file of anybody else's is used.
#pragma once

#include "classes.h"

namespace hostile {

struct Incident {
  const char* known_as;  // where it was reported; "-" for a kind known without a number
  const char* what;
  const char* of_class;
  void (*make)(Case&);
};

namespace detail {

inline Gguf llama() { return small_file(0); }
inline Gguf qwen() { return small_file(3, true); }

inline void expect(Case& c, Gguf file, const char* code) {
  c.file = std::move(file);
  c.expect = code;
}

inline void expect_key(Case& c, Gguf file, Key key, const char* code) {
  file.keys.insert(file.keys.begin(), std::move(key));
  expect(c, std::move(file), code);
}

inline void set_u32(Gguf& file, const char* name, uint64_t value) { file.set(name, U32, integer(U32, value)); }

inline void expect_token(Case& c, const char* token, int32_t type) {
  Gguf file = llama();
  std::vector<std::string> tokens = tokens_of(file);
  tokens[5] = token;
  set_tokens(file, tokens);
  set_token_type(file, 5, type);
  expect(c, std::move(file), "runs");
  c.text = type == 6 ? "bad_vocabulary" : "runs";
}

inline void expect_template(Case& c, const char* source, const char* answer) {
  Gguf file = qwen();
  file.set("tokenizer.chat_template", STRING, text(source));
  expect(c, std::move(file), "runs");
  c.text = answer;
}

}  // namespace detail

// "runs" in the last column of the table: the engine has no use for the value, or its arithmetic is safe for it; what the
// tokenizer or the template then answers is in `text`, and text_half.py asks for it.
inline const Incident kIncidents[] = {
    {"CVE-2024-21836, CVE-2024-25666", "tensor count times entry size overflows an allocation", "header.counts",
     [](Case& c) {
       Gguf f = detail::llama();
       f.n_tensors = (UINT64_MAX / 88) + 2;
       detail::expect(c, f, "too_many_tensors");
     }},
    {"CVE-2024-23605, CVE-2024-25664", "key count times entry size overflows an allocation", "header.counts",
     [](Case& c) {
       Gguf f = detail::llama();
       f.n_keys = (UINT64_MAX / 48) + 2;
       detail::expect(c, f, "too_many_keys");
     }},
    {"CVE-2024-21825, CVE-2024-25667", "array length times element size overflows", "key.array_length",
     [](Case& c) {
       detail::expect_key(c, detail::llama(), {"k", ARRAY, packed_array(U64, (UINT64_MAX / 8) + 2, "12345678"), {}},
                          "array_too_long");
     }},
    {"CVE-2024-25668", "array of strings whose count overflows", "key.array_length",
     [](Case& c) {
       detail::expect_key(c, detail::llama(), {"k", ARRAY, packed_array(STRING, (UINT64_MAX / 16) + 2, ""), {}},
                          "array_too_long");
     }},
    {"CVE-2024-23496, CVE-2024-25665", "string length plus one wraps to zero", "key.string_length",
     [](Case& c) {
       detail::expect_key(c, detail::llama(), {"k", STRING, text("x", UINT64_MAX), {}}, "string_too_long");
     }},
    {"-", "string length that wraps position + length", "key.string_length",
     [](Case& c) {
       detail::expect_key(c, detail::llama(), {"k", STRING, text("x", UINT64_MAX - 40), {}}, "string_too_long");
     }},
    {"CVE-2024-21802", "more dimensions than the fixed array has", "tensor.n_dims",
     [](Case& c) {
       Gguf f = detail::llama();
       f.tensors[3].n_dims = 0x7FFFFFFF;
       detail::expect(c, f, "bad_dims");
     }},
    {"gguf-py #25401", "hundreds of dimensions, all present", "tensor.n_dims",
     [](Case& c) {
       Gguf f = detail::llama();
       f.tensors[0].dims.assign(300, 2);
       detail::expect(c, f, "bad_dims");
     }},
    {"CVE-2024-32878", "an error in the middle of the keys frees what was never set", "key.bad_type",
     [](Case& c) {
       Gguf f = detail::llama();
       f.keys[8].type = 77;
       detail::expect(c, f, "bad_value_type");
     }},
    {"CVE-2024-41130", "a file whose keys fail to read leaves a null pointer behind", "header.cut",
     [](Case& c) {
       c.raw = detail::llama().build().substr(0, 200);
       c.expect = "truncated_header";
     }},
    {"CVE-2025-62609", "an array where a reader takes a string for granted", "key.wrong_type",
     [](Case& c) {
       Gguf f = detail::llama();
       f.set("general.architecture", ARRAY, packed_array(U32, 1, integer(U32, 1)));
       detail::expect(c, f, "wrong_type");
     }},
    {"CVE-2025-53630", "the sum of the padded sizes of tensors overflows", "tensor.sum_overflow",
     [](Case& c) {
       Gguf f = detail::llama();
       for (const char* name : {"a", "b", "c"})
         f.tensors.push_back({name, {uint64_t{1} << 40, (1 << 20) - 1}, 0, "", {}, {}, {}});
       uint64_t offset = 0;
       for (Tensor& t : f.tensors) {
         t.offset = offset;
         offset += t.data.empty() ? (uint64_t{1} << 62) - (uint64_t{1} << 42) : (t.data.size() + 31) / 32 * 32;
       }
       detail::expect(c, f, "tensor_too_large");
     }},
    {"CVE-2026-27940", "sizes that overflow only after the bookkeeping was added", "tensor.sum_overflow",
     [](Case& c) {
       Gguf f = detail::llama();
       f.tensors.back().type = 24;
       f.tensors.back().dims = {uint64_t{1} << 31, uint64_t{1} << 32};
       detail::expect(c, f, "tensor_too_large");
     }},
    {"CVE-2026-33298", "the bytes of one tensor wrap to a small number", "tensor.product_overflow",
     [](Case& c) {
       Gguf f = detail::llama();
       f.tensors[0].type = 0;
       f.tensors[0].dims = {uint64_t{1} << 32, uint64_t{1} << 30, 4};
       detail::expect(c, f, "tensor_too_large");
     }},
    {"llama.cpp #24759", "rounding a size up to the alignment wraps", "tensor.padding_wrap",
     [](Case& c) {
       Gguf f = detail::llama();
       f.tensors[0].type = 24;
       f.tensors[0].dims = {49 * uint64_t{73} * 127 * 337, uint64_t{92737} * 649657};  // 2^63 - 1
       detail::expect(c, f, "tensor_too_large");
     }},
    {"CVE-2026-7482", "a tensor's data past the end of the file: memory is read that is not the file's",
     "tensor.past_end",
     [](Case& c) {
       Gguf f = detail::llama();
       f.tensors[1].offset = 1 << 30;
       detail::expect(c, f, "tensor_past_end");
     }},
    {"CVE-2026-7482", "a tensor larger than the file, at a right offset", "data.truncated",
     [](Case& c) {
       Gguf f = detail::llama();
       f.tensors.back().dims = {1 << 24};
       detail::expect(c, f, "truncated_data");
     }},
    {"CVE-2026-7482", "offset + size wraps around to a place inside the file", "tensor.wrapping_offset",
     [](Case& c) {
       Gguf f = detail::llama();
       f.tensors[1].offset = UINT64_MAX - 31;
       detail::expect(c, f, "tensor_past_end");
     }},
    {"llama.cpp #6774", "a truncated download, mapped", "data.truncated",
     [](Case& c) {
       const std::string whole = detail::llama().build();
       c.place = [whole](const std::string& folder) {
         detail::write_file(folder + "/m.gguf", whole.substr(0, whole.size() / 2));
         return folder + "/m.gguf";
       };
       c.expect = "truncated_data";
     }},
    {"CVE-2024-39720", "a file of four bytes, the magic", "header.magic_only",
     [](Case& c) {
       c.raw = "GGUF";
       c.expect = "truncated_header";
     }},
    {"CVE-2024-12055", "a string that reaches past the end of the file", "key.string_length",
     [](Case& c) {
       Gguf f;
       f.keys.push_back({"general.name", STRING, text("abc", 4000), {}});
       detail::expect(c, f, "truncated_header");
     }},
    {"CVE-2025-0315", "a small file that asks for gigabytes", "key.array_length",
     [](Case& c) {
       Gguf f;
       f.keys.push_back({"tokenizer.ggml.tokens", ARRAY, packed_array(STRING, 4194304, ""), {}});
       detail::expect(c, f, "truncated_header");
     }},
    {"Ollama #17042", "a key whose length is taken for an allocation", "key.length",
     [](Case& c) {
       Gguf f;
       f.keys.push_back({"k", U8, "\1", uint64_t{1} << 40});
       detail::expect(c, f, "key_too_long");
     }},
    {"CVE-2025-66960", "a string of unbounded length in a file of version 1", "header.version",
     [](Case& c) {
       Gguf f;
       f.version = 1;
       f.keys.push_back({"k", STRING, text("x", uint64_t{1} << 60), {}});
       detail::expect(c, f, "version_1");
     }},
    {"CVE-2025-0312", "a required key is missing and its value is used all the same", "key.missing",
     [](Case& c) {
       Gguf f = detail::llama();
       f.remove_key("general.architecture");
       detail::expect(c, f, "missing_key");
     }},
    {"CVE-2025-0317", "an alignment of zero: division by zero", "key.alignment",
     [](Case& c) {
       Gguf f = detail::llama();
       detail::set_u32(f, "general.alignment", 0);
       detail::expect(c, f, "value_out_of_range");
     }},
    {"CVE-2024-8063", "block_count of another type, read as zero, divided by", "key.wrong_type",
     [](Case& c) {
       Gguf f = detail::llama();
       f.set("llama.block_count", STRING, text("2"));
       detail::expect(c, f, "wrong_type");
     }},
    {"llama.cpp #8816", "a type of the past whose block size is zero", "tensor.type",
     [](Case& c) {
       Gguf f = detail::llama();
       f.tensors[0].type = 4;
       detail::expect(c, f, "removed_tensor_type");
     }},
    {"llama.cpp #25596", "a dimension of zero: division by zero", "tensor.zero_dim",
     [](Case& c) {
       Gguf f = detail::llama();
       f.tensors[0].dims[1] = 0;
       detail::expect(c, f, "bad_dims");
     }},
    {"-", "a negative dimension", "tensor.zero_dim",
     [](Case& c) {
       Gguf f = detail::llama();
       f.tensors[0].dims[0] = static_cast<uint64_t>(-1);
       detail::expect(c, f, "bad_dims");
     }},
    {"llama.cpp KV_WRONG_TYPE_ALIGN", "general.alignment as a string: an assertion ends the process", "key.wrong_type",
     [](Case& c) {
       Gguf f = detail::llama();
       f.set("general.alignment", STRING, text("32"));
       detail::expect(c, f, "wrong_type");
     }},
    {"llama.cpp #24884", "an empty key: an assertion ends the process", "key.empty",
     [](Case& c) { detail::expect_key(c, Gguf(), {"", U32, integer(U32, 1), {}}, "bad_key"); }},
    {"llama.cpp #27202", "a scalar of the wrong type where a float is read", "key.wrong_type",
     [](Case& c) {
       Gguf f = detail::llama();
       f.set("llama.rope.freq_base", U32, integer(U32, 10000));
       detail::expect(c, f, "wrong_type");
     }},
    {"llama.cpp #24997", "an alignment of 2^31: padding without bound", "key.alignment",
     [](Case& c) {
       Gguf f = detail::llama();
       detail::set_u32(f, "general.alignment", 0x80000000);
       detail::expect(c, f, "value_out_of_range");
     }},
    {"ggml #1516", "an array of empty strings: 8 bytes each in the file, 32 in memory", "key.amplification",
     [](Case& c) {
       const uint64_t n = 1 << 20;
       detail::expect_key(c, detail::llama(), {"k", ARRAY, packed_array(STRING, n, std::string(8 * n, '\0')), {}},
                          "runs");
     }},
    {"kekzl/imp #532", "an element type of no size: a loop of 2^60 steps", "key.bad_element_type",
     [](Case& c) {
       detail::expect_key(c, detail::llama(), {"k", ARRAY, packed_array(99, uint64_t{1} << 60, ""), {}},
                          "bad_value_type");
     }},
    {"gguf-py #27188", "an array of 2^63 elements: a reader that never ends", "key.array_length",
     [](Case& c) {
       detail::expect_key(c, detail::llama(), {"k", ARRAY, packed_array(U8, uint64_t{1} << 63, ""), {}},
                          "array_too_long");
     }},
    {"-", "arrays in arrays, 100,000 deep: the stack overflows", "key.nested_array",
     [](Case& c) {
       std::string nested;
       for (int i = 0; i < 100000; ++i) nested += packed_array(ARRAY, 1, "");
       detail::expect_key(c, detail::llama(), {"k", ARRAY, nested, {}}, "nested_array");
     }},
    {"llama.cpp #19856", "a negative tensor type as an index into a table", "tensor.type",
     [](Case& c) {
       Gguf f = detail::llama();
       f.tensors[0].type = static_cast<uint32_t>(-1);
       detail::expect(c, f, "unknown_tensor_type");
     }},
    {"llama.cpp #19856", "a key twice: two readers see two files", "key.duplicate",
     [](Case& c) {
       detail::expect_key(c, detail::llama(), {"general.name", STRING, text("another"), {}}, "duplicate_key");
     }},
    {"-", "a tensor's name twice", "tensor.duplicate",
     [](Case& c) {
       Gguf f = detail::llama();
       f.tensors.push_back(f.tensors[1]);
       detail::expect(c, f, "duplicate_tensor");
     }},
    {"safetensors audit 2023", "a hole between tensors that hides another file", "tensor.gap",
     [](Case& c) {
       Gguf f = detail::llama();
       const uint64_t offset = detail::place_of(f, f.tensors.size() - 1);
       f.tensors.back().offset = offset + 4096;
       f.tensors.back().data += std::string(5000, 'P');
       detail::expect(c, f, "tensor_gap");
     }},
    {"safetensors audit 2023", "two tensors over the same bytes", "tensor.overlap",
     [](Case& c) {
       Gguf f = detail::llama();
       f.tensors[2].offset = 0;
       detail::expect(c, f, "tensor_overlap");
     }},
    {"-", "a model's name with terminal escapes", "key.hidden_text",
     [](Case& c) {
       Gguf f = detail::llama();
       f.set("general.architecture", STRING, text("\x1b]0;owned\a\x1b[2J\u202Egnp"));
       detail::expect(c, f, "unknown_architecture");
     }},
    {"-", "a zero byte that ends a key early for some", "key.bad_utf8",
     [](Case& c) {
       detail::expect_key(c, detail::llama(), {std::string("general\0.name", 13), U8, "\1", {}}, "bad_key");
     }},
    {"mistral.rs #2215", "split.count without bound", "data.split",
     [](Case& c) {
       detail::expect_key(c, detail::llama(), {"split.count", U32, integer(U32, UINT32_MAX), {}}, "value_out_of_range");
     }},
    {"CVE-2024-39721", "/dev/random instead of a file: waits for ever", "data.special_files",
     [](Case& c) {
       c.place = [](const std::string&) { return std::string("/dev/random"); };
       c.expect = "not_regular_file";
     }},
    {"-", "a big-endian file, read as if it were not", "header.big_endian",
     [](Case& c) {
       Gguf f = detail::llama();
       f.version = 3 << 24;
       detail::expect(c, f, "big_endian");
     }},
    {"llama.cpp #25821", "more layers than fixed arrays have places", "hyper.layers",
     [](Case& c) {
       Gguf f = detail::llama();
       detail::set_u32(f, "llama.block_count", 513);
       detail::expect(c, f, "value_out_of_range");
     }},
    {"llama.cpp #2247", "no attention heads: division by zero", "hyper.heads_zero",
     [](Case& c) {
       Gguf f = detail::llama();
       detail::set_u32(f, "llama.attention.head_count", 0);
       detail::expect(c, f, "value_out_of_range");
     }},
    {"llama.cpp #24085", "no KV heads: division by zero", "hyper.heads_zero",
     [](Case& c) {
       Gguf f = detail::llama();
       detail::set_u32(f, "llama.attention.head_count_kv", 0);
       detail::expect(c, f, "value_out_of_range");
     }},
    {"llama.cpp #28345", "experts of which none is used: division by zero", "hyper.experts",
     [](Case& c) {
       Gguf f = detail::llama();
       detail::set_u32(f, "llama.expert_count", 8);
       detail::set_u32(f, "llama.expert_used_count", 0);
       detail::expect(c, f, "unsupported_model");
     }},
    {"-", "per-layer head counts shorter than the layers", "hyper.per_layer",
     [](Case& c) {
       Gguf f = detail::llama();
       f.set("llama.attention.head_count", ARRAY, packed_array(U32, 1, integer(U32, 2)));
       detail::expect(c, f, "unsupported_model");
     }},
    {"llama.cpp #24888", "scores stored as bytes, read as floats", "vocabulary.types",
     [](Case& c) {
       Gguf f = detail::llama();
       const uint64_t n = detail::vocabulary_size(f);
       f.set("tokenizer.ggml.scores", ARRAY, packed_array(U8, n, std::string(n, '\1')));
       detail::expect(c, f, "wrong_type");
     }},
    {"llama.cpp #20735", "fewer scores than tokens", "vocabulary.scores",
     [](Case& c) {
       Gguf f = detail::llama();
       f.set("tokenizer.ggml.scores", ARRAY, packed_array(F32, 1, real(F32, 0)));
       detail::expect(c, f, "wrong_length");
     }},
    {"llama.cpp #26690", "fewer token types than tokens", "vocabulary.scores",
     [](Case& c) {
       Gguf f = detail::llama();
       f.set("tokenizer.ggml.token_type", ARRAY, packed_array(I32, 1, integer(I32, 1)));
       detail::expect(c, f, "wrong_length");
     }},
    {"GHSA-g4cc-763q-h9h6, mistral.rs #2282", "eos_token_id outside the vocabulary", "vocabulary.ids",
     [](Case& c) {
       Gguf f = detail::llama();
       detail::set_u32(f, "tokenizer.ggml.eos_token_id", UINT32_MAX);
       detail::expect(c, f, "value_out_of_range");
     }},
    {"llama.cpp #7592", "bos_token_id just past the vocabulary", "vocabulary.ids",
     [](Case& c) {
       Gguf f = detail::llama();
       detail::set_u32(f, "tokenizer.ggml.bos_token_id", detail::vocabulary_size(f));
       detail::expect(c, f, "value_out_of_range");
     }},
    {"llama.cpp #27226, lmstudio #2289", "the byte token <0x-1>: a write before a table", "vocabulary.bytes",
     [](Case& c) { detail::expect_token(c, "<0x-1>", 6); }},
    {"CVE-2025-49847", "a token too long for a signed 32-bit length, in spirit", "vocabulary.giant",
     [](Case& c) {
       Gguf f = detail::qwen();
       std::vector<std::string> tokens = detail::tokens_of(f);
       tokens[5] = std::string(1 << 20, 'a');
       detail::set_tokens(f, tokens);
       detail::expect(c, f, "runs");
       c.text = "runs bad_vocabulary";
     }},
    {"CVE-2025-52566", "more tokens out of a text than fit into a signed count, in spirit: an empty token",
     "vocabulary.empty_token", [](Case& c) { detail::expect_token(c, "", 1); }},
    {"-", "no vocabulary, but weights", "vocabulary.missing",
     [](Case& c) {
       Gguf f = detail::llama();
       std::erase_if(f.keys, [](const Key& k) { return k.name.starts_with("tokenizer."); });
       detail::expect(c, f, "runs");
       c.text = "bad_vocabulary";
     }},
    {"-", "merges of tokens that do not exist", "vocabulary.merges",
     [](Case& c) {
       Gguf f = detail::qwen();
       f.set("tokenizer.ggml.merges", ARRAY, text_array({"nowhere found"}));
       detail::expect(c, f, "runs");
       c.text = "bad_vocabulary";
     }},
    {"-", "an unknown pre-tokenizer, for which others fall back to a wrong one", "vocabulary.pre_tokenizer",
     [](Case& c) {
       Gguf f = detail::qwen();
       f.set("tokenizer.ggml.pre", STRING, text("new-thing"));
       detail::expect(c, f, "runs");
       c.text = "unknown_pretokenizer";
     }},
    {"-", "weights of another shape than the keys say: reads past a row", "tensor.shape",
     [](Case& c) {
       Gguf f = detail::llama();
       Tensor& t = *f.tensor("blk.0.ffn_up.weight");
       t.dims = {32, 32};
       t.data.resize(t.data.size() / 2);
       detail::expect(c, f, "wrong_shape");
     }},
    {"-", "a layer's tensor is missing: a null pointer in the forward pass", "tensor.missing",
     [](Case& c) {
       Gguf f = detail::llama();
       f.remove_tensor("blk.1.attn_k.weight");
       detail::expect(c, f, "missing_tensor");
     }},
    {"-", "a norm in 16 bits, read as 32", "tensor.norm_type",
     [](Case& c) {
       Gguf f = detail::llama();
       Tensor& t = *f.tensor("output_norm.weight");
       t.type = 1;
       t.data.resize(t.data.size() / 2);
       detail::expect(c, f, "unsupported_tensor_type");
     }},
    {"ik_llama.cpp #1984", "NaN in the scales: an assertion in the sampler ends the process", "data.scales",
     [](Case& c) {
       Gguf f = small_file(1);
       Tensor& t = *f.tensor("output.weight");
       t.data[0] = '\0';
       t.data[1] = '\x7E';
       detail::expect(c, f, "not_finite");
     }},
    {"-", "a rotary base of NaN", "key.not_finite",
     [](Case& c) {
       Gguf f = detail::llama();
       f.set("llama.rope.freq_base", F32, real(F32, std::numeric_limits<double>::quiet_NaN()));
       detail::expect(c, f, "value_not_finite");
     }},
    {"-", "frequency factors of zero: infinite angles", "data.zero",
     [](Case& c) {
       Gguf f = detail::llama();
       Tensor& t = *f.tensor("rope_freqs.weight");
       t.data.assign(t.data.size(), '\0');
       detail::expect(c, f, "rope");
     }},
    {"-", "a context of 2^62 positions: the cache's size overflows", "hyper.context",
     [](Case& c) {
       Gguf f = detail::llama();
       f.set("llama.context_length", U64, integer(U64, uint64_t{1} << 62));
       detail::expect(c, f, "value_out_of_range");
     }},
    {"-", "an architecture nobody knows", "hyper.unknown_arch",
     [](Case& c) {
       Gguf f = detail::llama();
       f.set("general.architecture", STRING, text("llama99"));
       detail::expect(c, f, "unknown_architecture");
     }},
    {"CVE-2024-34359, CVE-2026-5760", "a chat template that runs Python", "vocabulary.template",
     [](Case& c) {
       detail::expect_template(c, "{{ self.__init__.__globals__.__builtins__.__import__('os').system('id') }}",
                               "template_error");
     }},
    {"CVE-2025-27516", "a chat template that reaches str.format through a filter", "vocabulary.template",
     [](Case& c) { detail::expect_template(c, "{{ ('{0.__class__}'|attr('format'))(messages) }}", "template_error"); }},
    {"-", "a chat template that asks for a text of 10^12 characters", "vocabulary.template",
     [](Case& c) { detail::expect_template(c, "{{ 'a' * 1000000000000 }}", "template_limit template_error"); }},
    {"-", "a chat template that calls itself", "vocabulary.template",
     [](Case& c) {
       detail::expect_template(c, "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "template_limit template_error");
     }},
};

static_assert(std::size(kIncidents) >= 48);

}  // namespace hostile
