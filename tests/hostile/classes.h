// The 81 classes of malformed files: a valid file with one thing wrong, at random within its class, and what the engine
// must answer. The one list of them; docs/safety.md and the tests take the names from here. Long, because a list of 81
// classes is best read and counted in one place.
#pragma once

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "gguf/limits.h"
#include "gguf/reader.h"
#include "valid.h"

namespace hostile {

// What the engine may answer: codes of docs/errors.md separated by spaces, and "runs" for a model that opens and then
// evaluates tokens (to finite logits, or to the error "not_finite" where that is listed). "error" is any code: for
// damage after which the rest of the file is read at the wrong place.
struct Case {
  Gguf file;
  std::string expect;
  std::string text;  // the same for the Python half: tokenizer and chat template; "" where the engine refuses already

  std::optional<std::string> raw;  // the file's bytes, instead of `file`
  // Cases about the file system: makes files in an empty folder and returns the path to open.
  std::function<std::string(const std::string& folder)> place;
  std::vector<pe::gguf::Load> loads = {pe::gguf::Load::kMap};
  std::function<void(const std::string& path)> while_loading;  // once, before the first bytes are copied
  std::function<void(std::string& bytes)> after_opening;       // the memory that the file was opened in
  std::function<void(const std::string& path)> after_mapping;
  bool evaluate = true;  // false where the weights are gigabytes of nothing
};

struct Class {
  const char* name;
  void (*make)(Random&, Case&);
};

namespace detail {

inline const Gguf& any_file(Random& r) { return small_file(r.below(kSmallFiles)); }
inline const Gguf& any_whole(Random& r) { return small_file(r.below(kSmallFiles), true); }

// Where the format wants the data of a tensor, counted from the first.
inline uint64_t place_of(const Gguf& f, uint64_t index) {
  uint64_t place = 0;
  for (uint64_t i = 0; i < index; ++i) place += (f.tensors[i].data.size() + 31) / 32 * 32;
  return place;
}

inline std::string arch_of(const Gguf& f) {
  for (const Key& key : f.keys)
    if (key.name == "general.architecture") return key.payload.substr(8);
  return "";
}

inline bool sentencepiece(Gguf& f) { return f.key("tokenizer.ggml.scores") != nullptr; }

inline uint64_t vocabulary_size(Gguf& f) { return f.tensor("token_embd.weight")->dims[1]; }

inline std::vector<std::string> tokens_of(Gguf& f) {
  const std::string& payload = f.key("tokenizer.ggml.tokens")->payload;
  std::vector<std::string> out;
  for (size_t p = 12; p < payload.size();) {
    uint64_t length;
    std::memcpy(&length, payload.data() + p, 8);
    out.push_back(payload.substr(p + 8, length));
    p += 8 + length;
  }
  return out;
}

inline void set_tokens(Gguf& f, const std::vector<std::string>& tokens) {
  f.set("tokenizer.ggml.tokens", ARRAY, text_array(tokens));
}

inline void set_token_type(Gguf& f, uint64_t token, int32_t type) {
  std::memcpy(f.key("tokenizer.ggml.token_type")->payload.data() + 12 + 4 * token, &type, 4);
}

// A token that is plain text in every one of the valid files.
inline uint64_t plain_token(Random& r, Gguf& f) {
  const std::string& types = f.key("tokenizer.ggml.token_type")->payload;
  for (;;) {
    const uint64_t token = r.below(vocabulary_size(f));
    int32_t type;
    std::memcpy(&type, types.data() + 12 + 4 * token, 4);
    if (type == 1) return token;
  }
}

// A key of any name and a valid value, put anywhere.
inline void insert(Random& r, Gguf& f, Key key) {
  f.keys.insert(f.keys.begin() + static_cast<ptrdiff_t>(r.below(f.keys.size() + 1)), std::move(key));
}

inline std::string bad_utf8(Random& r) {
  static const std::vector<std::string> kBad = {"\x80",
                                                "\xC0\xAF",
                                                "\xC1\xBF",
                                                "\xE0\x9F\xBF",
                                                "\xED\xA0\x80",
                                                "\xF0\x8F\xBF\xBF",
                                                "\xF4\x90\x80\x80",
                                                "\xF8\x88\x80\x80\x80",
                                                "\xFF",
                                                "\xFE",
                                                "\xE6\xA8",
                                                "\xF0\x9F\x98",
                                                "\xC3",
                                                "\xED\xBF\xBF"};
  const std::string& bad = kBad[r.below(kBad.size())];
  return r.letters(r.below(9)) + bad + r.letters(r.below(9));
}

inline std::string hidden_text(Random& r) {  // no control characters below U+0020
  static const std::vector<std::string> kHidden = {"\u202E", "\u202D", "\u2066",    "\u2069", "\u200B",
                                                   "\u200F", "\uFEFF", "\u00AD",    "\u2028", "\u0085",
                                                   "\u009B", "\u061C", "\U000E0041"};
  std::string out = r.letters(r.below(5));
  for (uint64_t i = r.between(1, 5); i > 0; --i) out += kHidden[r.below(kHidden.size())] + r.letters(r.below(3));
  return out;
}

inline std::string control_text(Random& r) {
  std::string out = r.letters(r.below(5));
  const uint64_t control = r.below(33);
  out += static_cast<char>(control == 32 ? 0x7F : control);
  if (control == 0x1B) out += r.pick({"[2J", "[31m", "]0;title\a", "c"});
  return out + r.letters(r.below(5));
}

// ---------------------------------------------------------------- header

inline void header_empty(Random& r, Case& c) {
  const uint64_t n = r.below(4);
  c.raw = r.chance(2) ? std::string("GGUF").substr(0, n) : r.bytes(n);
  c.expect = "empty_file truncated_header bad_magic all_zeros json_text pickle compressed";
}

inline void header_magic_only(Random& r, Case& c) {
  c.raw = "GGUF" + (r.chance(2) ? any_file(r).build().substr(4, r.below(20)) : r.bytes(r.below(20)));
  c.expect = "truncated_header";
}

inline void header_wrong_magic(Random& r, Case& c) {
  struct Other {
    std::string begin;
    const char* code;
  };
  using namespace std::string_literals;
  static const std::vector<Other> kOthers = {
      {"PK\x03\x04", "zip_archive"},
      {"\x80\x02}q\0"s, "pickle"},
      {"\x80\x05\x95", "pickle"},
      {"\xC8\0\0\0\0\0\0\0{\"a\":"s, "safetensors"},
      {"<!DOCTYPE html><html>", "web_page"},
      {"\xEF\xBB\xBF \r\n<HTML>", "web_page"},
      {"<?xml version='1.0'?><Error>", "web_page"},
      {"version https://git-lfs.github.com/spec/v1\noid sha256:", "lfs_pointer"},
      {"{\"error\": \"not found\"}", "json_text"},
      {"\x1F\x8B\x08", "compressed"},
      {"\xFD"
       "7zXZ\0"s,
       "compressed"},
      {"\x28\xB5\x2F\xFD", "compressed"},
      {"BZh9", "compressed"},
      {"7z\xBC\xAF\x27\x1C", "compressed"},
      {"lmgg\x01\0\0\0"s, "old_ggml"},
      {"tjgg\x03\0\0\0"s, "old_ggml"},
      {"fmgg\x01\0\0\0"s, "old_ggml"},
      {"algg\x01\0\0\0"s, "old_ggml"},
      {std::string(512, '\0'), "all_zeros"},
      {std::string(257, 'm') + "ustar", "compressed"},
  };
  if (r.chance(3)) {  // one letter of the magic wrong
    c.file = any_file(r);
    c.file.magic[r.below(4)] ^= static_cast<char>(1 + r.below(255));
    c.expect = "bad_magic json_text";
    return;
  }
  const Other& other = kOthers[r.below(kOthers.size())];
  c.raw = other.begin + r.bytes(r.below(600));
  c.expect = other.code;
}

inline void header_version(Random& r, Case& c) {
  c.file = any_file(r);
  uint32_t version;
  do {
    version = r.pick<uint32_t>({0, 1, 4, UINT32_MAX, static_cast<uint32_t>(r.any()), static_cast<uint32_t>(r.next())});
  } while (version == 2 || version == 3);
  c.file.version = version;
  c.expect = version == 1 ? "version_1" : version != 0 && version % 65536 == 0 ? "big_endian" : "bad_version";
}

inline void header_big_endian(Random& r, Case& c) {
  c.file = any_file(r);
  c.file.version = static_cast<uint32_t>(r.between(1, 255)) << (r.chance(2) ? 24 : 16);
  c.file.n_keys = r.next();
  c.expect = "big_endian";
}

inline void header_version_2(Random& r, Case& c) {
  c.file = any_file(r);
  c.file.version = 2;
  c.file.set(r.letters(9), STRING, text(r.letters(r.below(200))));
  c.expect = "runs";
}

inline void header_counts(Random& r, Case& c) {
  c.file = any_file(r);
  const bool keys = r.chance(2);
  const uint64_t there = keys ? c.file.keys.size() : c.file.tensors.size();
  uint64_t count = r.pick<uint64_t>({UINT64_MAX, UINT64_MAX - r.below(1000), uint64_t{1} << 63, uint64_t{1} << 32,
                                     65536, 65537, r.any(), there + 1 + r.below(9), r.below(there), 0});
  if (count == there) ++count;
  (keys ? c.file.n_keys : c.file.n_tensors) = count;
  // Otherwise what follows is read as something else; a last tensor that is left out may be one that is optional.
  c.expect = count > 65536 ? (keys ? "too_many_keys" : "too_many_tensors") : "error runs";
}

inline void header_zero_tensors(Random& r, Case& c) {
  c.file = any_whole(r);
  if (r.chance(2)) {
    c.file.n_tensors = 0;
  } else {
    c.file.tensors.clear();
  }
  c.expect = "missing_tensor";
  c.text = "runs";  // a vocabulary-only file has a tokenizer
}

inline void header_cut(Random& r, Case& c) {
  Layout layout;
  const std::string whole = any_file(r).build(&layout);
  c.raw = whole.substr(0, r.between(24, layout.header - 1));
  c.expect = "truncated_header";
}

// ---------------------------------------------------------------- keys

inline void key_length(Random& r, Case& c) {
  c.file = any_file(r);
  Key& key = r.pick(c.file.keys);
  const uint64_t length = r.pick<uint64_t>(
      {UINT64_MAX, UINT64_MAX - r.below(64), uint64_t{1} << 63, r.any(), r.between(1, 99), 65535, 65536});
  if (length == key.name.size()) return key_length(r, c);
  key.name_length = length;
  c.expect = length > 65535 ? "key_too_long" : "error";
}

inline void key_empty(Random& r, Case& c) {
  c.file = any_file(r);
  if (r.chance(2)) {
    r.pick(c.file.keys).name.clear();
  } else {
    insert(r, c.file, {"", U8, "\1", {}});
  }
  c.expect = "bad_key";
}

inline void key_too_long(Random& r, Case& c) {
  c.file = any_file(r);
  const bool fits = r.chance(4);
  insert(r, c.file, {r.letters(fits ? 65535 - r.below(3) : 65536 + r.below(3)), U8, "\1", {}});
  c.expect = fits ? "runs" : "key_too_long";
}

inline void key_bad_utf8(Random& r, Case& c) {
  c.file = any_file(r);
  const bool control = r.chance(3);
  const std::string name = control ? control_text(r) : bad_utf8(r);
  if (r.chance(2)) {
    r.pick(c.file.keys).name = name;
  } else {
    insert(r, c.file, {name, U8, "\1", {}});
  }
  c.expect = control ? "bad_key" : "bad_utf8";
}

inline void key_duplicate(Random& r, Case& c) {
  c.file = any_file(r);
  Key copy = r.pick(c.file.keys);
  if (r.chance(2)) {
    copy.type = U32;
    copy.payload = integer(U32, r.any());
  }
  insert(r, c.file, std::move(copy));
  c.expect = "duplicate_key";
}

inline void key_bad_type(Random& r, Case& c) {
  c.file = any_file(r);
  r.pick(c.file.keys).type = static_cast<uint32_t>(
      r.pick<uint64_t>({13, 14, 255, UINT32_MAX, r.between(13, 4095), r.between(13, UINT32_MAX)}));
  c.expect = "bad_value_type";
}

inline void key_bool(Random& r, Case& c) {
  c.file = any_file(r);
  const char bad = static_cast<char>(r.between(2, 255));
  if (r.chance(2)) {
    insert(r, c.file, {r.letters(8), BOOL, std::string(1, bad), {}});
  } else {
    std::string flags(r.between(1, 50), '\1');
    flags[r.below(flags.size())] = bad;
    insert(r, c.file, {r.letters(8), ARRAY, packed_array(BOOL, flags.size(), flags), {}});
  }
  c.expect = "bad_bool";
}

inline void key_string_length(Random& r, Case& c) {
  c.file = any_file(r);
  const std::string value = r.letters(r.between(0, 40));
  const uint64_t length = r.pick<uint64_t>({UINT64_MAX, UINT64_MAX - r.below(64), uint64_t{1} << 63, (16 << 20) + 1,
                                            16 << 20, r.any(), r.below(2 * value.size() + 2)});
  if (length == value.size()) return key_string_length(r, c);
  if (r.chance(2)) {
    insert(r, c.file, {r.letters(8), STRING, text(value, length), {}});
  } else {
    insert(r, c.file, {r.letters(8), ARRAY, packed_array(STRING, 1, text(value, length)), {}});
  }
  c.expect = length > (16 << 20) ? "string_too_long" : length > 1000000 ? "truncated_header" : "error";
}

inline void key_hidden_text(Random& r, Case& c) {
  c.file = any_file(r);
  switch (r.below(5)) {
    case 0:
      c.file.set("general.name", STRING, text(control_text(r) + hidden_text(r)));
      c.expect = "runs";
      break;
    case 1:
      insert(r, c.file, {hidden_text(r), STRING, text(control_text(r)), {}});
      c.expect = "runs";
      break;
    case 2:
      c.file.set("general.architecture", STRING, text(hidden_text(r) + control_text(r)));
      c.expect = "unknown_architecture";
      break;
    case 3: {
      const Key key{hidden_text(r), U8, "\1", {}};
      insert(r, c.file, key);
      insert(r, c.file, key);
      c.expect = "duplicate_key";
      break;
    }
    default:
      c.file.tensors.push_back({hidden_text(r).substr(0, 60), {8}, 0, ones(8), {}, {}, {}});
      c.expect = "unexpected_tensor bad_utf8";  // cut inside a character
  }
}

inline void key_bad_element_type(Random& r, Case& c) {
  c.file = any_file(r);
  const uint32_t bad = static_cast<uint32_t>(r.pick<uint64_t>({13, 255, UINT32_MAX, r.between(13, UINT32_MAX)}));
  const Key wrong{r.letters(8), ARRAY, packed_array(bad, r.any(), r.bytes(r.below(64))), {}};
  insert(r, c.file, wrong);
  c.expect = "bad_value_type";
}

inline void key_array_length(Random& r, Case& c) {
  c.file = any_file(r);
  const uint32_t type =
      static_cast<uint32_t>(r.pick<uint32_t>({U8, I8, U16, I16, U32, I32, F32, U64, I64, F64, STRING}));
  const uint64_t there = r.below(20);
  const uint64_t count = r.pick<uint64_t>({UINT64_MAX, UINT64_MAX / 8, (UINT64_MAX / 8) + 1, uint64_t{1} << 61,
                                           uint64_t{1} << 63, 4194304, 4194305, r.any(), r.below(2 * there + 2)});
  if (count == there) return key_array_length(r, c);
  std::string packed;
  for (uint64_t i = 0; i < there; ++i)
    packed += type == STRING ? text(r.letters(3)) : std::string(width_of(type), '\1');
  insert(r, c.file, {r.letters(8), ARRAY, packed_array(type, count, packed), {}});
  c.expect = count > 4194304  ? "array_too_long"
             : count > 200000 ? (type == STRING ? "error" : "truncated_header")
                              : "error";
}

inline void key_nested(Random& r, Case& c) {
  c.file = any_file(r);
  const bool deep = r.chance(3);
  std::string nested;
  for (uint64_t i = r.between(1, deep ? 5000 : 5); i > 0; --i) nested += packed_array(ARRAY, r.between(0, 3), "");
  nested += packed_array(U8, 1, "\1");
  insert(r, c.file, {r.letters(8), ARRAY, nested, {}});
  c.expect = "nested_array";
}

inline void key_amplification(Random& r, Case& c) {
  c.file = any_file(r);
  const uint64_t n = uint64_t{1} << r.below(r.chance(16) ? 18 : 13);
  std::string strings;
  for (uint64_t i = 0; i < n; ++i) strings += text(r.chance(64) ? r.letters(2) : "");
  const std::string payload = packed_array(STRING, n, strings);
  if (r.chance(2)) {
    insert(r, c.file, {r.letters(8), ARRAY, payload, {}});
    c.expect = "runs";
  } else {
    c.file.set("tokenizer.ggml.tokens", ARRAY, payload);
    c.expect = "wrong_length value_out_of_range";
  }
}

inline std::string value_of_type(Random& r, uint32_t type) {
  if (type == STRING) return text(r.letters(r.below(9)));
  if (type == ARRAY) {
    const uint32_t element = static_cast<uint32_t>(r.pick<uint32_t>({U8, I32, F32, BOOL, STRING}));
    return element == STRING ? text_array({r.letters(2), r.letters(3)})
                             : packed_array(element, 3, std::string(3 * width_of(element), '\1'));
  }
  if (type == F32 || type == F64) return real(type, static_cast<double>(r.below(100)));
  if (type == BOOL) return std::string(1, static_cast<char>(r.below(2)));
  return integer(type, r.below(100));
}

inline void key_wrong_type(Random& r, Case& c) {
  c.file = any_file(r);
  const std::string a = arch_of(c.file) + ".";
  struct Known {
    std::string name;
    std::vector<uint32_t> wrong;
  };
  const std::vector<uint32_t> no_integer = {F32, F64, BOOL, STRING, ARRAY},
                              no_float = {U8, I32, U64, BOOL, STRING, ARRAY},
                              no_text = {U8, I32, F32, BOOL, ARRAY, U64}, no_array = {U8, I32, F32, BOOL, STRING, U64};
  std::vector<Known> known = {{"general.architecture", no_text},
                              {"general.alignment", no_integer},
                              {a + "block_count", no_integer},
                              {a + "context_length", no_integer},
                              {a + "embedding_length", no_integer},
                              {a + "feed_forward_length", no_integer},
                              {a + "attention.head_count", no_integer},
                              {a + "attention.head_count_kv", no_integer},
                              {a + "attention.key_length", no_integer},
                              {a + "attention.layer_norm_rms_epsilon", no_float},
                              {a + "rope.freq_base", no_float},
                              {a + "rope.dimension_count", no_integer},
                              {a + "rope.scaling.type", no_text},
                              {a + "rope.scaling.factor", no_float},
                              {"split.count", no_integer},
                              {"tokenizer.ggml.tokens", no_array},
                              {"tokenizer.ggml.scores", no_array},
                              {"tokenizer.ggml.token_type", no_array},
                              {"tokenizer.ggml.merges", no_array},
                              {"tokenizer.ggml.bos_token_id", no_integer},
                              {"tokenizer.ggml.eos_token_id", no_integer}};
  Known& key = r.pick(known);
  const uint32_t type = r.pick(key.wrong);
  c.file.set(key.name, type, value_of_type(r, type));
  c.expect = "wrong_type";
  if (type == ARRAY) c.expect += " unsupported_model";  // "differs from layer to layer"
}

inline void key_missing(Random& r, Case& c) {
  c.file = any_file(r);
  const std::string a = arch_of(c.file) + ".";
  c.file.remove_key(r.pick<std::string>({"general.architecture", a + "block_count", a + "context_length",
                                         a + "embedding_length", a + "feed_forward_length", a + "attention.head_count",
                                         a + "attention.layer_norm_rms_epsilon"}));
  c.expect = "missing_key";
  if (r.chance(4)) {  // all keys of the architecture
    std::erase_if(c.file.keys, [&](const Key& k) { return k.name.starts_with(a); });
  }
}

inline void key_alignment(Random& r, Case& c) {
  c.file = any_file(r);
  const char* kKey = "general.alignment";
  const uint32_t type = r.pick<uint32_t>({U8, U16, U32, U64, I32, I64});
  switch (r.below(3)) {
    case 0: {  // right, and the file is laid out so
      c.file.alignment = uint64_t{1} << r.between(3, r.chance(8) ? 20 : 12);
      c.file.set(kKey, U32, integer(U32, c.file.alignment));
      c.expect = "runs";
      return;
    }
    case 1: {  // a possible alignment, but another than the file's
      c.file.set(kKey, U32, integer(U32, uint64_t{1} << r.between(6, 20)));
      c.expect = "tensor_misaligned tensor_overlap tensor_gap tensor_past_end truncated_data runs not_finite";
      return;
    }
    default: {
      uint64_t bad = r.pick<uint64_t>(
          {0, 1, 2, 4, 7, 9, 31, 33, 48, 0x80000000, UINT32_MAX, uint64_t{1} << 21, r.any(), UINT64_MAX});
      bad &= UINT64_MAX >> (64 - 8 * width_of(type));
      if (bad >= 8 && (bad & (bad - 1)) == 0 && bad <= (1 << 20)) bad += 1;
      c.file.set(kKey, type, integer(type, bad));
      c.expect = "value_out_of_range bad_alignment";
    }
  }
}

inline void key_not_finite(Random& r, Case& c) {
  c.file = any_file(r);
  const std::string a = arch_of(c.file) + ".";
  const uint32_t type = r.chance(2) ? F32 : F64;
  const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  const double bad = r.pick({inf, -inf, nan, -nan, -1.0, -1e30, type == F64 ? 1e300 : inf, type == F64 ? -1e300 : nan});
  c.file.set(r.pick<std::string>({a + "attention.layer_norm_rms_epsilon", a + "rope.freq_base",
                                  a + "rope.scaling.factor", a + "rope.scaling.attn_factor"}),
             type, real(type, bad));
  c.expect = "value_not_finite value_out_of_range";
}

inline void key_many(Random& r, Case& c) {
  c.file = any_file(r);
  const bool too_many = r.chance(2);
  const uint64_t n = too_many ? r.between(65537, 100000) : uint64_t{1} << r.below(r.chance(32) ? 17 : 12);
  const uint64_t written = too_many ? 10 : std::min<uint64_t>(n, 65536 - c.file.keys.size());
  for (uint64_t i = 0; i < written; ++i) {
    std::string name;
    for (uint64_t rest = i + 1; rest > 0; rest /= 26) name += static_cast<char>('A' + rest % 26);
    name += '.';
    c.file.keys.push_back({name, U8, "\1", {}});
  }
  if (too_many) c.file.n_keys = n;
  c.expect = too_many ? "too_many_keys" : "runs";
}

// ---------------------------------------------------------------- hyperparameters

inline void hyper_layers(Random& r, Case& c) {
  c.file = any_file(r);
  const uint32_t type = r.pick<uint32_t>({U32, U64, I32, I64});
  uint64_t n = r.pick<uint64_t>({0, 1, 3, 512, 513, 65536, UINT32_MAX, UINT64_MAX, r.below(600), r.any()});
  n &= UINT64_MAX >> (64 - 8 * width_of(type));
  if (n == 2) n = 3;
  c.file.set(arch_of(c.file) + ".block_count", type, integer(type, n));
  c.expect = n == 1 ? "unexpected_tensor" : n >= 3 && n <= 512 ? "missing_tensor" : "value_out_of_range";
}

inline void hyper_heads_zero(Random& r, Case& c) {
  c.file = any_file(r);
  c.file.set(arch_of(c.file) + r.pick({".attention.head_count", ".attention.head_count_kv"}), U32,
             integer(U32, r.pick<uint64_t>({0, 65537, UINT32_MAX, 0, r.between(65537, UINT32_MAX)})));
  c.expect = "value_out_of_range";
}

inline void hyper_heads_indivisible(Random& r, Case& c) {
  c.file = any_file(r);
  const bool kv = r.chance(2);
  c.file.set(arch_of(c.file) + (kv ? ".attention.head_count_kv" : ".attention.head_count"), U32,
             integer(U32, r.pick<uint64_t>({3, 5, 7, 64, 65536, r.between(3, 65536)})));
  c.expect = "value_out_of_range wrong_shape";
}

inline void hyper_head_dim(Random& r, Case& c) {
  c.file = any_file(r);
  uint64_t dim = r.pick<uint64_t>({0, 1, 15, 17, 8, 32, 65536, 65537, UINT32_MAX, r.any()}) & UINT32_MAX;
  if (dim == 16) dim = 0;
  c.file.set(arch_of(c.file) + r.pick({".attention.key_length", ".attention.value_length"}), U32, integer(U32, dim));
  c.expect = "value_out_of_range wrong_shape";
}

inline void hyper_rope_dims(Random& r, Case& c) {
  c.file = any_file(r);
  c.file.remove_tensor("rope_freqs.weight");
  const uint64_t dims = r.pick<uint64_t>({0, 1, 2, 3, 14, 15, 17, 18, UINT32_MAX, r.below(20), r.any()}) & UINT32_MAX;
  c.file.set(arch_of(c.file) + ".rope.dimension_count", U32, integer(U32, dims));
  c.expect = dims >= 2 && dims <= 16 && dims % 2 == 0 ? "runs" : "value_out_of_range";
}

inline void hyper_context(Random& r, Case& c) {
  c.file = any_file(r);
  const uint32_t type = r.pick<uint32_t>({U32, U64, I32, I64});
  const uint64_t n = r.pick<uint64_t>({0, 1, 1 << 24, (1 << 24) + 1, UINT32_MAX, UINT64_MAX, r.any()}) &
                     (UINT64_MAX >> (64 - 8 * width_of(type)));
  c.file.set(arch_of(c.file) + ".context_length", type, integer(type, n));
  c.expect = n >= 1 && n <= (1 << 24) ? "runs" : "value_out_of_range";
}

inline void hyper_vocabulary(Random& r, Case& c) {
  c.file = any_file(r);
  const uint64_t n = vocabulary_size(c.file);
  std::vector<std::string> tokens = tokens_of(c.file);
  switch (r.below(4)) {
    case 0:  // more tokens than rows
      for (uint64_t i = r.between(1, 300); i > 0; --i) tokens.push_back(r.letters(4));
      set_tokens(c.file, tokens);
      c.expect = "wrong_length";
      break;
    case 1:  // fewer: padding, but for the arrays beside it
      tokens.resize(r.below(n));
      set_tokens(c.file, tokens);
      c.expect = "wrong_length";
      break;
    case 2: {  // as many tokens as the embedding has rows, the output fewer or more
      Tensor* output = c.file.tensor("output.weight");
      if (!output) return hyper_vocabulary(r, c);
      const std::string row = output->data.substr(0, output->data.size() / n);
      output->dims[1] = r.chance(2) ? r.between(1, n - 1) : n + r.between(1, 9);
      output->data.clear();
      for (uint64_t i = 0; i < output->dims[1]; ++i) output->data += row;
      c.expect = "wrong_shape";
      break;
    }
    default: {  // no tokens at all
      c.file.set("tokenizer.ggml.tokens", ARRAY, text_array({}));
      c.expect = "wrong_length";
    }
  }
}

inline void hyper_ffn(Random& r, Case& c) {
  c.file = any_file(r);
  uint64_t n = r.pick<uint64_t>({0, 1, 32, 63, 65, 1 << 20, (1 << 20) + 1, UINT32_MAX, r.any()}) & UINT32_MAX;
  if (n == 64) n = 0;
  c.file.set(arch_of(c.file) + ".feed_forward_length", U32, integer(U32, n));
  c.expect = n >= 1 && n <= (1 << 20) ? "wrong_shape" : "value_out_of_range";
}

inline void hyper_per_layer(Random& r, Case& c) {
  c.file = any_file(r);
  const std::string name =
      r.pick<std::string>({"attention.head_count", "attention.head_count_kv", "feed_forward_length", "block_count",
                           "rope.freq_base", "attention.sliding_window", "attention.key_length"});
  const uint32_t type = r.pick<uint32_t>({U32, I32, F32, BOOL, U64});
  const uint64_t n = r.below(600);
  c.file.set(arch_of(c.file) + "." + name, ARRAY, packed_array(type, n, std::string(n * width_of(type), '\1')));
  c.expect = "unsupported_model wrong_type";
}

inline void hyper_unknown_arch(Random& r, Case& c) {
  c.file = any_file(r);
  c.file.set("general.architecture", STRING,
             text(r.pick<std::string>({"", "LLAMA", "llama ", "qwen", "mamba", "bert", "deepseek2",
                                       r.letters(r.below(20)) + "x", std::string(70000, 'l'), std::string("llama\0", 6),
                                       hidden_text(r)})));
  c.expect = "unknown_architecture";
}

inline void hyper_experts(Random& r, Case& c) {
  c.file = any_file(r);
  const std::string a = arch_of(c.file) + ".";
  if (r.chance(3)) {
    const std::string name =
        "blk.0." + r.pick<std::string>({"ffn_gate_inp.weight", "ffn_gate_exps.weight", "ffn_down_exps.weight"});
    c.file.tensors.push_back({name, {32, 4}, 0, ones(128), {}, {}, {}});
    c.expect = "unexpected_tensor";
    return;
  }
  const bool neutral = r.chance(3);
  c.file.set(a + r.pick({"expert_count", "expert_used_count", "attention.sliding_window"}), U32,
             integer(U32, neutral ? 0 : r.between(1, UINT32_MAX)));
  c.expect = neutral ? "runs" : "unsupported_model";
}

inline void hyper_rope_scaling(Random& r, Case& c) {
  c.file = any_file(r);
  const std::string rope = arch_of(c.file) + ".rope.", scaling = rope + "scaling.";
  c.file.remove_key(scaling + "type");
  c.file.remove_key(scaling + "factor");
  const auto number = [&](const std::string& name, double value) { c.file.set(name, F32, real(F32, value)); };
  switch (r.below(7)) {
    case 0:
      c.file.set(scaling + "type", STRING,
                 text(r.pick<std::string>({"longrope", "dynamic", "YARN", "llama3", r.letters(6)})));
      c.expect = "unsupported_model";
      break;
    case 1:
      c.file.set(scaling + "type", STRING, text(r.pick({"yarn", "linear"})));
      c.expect = "missing_key";
      break;
    case 2:
      number(scaling + "factor", static_cast<double>(r.between(2, 100)));
      c.expect = "missing_key";
      break;
    case 3:
      c.file.set(scaling + "type", STRING, text("yarn"));
      number(scaling + "factor", 4);
      number(scaling + "yarn_ext_factor", r.pick({0.0, 0.5, -0.5}));
      c.expect = "unsupported_model";
      break;
    case 4:
      c.file.set(scaling + "type", STRING, text("yarn"));
      number(scaling + "factor", 4);
      number(rope + "freq_base", 1);
      c.expect = "rope";
      break;
    case 5: {
      c.file.set(scaling + "type", STRING, text("linear"));
      number(scaling + "factor", r.pick({-1.0, 1e7, 1e30, -1e-30}));
      c.expect = "value_out_of_range";
      break;
    }
    default:  // possible ones
      c.file.set(scaling + "type", STRING, text(r.pick({"yarn", "linear", "none"})));
      number(scaling + "factor", r.pick({0.0, 1e-6, 0.5, 1.0, 40.0, 1e6}));
      number(rope + "freq_base", r.pick({1.5, 10000.0, 1e6, 1e12}));
      c.file.set(scaling + "original_context_length", U32, integer(U32, r.pick<uint64_t>({1, 32, 1 << 24})));
      number(scaling + "yarn_beta_fast", r.pick({1e-3, 32.0, 1e6}));
      number(scaling + "yarn_beta_slow", r.pick({1e-3, 1.0, 1e6}));
      c.expect = "runs not_finite";
  }
}

// ---------------------------------------------------------------- tensors

inline void tensor_name(Random& r, Case& c) {
  c.file = any_file(r);
  Tensor& t = r.pick(c.file.tensors);
  switch (r.below(5)) {
    case 0:
      t.name.clear();
      c.expect = "bad_name";
      break;
    case 1:
      t.name = r.letters(r.between(65, 300));
      c.expect = "name_too_long";
      break;
    case 2:
      t.name = control_text(r);
      c.expect = "bad_name";
      break;
    case 3:
      t.name = bad_utf8(r);
      c.expect = "bad_utf8";
      break;
    default:
      t.name_length = r.pick<uint64_t>({UINT64_MAX, uint64_t{1} << 63, 65, r.between(65, UINT64_MAX)});
      c.expect = "name_too_long";
  }
}

inline void tensor_duplicate(Random& r, Case& c) {
  c.file = any_file(r);
  const Tensor copy = r.pick(c.file.tensors);
  c.file.tensors.insert(c.file.tensors.begin() + static_cast<ptrdiff_t>(r.below(c.file.tensors.size() + 1)), copy);
  c.expect = "duplicate_tensor";
}

inline void tensor_n_dims(Random& r, Case& c) {
  c.file = any_file(r);
  Tensor& t = r.pick(c.file.tensors);
  const uint32_t n =
      static_cast<uint32_t>(r.pick<uint64_t>({0, 5, 6, 255, UINT32_MAX, r.between(5, UINT32_MAX), r.between(1, 4)}));
  if (n == t.dims.size()) return tensor_n_dims(r, c);
  t.n_dims = n;
  c.expect = n >= 1 && n <= 4 ? "error" : "bad_dims";
}

inline void tensor_zero_dim(Random& r, Case& c) {
  c.file = any_file(r);
  Tensor& t = r.pick(c.file.tensors);
  t.dims[r.below(t.dims.size())] =
      r.pick<uint64_t>({0, UINT64_MAX, uint64_t{1} << 63, (uint64_t{1} << 40) + 1, UINT64_MAX - r.below(1000),
                        r.between((uint64_t{1} << 40) + 1, UINT64_MAX)});
  c.expect = "bad_dims";
}

inline void tensor_product(Random& r, Case& c) {
  c.file = any_file(r);
  Tensor& t = r.pick(c.file.tensors);
  t.type = 0;
  const uint64_t a = r.between(22, 40), b = r.between(62 - a, 40);  // 2^62 elements of 4 bytes and more
  t.dims = {uint64_t{1} << a, uint64_t{1} << b};
  if (r.chance(2)) t.dims.push_back(r.between(1, uint64_t{1} << 40));
  if (r.chance(2)) t.dims.push_back(r.between(1, uint64_t{1} << 40));
  if (r.chance(3)) std::reverse(t.dims.begin(), t.dims.end());
  c.expect = "tensor_too_large";
}

// Sizes just below 2^63, which wrap when they are rounded up or added.
inline void tensor_padding(Random& r, Case& c) {
  c.file = any_file(r);
  Tensor& t = r.pick(c.file.tensors);
  t.type = 24;                                                                          // I8: a byte an element
  const uint64_t low = 49 * uint64_t{73} * 127 * 337, high = uint64_t{92737} * 649657;  // 2^63 - 1, a product of two
  t.dims = r.chance(2) ? std::vector<uint64_t>{low, high} : std::vector<uint64_t>{high, low};
  if (r.chance(2)) t.dims = {(uint64_t{1} << 31) - r.below(2), (uint64_t{1} << 32) - r.below(9)};
  c.expect = "tensor_too_large tensor_past_end truncated_data tensor_overlap";
}

inline void tensor_sum(Random& r, Case& c) {
  c.file = any_file(r);
  const uint64_t n = r.between(2, 6);
  uint64_t offset = place_of(c.file, c.file.tensors.size());
  for (uint64_t i = 0; i < n; ++i) {
    const uint64_t rows = (uint64_t{1} << r.between(18, 20)) - r.below(3);
    c.file.tensors.push_back({"big." + std::to_string(i), {uint64_t{1} << 40, rows}, 0, "", offset, {}, {}});
    offset += rows << 42;
  }
  c.expect = "tensor_too_large truncated_data";
}

inline void tensor_type(Random& r, Case& c) {
  c.file = any_file(r);
  const uint32_t type =
      static_cast<uint32_t>(r.pick<uint64_t>({4, 5, 31, 32, 33, 36, 37, 38, 42, 43, 255, UINT32_MAX,
                                              UINT32_MAX - r.below(99), r.between(42, UINT32_MAX), 0x80000000}));
  r.pick(c.file.tensors).type = type;
  const bool removed = type == 4 || type == 5 || (type >= 31 && type <= 38);
  c.expect = removed ? "removed_tensor_type" : "unknown_tensor_type";
}

inline void tensor_partial_block(Random& r, Case& c) {
  c.file = any_file(r);
  Tensor& t = r.pick(c.file.tensors);
  t.type = r.pick<uint32_t>(
      {2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 29, 34, 35, 39, 40, 41});
  t.dims[0] = r.between(1, 1 << 20) * 32 + r.between(1, 31);
  c.expect = "partial_block";
}

inline void tensor_misaligned(Random& r, Case& c) {
  c.file = any_file(r);
  const uint64_t wanted = r.below(c.file.tensors.size());
  const uint64_t offset = place_of(c.file, wanted);
  c.file.tensors[wanted].offset = (r.chance(2) ? offset : r.any() / 32 * 32) + r.between(1, 31);
  c.expect = "tensor_misaligned";
}

inline void tensor_past_end(Random& r, Case& c) {
  c.file = any_file(r);
  r.pick(c.file.tensors).offset = r.between(1 << 20, uint64_t{1} << r.between(21, 62)) / 32 * 32;
  c.expect = "tensor_past_end";
}

inline void tensor_wrapping_offset(Random& r, Case& c) {
  c.file = any_file(r);
  r.pick(c.file.tensors).offset = r.pick<uint64_t>(
      {UINT64_MAX - 31, UINT64_MAX - 63, uint64_t{1} << 63, (UINT64_MAX - r.below(1 << 20)) / 32 * 32});
  c.expect = "tensor_past_end";
}

inline void tensor_overlap(Random& r, Case& c) {
  c.file = any_file(r);
  const uint64_t wanted = r.between(1, c.file.tensors.size() - 1);
  const uint64_t offset = place_of(c.file, wanted);
  c.file.tensors[wanted].offset = r.below(offset / 32) * 32;
  c.expect = "tensor_overlap";
}

inline void tensor_gap(Random& r, Case& c) {
  c.file = any_file(r);
  const uint64_t wanted = r.below(c.file.tensors.size());
  const uint64_t offset = place_of(c.file, wanted);
  const uint64_t hole = r.between(1, 64) * 32;
  c.file.tensors[wanted].offset = offset + hole;
  c.file.tensors.back().data += r.bytes(hole + 64);
  c.expect = "tensor_gap";
}

inline void tensor_missing(Random& r, Case& c) {
  c.file = any_file(r);
  const uint64_t at = r.below(c.file.tensors.size());
  const std::string name = c.file.tensors[at].name;
  c.file.tensors.erase(c.file.tensors.begin() + static_cast<ptrdiff_t>(at));
  c.expect = name == "output.weight" || name == "rope_freqs.weight" ? "runs" : "missing_tensor";
}

inline void tensor_shape(Random& r, Case& c) {
  c.file = any_file(r);
  Tensor& t = r.pick(c.file.tensors);
  if (t.name == "token_embd.weight" && arch_of(c.file) == "qwen2")
    return tensor_shape(r, c);  // tied: any vocabulary fits
  const std::vector<uint64_t> before = t.dims;
  switch (r.below(3)) {
    case 0: std::reverse(t.dims.begin(), t.dims.end()); break;
    case 1: t.dims.push_back(r.between(2, 4)); break;
    default: t.dims.back() += r.between(1, 40);
  }
  if (t.dims == before || t.dims[0] % 32) return tensor_shape(r, c);
  uint64_t had = 1, has = 1;
  for (const uint64_t dim : before) had *= dim;
  for (const uint64_t dim : t.dims) has *= dim;
  t.data.resize(t.data.size() * has / had);
  c.expect = "wrong_shape wrong_length";
}

inline void tensor_role(Random& r, Case& c) {
  c.file = any_file(r);
  struct Foreign {
    uint32_t type;
    uint64_t bytes;
  };  // for 32 elements
  const Foreign foreign = r.pick<Foreign>({{9, 36}, {24, 32}, {25, 64}, {26, 128}, {27, 256}, {28, 256}});
  for (;;) {
    Tensor& t = r.pick(c.file.tensors);
    if (t.dims.size() != 2) continue;
    t.type = foreign.type;
    t.data.assign(t.dims[0] * t.dims[1] / 32 * foreign.bytes, '\0');
    break;
  }
  c.expect = "unsupported_tensor_type";
}

inline void tensor_more_declared(Random& r, Case& c) {
  c.file = any_file(r);
  c.file.n_tensors = c.file.tensors.size() + r.between(1, 100);
  c.expect = "error";
}

inline void tensor_norm_type(Random& r, Case& c) {
  c.file = any_file(r);
  struct Other {
    uint32_t type;
    uint64_t block, bytes;
  };
  const Other other = r.pick<Other>({{1, 1, 2}, {30, 1, 2}, {8, 32, 34}, {2, 32, 18}, {28, 1, 8}, {26, 1, 4}});
  for (;;) {
    Tensor& t = r.pick(c.file.tensors);
    if (t.dims.size() != 1) continue;
    if (t.dims[0] % other.block) return tensor_norm_type(r, c);
    t.type = other.type;
    t.data.assign(t.dims[0] / other.block * other.bytes, '\0');
    break;
  }
  c.expect = "unsupported_tensor_type";
}

// ---------------------------------------------------------------- vocabulary

inline void vocabulary_missing(Random& r, Case& c) {
  c.file = any_whole(r);
  const bool pieces = sentencepiece(c.file);
  const std::string name =
      r.pick<std::string>({"model", "tokens", pieces ? "scores" : "merges", pieces ? "model" : "pre", "token_type"});
  c.file.remove_key("tokenizer.ggml." + name);
  c.expect = "runs";
  if (name == "tokens" && r.chance(2))
    std::erase_if(c.file.keys, [](const Key& k) { return k.name.starts_with("tokenizer."); });
  c.text = name == "pre" ? "unknown_pretokenizer" : name == "token_type" ? "runs" : "bad_vocabulary";
}

inline void vocabulary_types(Random& r, Case& c) {
  c.file = any_whole(r);
  const std::string name = r.pick<std::string>(
      {"tokens", "scores", "token_type", "merges", "bos_token_id", "model", "pre", "add_bos_token", "chat_template"});
  const uint64_t n = vocabulary_size(c.file);
  const std::string key = "tokenizer.ggml." + name;
  c.expect = "wrong_type";
  if (name == "tokens" || name == "merges") {
    const uint32_t type = r.pick<uint32_t>({U8, I32, F32, U64});
    c.file.set(key, ARRAY, packed_array(type, n, std::string(n * width_of(type), '\1')));
  } else if (name == "scores") {
    const uint32_t type = r.pick<uint32_t>({U8, I32, U64, BOOL});
    c.file.set(key, ARRAY, packed_array(type, n, std::string(n * width_of(type), '\1')));
  } else if (name == "token_type") {
    const uint32_t type = r.pick<uint32_t>({F32, F64, BOOL});
    c.file.set(key, ARRAY, packed_array(type, n, std::string(n * width_of(type), '\1')));
  } else if (name == "bos_token_id") {
    c.file.set(key, r.pick<uint32_t>({STRING}), text("1"));
  } else {
    const uint32_t type = r.pick<uint32_t>({U8, F32, ARRAY});
    c.file.set(name == "chat_template" ? "tokenizer.chat_template" : key, type, value_of_type(r, type));
    c.expect = "runs";
    c.text = "bad_vocabulary bad_chat_template no_chat_template runs";
  }
}

inline void vocabulary_scores(Random& r, Case& c) {
  c.file = any_whole(r);
  const uint64_t n = vocabulary_size(c.file);
  uint64_t count = r.pick<uint64_t>({0, 1, n - 1, n + 1, 2 * n, r.below(3 * n)});
  if (count == n) ++count;
  const bool scores = r.chance(2);
  std::string packed;
  for (uint64_t i = 0; i < count; ++i) {
    if (scores) put(packed, -1.0f);
    if (!scores) put<int32_t>(packed, 1);
  }
  c.file.set(scores ? "tokenizer.ggml.scores" : "tokenizer.ggml.token_type", ARRAY,
             packed_array(scores ? F32 : I32, count, packed));
  c.expect = "wrong_length";
}

inline void vocabulary_ids(Random& r, Case& c) {
  c.file = any_whole(r);
  const uint64_t n = vocabulary_size(c.file);
  const std::string name =
      r.pick<std::string>({"bos", "eos", "unknown", "padding", "eot", "eom", "seperator", "cls", "mask", "fim_pre"});
  const uint32_t type = r.pick<uint32_t>({U32, I32, U64, I64});
  uint64_t id = r.pick<uint64_t>({n, n + 1, UINT32_MAX, UINT64_MAX, uint64_t{1} << 31, uint64_t{1} << 63, r.any()}) &
                (UINT64_MAX >> (64 - 8 * width_of(type)));
  if (id < n) id = n;
  c.file.set("tokenizer.ggml." + name + "_token_id", type, integer(type, id));
  c.expect = "value_out_of_range";
}

inline void vocabulary_duplicates(Random& r, Case& c) {
  c.file = any_whole(r);
  std::vector<std::string> tokens = tokens_of(c.file);
  const uint64_t from = plain_token(r, c.file), to = r.chance(2) ? plain_token(r, c.file) : r.below(tokens.size());
  tokens[to] = tokens[from];
  set_tokens(c.file, tokens);
  c.expect = "runs";
  c.text = "bad_vocabulary runs";
}

inline void vocabulary_bytes(Random& r, Case& c) {
  c.file = any_whole(r);
  std::vector<std::string> tokens = tokens_of(c.file);
  const uint64_t token = plain_token(r, c.file);
  tokens[token] =
      r.pick<std::string>({"<0x-1>", "<0xGG>", "<0x100>", "<0x>", "<0x1>", "<0X41>", "0x41", "<0x41", "", "<0x 1>",
                           "<0x+1>", "<0x\xC3\xA9>", "<" + r.letters(4) + ">", "<0x" + r.letters(2) + ">"});
  set_token_type(c.file, token, 6);
  set_tokens(c.file, tokens);
  c.expect = "runs";
  c.text = "bad_vocabulary runs";  // "<0xab>" is right after all
}

inline void vocabulary_merges(Random& r, Case& c) {
  c.file = small_file(r.between(1, kSmallFiles - 1), true);
  std::vector<std::string> tokens = tokens_of(c.file), merges;
  const auto token = [&] { return tokens[r.below(tokens.size())]; };
  switch (r.below(5)) {
    case 0: merges = {r.pick<std::string>({"", " ", "a", "a b c", " a", "a ", "  ", "h  e", "\u0120 \u0120"})}; break;
    case 1:  // of tokens that do not exist, or whose result does not
      merges = {r.letters(3) + " " + r.letters(3), token() + " " + token()};
      break;
    case 2:  // in a circle
      merges = {"h e", "he t", "t he", "h e", "e h", "h e"};
      break;
    case 3:
      for (uint64_t i = uint64_t{1} << r.below(13); i > 0; --i)
        merges.push_back(r.chance(2) ? "h e" : token() + " " + token());
      break;
    default: merges = {std::string(r.between(1, 100000), 'h') + " e"};
  }
  c.file.set("tokenizer.ggml.merges", ARRAY, text_array(merges));
  c.expect = "runs";
  c.text = "bad_vocabulary runs";
}

inline void vocabulary_giant(Random& r, Case& c) {
  c.file = any_whole(r);
  std::vector<std::string> tokens = tokens_of(c.file);
  const std::string unit = r.pick<std::string>({"a", "ab", "\u2581", " ", "<", "\u0120"});
  std::string giant;
  for (uint64_t i = uint64_t{1} << r.below(17); i > 0; --i) giant += unit;
  tokens[r.chance(2) ? plain_token(r, c.file) : r.below(tokens.size())] = giant;
  set_tokens(c.file, tokens);
  c.expect = "runs";
  c.text = "bad_vocabulary runs";
}

inline void vocabulary_pre(Random& r, Case& c) {
  c.file = small_file(r.between(1, kSmallFiles - 1), true);
  if (r.chance(4)) {
    c.file.set("tokenizer.ggml.model", STRING,
               text(r.pick<std::string>({"", "bert", "t5", "GPT2", "rwkv", r.letters(7), hidden_text(r)})));
    c.text = "unknown_tokenizer";
  } else {
    c.file.set("tokenizer.ggml.pre", STRING,
               text(r.pick<std::string>({"", "default", "QWEN2", "qwen2 ", "gpt-4o", r.letters(9), hidden_text(r),
                                         std::string(9999, 'x')})));
    c.text = "unknown_pretokenizer";
  }
  c.expect = "runs";
}

inline void vocabulary_bad_utf8(Random& r, Case& c) {
  c.file = any_whole(r);
  std::vector<std::string> tokens = tokens_of(c.file);
  tokens[r.below(tokens.size())] = bad_utf8(r);
  if (r.chance(4)) {
    c.file.set("tokenizer.ggml.merges", ARRAY, text_array({bad_utf8(r)}));
  } else if (r.chance(4)) {
    c.file.set("tokenizer.chat_template", STRING, text(bad_utf8(r)));
  } else {
    set_tokens(c.file, tokens);
  }
  c.expect = "bad_utf8";
}

inline void vocabulary_no_eos(Random& r, Case& c) {
  c.file = any_whole(r);
  c.file.remove_key("tokenizer.ggml.eos_token_id");
  if (r.chance(2)) c.file.remove_key("tokenizer.ggml.bos_token_id");
  const bool asked = r.chance(2);
  if (asked) c.file.set("tokenizer.ggml.add_eos_token", BOOL, "\1");
  c.expect = "runs";
  c.text = "bad_vocabulary runs";
}

inline void vocabulary_template(Random& r, Case& c) {
  c.file = any_whole(r);
  static const std::vector<std::string> kHostile = {
      "{{ ''.__class__.__mro__[1].__subclasses__() }}",
      "{{ self.__init__.__globals__.__builtins__.__import__('os').popen('id').read() }}",
      "{{ cycler.__init__.__globals__.os.system('id') }}",
      "{{ messages|attr('__class__') }}",
      "{{ ('%s' % ({},)).__class__ }}",
      "{{ '{0.__class__}'.format(messages) }}",
      "{{ 'a' * 1000000000 }}",
      "{{ 'a'.rjust(10000000000) }}",
      "{{ range(100000000)|list }}",
      "{{ 9**9**9 }}",
      "{{ 10 ** 10000000 }}",
      "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
      "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
      "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
      "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
      "{% include '/etc/passwd' %}",
      "{% import 'os' as os %}{{ os }}",
      "{% extends 'x' %}",
      "{{ raise_exception('stop') }}",
      "{{ lipsum }}{{ request }}{{ config }}",
      "{{ messages.append(1) }}",
      "{{ 'a'|center(1000000000) }}",
      "{{ 'x'|indent(1000000000) }}",
      "{{ [1,2,3]|tojson(indent=1000000000) }}",
      "{{ 1 // 0 }}{{ 1 % 0 }}{{ 1 / 0 }}",
      "{{ strftime_now('%' * 100000) }}",
      "{% filter upper %}",
      "{% if %}",
      "{{",
      "{% raw %}",
      std::string(1, '\0'),
  };
  std::string source = kHostile[r.below(kHostile.size())];
  switch (r.below(5)) {
    case 0: {  // deep
      const uint64_t n = uint64_t{1} << r.below(15);
      const std::string open =
          r.pick<std::string>({"(", "[", "{% if 1 %}", "not ", "-", "{%for i in [1]%}", "{{ ", "~"});
      std::string deep;
      for (uint64_t i = 0; i < n; ++i) deep += open;
      source = (open.starts_with("{") ? "" : "{{ ") + deep + "1";
      break;
    }
    case 1:  // long
      source.resize(1 << r.below(18), 'x');
      break;
    case 2:  // damaged
      for (uint64_t i = r.between(1, 8); i > 0; --i)
        source[r.below(source.size())] = static_cast<char>(r.between(32, 126));
      break;
    case 3:  // two together
      source += kHostile[r.below(kHostile.size())];
      break;
    default: break;
  }
  c.file.set("tokenizer.chat_template", STRING, text(source));
  c.expect = "runs";
  c.text = "template_syntax template_error template_limit template_raised runs";
}

inline void vocabulary_empty_token(Random& r, Case& c) {
  c.file = any_whole(r);
  std::vector<std::string> tokens = tokens_of(c.file);
  for (uint64_t i = r.between(1, 9); i > 0; --i) tokens[r.below(tokens.size())].clear();
  set_tokens(c.file, tokens);
  c.expect = "runs";
  c.text = "bad_vocabulary runs";
}

// ---------------------------------------------------------------- data and the file system

inline void write_file(const std::string& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

inline void data_truncated(Random& r, Case& c) {
  Layout layout;
  const std::string whole = any_file(r).build(&layout);
  c.raw = whole.substr(0, r.between(layout.header, whole.size() - 32));  // at most 31 bytes of padding end the file
  c.expect = "truncated_data";
}

inline void put_float(std::string& data, size_t index, float value) { std::memcpy(data.data() + 4 * index, &value, 4); }

inline void data_scales(Random& r, Case& c) {
  c.file = small_file(r.below(kSmallFiles));
  const uint16_t half = r.pick<uint16_t>({0x7C00, 0xFC00, 0x7E00, 0xFE00, 0x7C01, 0xFFFF});
  const float single = r.pick({std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                               std::numeric_limits<float>::quiet_NaN()});
  for (uint64_t i = r.between(1, 20); i > 0; --i) {
    Tensor& t = r.pick(c.file.tensors);
    const uint64_t block = t.type == 0 ? 4 : t.type == 8 ? 34 : t.type == 2 ? 18 : t.type == 7 ? 24 : 2;
    const uint64_t at = r.below(t.data.size() / block) * block;
    if (t.type == 0) put_float(t.data, at / 4, single);
    if (t.type != 0) std::memcpy(t.data.data() + at, &half, 2);
  }
  c.expect = "runs not_finite rope";
}

inline void data_random(Random& r, Case& c) {
  static std::map<int, Gguf> wide;
  const int format = static_cast<int>(r.below(pe::kFormats));
  const auto [place, is_new] = wide.try_emplace(format);
  if (is_new) place->second = make_valid(wide_shape(static_cast<pe::Format>(format)));
  c.file = place->second;
  for (Tensor& t : c.file.tensors) {
    if (t.dims.size() != 2 || r.chance(3)) continue;
    for (size_t at = 0; at + 8 <= t.data.size(); at += 8) {
      const uint64_t word = r.next();
      std::memcpy(t.data.data() + at, &word, 8);
    }
  }
  c.expect = "runs not_finite";
}

inline void data_zero(Random& r, Case& c) {
  c.file = any_file(r);
  const bool all = r.chance(2);
  for (Tensor& t : c.file.tensors)
    if ((all && t.name != "rope_freqs.weight") || (!all && r.chance(2))) t.data.assign(t.data.size(), '\0');
  c.expect = "runs not_finite rope";
}

inline void data_overflow(Random& r, Case& c) {
  c.file = any_file(r);
  const float huge = r.pick({3e38f, -3e38f, 1e30f, std::numeric_limits<float>::max()});
  const float tiny = r.pick({1e-45f, -1e-45f, 1e-38f, 0.0f});
  for (Tensor& t : c.file.tensors) {
    if (t.type == 0 && r.chance(2))
      for (size_t i = 0; i < t.data.size() / 4; ++i) put_float(t.data, i, r.chance(8) ? tiny : huge);
    if (t.type == 1 && r.chance(2))
      for (size_t i = 0; i + 1 < t.data.size(); i += 2) std::memcpy(t.data.data() + i, "\xFF\x7B", 2);  // 65504
    if (t.type == 30 && r.chance(2))
      for (size_t i = 0; i + 1 < t.data.size(); i += 2) std::memcpy(t.data.data() + i, "\x7F\x7F", 2);
  }
  c.expect = "runs not_finite rope value_out_of_range";
}

inline void data_changed(Random& r, Case& c) {
  c.file = any_file(r);
  const uint64_t seed = r.next();
  const auto scribble = [seed](std::string& bytes) {
    Random mine(seed);
    for (uint64_t i = mine.between(1, 2000); i > 0; --i)
      bytes[mine.below(bytes.size())] = static_cast<char>(mine.next());
  };
  switch (r.below(4)) {
    case 0:  // memory that was opened
      c.after_opening = scribble;
      c.expect = "runs not_finite rope";
      break;
    case 1:  // a mapped file, written to in place
    case 2: {
      const std::string bytes = c.file.build();
      c.place = [bytes](const std::string& folder) {
        write_file(folder + "/m.gguf", bytes);
        return folder + "/m.gguf";
      };
      c.after_mapping = [bytes, scribble](const std::string& path) {
        std::string other = bytes;
        scribble(other);
        std::fstream out(path, std::ios::binary | std::ios::in | std::ios::out);
        out.write(other.data(), static_cast<std::streamsize>(other.size()));
      };
      c.expect = "runs not_finite rope";
      break;
    }
    default: {  // a file that shrinks while it is copied
      const std::string bytes = c.file.build();
      const uint64_t left = r.below(bytes.size() - 64);
      c.place = [bytes](const std::string& folder) {
        write_file(folder + "/m.gguf", bytes);
        return folder + "/m.gguf";
      };
      c.loads = {pe::gguf::Load::kCopy};
      c.while_loading = [left](const std::string& path) { std::filesystem::resize_file(path, left); };
      c.expect = "file_changed";
    }
  }
}

inline void data_sparse(Random& r, Case& c) {
  c.file = any_file(r);
  const uint64_t size = (uint64_t{1} << 40) - r.below(1 << 20);
  const int kind = static_cast<int>(r.below(4));
  std::string bytes = c.file.build();
  c.expect = "runs";
  if (kind == 0) {
    bytes = "";
    c.expect = "all_zeros";
  } else if (kind == 1) {  // a tensor that fills the hole
    c.file.tensors.push_back({"hole", {uint64_t{1} << r.between(30, 37)}, 0, "", {}, {}, {}});
    bytes = c.file.build();
    c.expect = "unexpected_tensor";
  } else if (kind == 2) {
    bytes = "GGUF";
    c.expect = "bad_version";
  }
  c.place = [bytes, size](const std::string& folder) {
    write_file(folder + "/m.gguf", bytes);
    std::filesystem::resize_file(folder + "/m.gguf", size);
    return folder + "/m.gguf";
  };
}

inline void data_special_files(Random& r, Case& c) {
  const int kind = static_cast<int>(r.below(9));
  static constexpr const char* kExpected[] = {"is_directory",     "not_regular_file", "not_regular_file",
                                              "not_regular_file", "file_not_found",   "not_regular_file",
                                              "file_not_found",   "bad_path",         "is_directory"};
  c.expect = kExpected[kind];
  const std::string name = "/" + r.letters(5);
  c.place = [kind, name](const std::string& folder) -> std::string {
    const std::string path = folder + name;
    switch (kind) {
      case 0: std::filesystem::create_directory(path); return path;
      case 1: return ::mkfifo(path.c_str(), 0600) == 0 ? path : "";
      case 2: return name[1] < 'i' ? "/dev/zero" : name[1] < 'q' ? "/dev/null" : "/dev/random";
      case 3: {
        const int fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        std::snprintf(address.sun_path, sizeof address.sun_path, "%s", path.c_str());
        const bool bound = ::bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
        ::close(fd);
        return bound ? path : "";
      }
      case 4: std::filesystem::create_symlink(folder + "/nothing", path); return path;
      case 5: std::filesystem::create_symlink("/dev/zero", path); return path;
      case 6: write_file(path, "GGUF"); return path + "/inside";
      case 7: return name[1] < 'n' ? "" : path + std::string(1, '\0') + "x";
      default: return folder + "/.";
    }
  };
  c.loads = {pe::gguf::Load::kMap, pe::gguf::Load::kCopy, pe::gguf::Load::kHeader};
}

inline void data_split(Random& r, Case& c) {
  const Gguf whole = any_file(r);
  const uint64_t count = r.between(2, 4);
  const int kind = static_cast<int>(r.below(10));
  static constexpr const char* kExpected[] = {
      "runs",           "split_part_missing", "split_not_first",  "split_bad_name", "split_mismatch",
      "split_mismatch", "split_tensor_count", "duplicate_tensor", "error",          "value_out_of_range"};
  c.expect = kExpected[kind];
  const uint64_t victim = r.between(1, count - 1), seed = r.next();
  c.place = [=](const std::string& folder) {
    Random mine(seed);
    const auto path = [&](uint64_t part) {
      char name[64];
      std::snprintf(name, sizeof name, "/m-%05u-of-%05u.gguf", static_cast<unsigned>(part + 1),
                    static_cast<unsigned>(count));
      return folder + name;
    };
    for (uint64_t part = 0; part < count; ++part) {
      if (kind == 1 && part == victim) continue;
      Gguf file = whole;
      if (part > 0) file.keys.clear();
      file.tensors.clear();
      for (size_t i = part; i < whole.tensors.size(); i += count) file.tensors.push_back(whole.tensors[i]);
      const bool mine_now = part == victim;
      if (kind == 7 && mine_now) file.tensors.push_back(whole.tensors[0]);
      uint64_t number = part, total = count;
      if (kind == 4 && mine_now) number = part + 1 + mine.below(900);
      if (kind == 5 && mine_now) total = count + 1 + mine.below(900);
      if (kind == 9 && mine_now) number = 1001 + mine.any() / 2;
      file.set("split.no", U64, integer(U64, number));
      file.set("split.count", U64, integer(U64, total));
      if (part == 0)
        file.set(
            "split.tensors.count", U64,
            integer(U64, kind == 6 ? whole.tensors.size() + 1 + mine.any() / 2 : whole.tensors.size() + (kind == 7)));
      std::string bytes = file.build();
      if (kind == 8 && mine_now) bytes.resize(mine.below(bytes.size() - 32));
      write_file(path(part), bytes);
    }
    if (kind == 2) return path(victim);
    if (kind == 3) {
      std::filesystem::rename(path(0), folder + "/renamed.gguf");
      return folder + "/renamed.gguf";
    }
    return path(0);
  };
  c.loads = {pe::gguf::Load::kMap, pe::gguf::Load::kCopy};
}

inline void data_big_offsets(Random& r, Case& c) {
  c.file = small_file(0);  // F32
  c.evaluate = false;
  const int kind = static_cast<int>(r.below(3));
  // An embedding of 4 GiB and more in front of everything else, nothing but holes.
  const uint64_t rows = kind == 2 ? vocabulary_size(c.file) : r.between(1 << 19, 1 << 20),
                 cols = kind == 2 ? 32 : r.between(2049, 2300);
  Gguf model = c.file;
  model.remove_tensor("rope_freqs.weight");  // zeros would be refused
  if (kind != 2) {
    model.tensors.insert(model.tensors.begin(), {"hole", {cols, rows}, 0, "", {}, {}, {}});
    uint64_t offset = (cols * rows * 4 + 31) / 32 * 32;
    for (size_t i = 1; i < model.tensors.size(); ++i) {
      model.tensors[i].offset = offset + (kind == 1 && i + 1 == model.tensors.size() ? 32 : 0);
      offset += (model.tensors[i].data.size() + 31) / 32 * 32;
    }
    c.expect = kind == 1 ? "tensor_gap tensor_past_end" : "unexpected_tensor";
  } else {  // the last tensor claims to lie behind 4 GiB
    model.tensors.back().offset = (uint64_t{1} << r.between(32, 50)) + 32 * r.below(1000);
    c.expect = "tensor_gap tensor_past_end";
  }
  std::string bytes;
  Layout layout;
  bytes = model.build(&layout);
  const uint64_t size = (uint64_t{1} << 34) + r.below(1 << 20);
  c.place = [bytes, size](const std::string& folder) {
    write_file(folder + "/m.gguf", bytes);
    std::filesystem::resize_file(folder + "/m.gguf", size);
    return folder + "/m.gguf";
  };
}

}  // namespace detail

inline constexpr Class kClasses[] = {
    {"header.empty", detail::header_empty},
    {"header.magic_only", detail::header_magic_only},
    {"header.wrong_magic", detail::header_wrong_magic},
    {"header.version", detail::header_version},
    {"header.big_endian", detail::header_big_endian},
    {"header.version_2", detail::header_version_2},
    {"header.counts", detail::header_counts},
    {"header.zero_tensors", detail::header_zero_tensors},
    {"header.cut", detail::header_cut},
    {"key.length", detail::key_length},
    {"key.empty", detail::key_empty},
    {"key.too_long", detail::key_too_long},
    {"key.bad_utf8", detail::key_bad_utf8},
    {"key.duplicate", detail::key_duplicate},
    {"key.bad_type", detail::key_bad_type},
    {"key.bool", detail::key_bool},
    {"key.string_length", detail::key_string_length},
    {"key.hidden_text", detail::key_hidden_text},
    {"key.bad_element_type", detail::key_bad_element_type},
    {"key.array_length", detail::key_array_length},
    {"key.nested_array", detail::key_nested},
    {"key.amplification", detail::key_amplification},
    {"key.wrong_type", detail::key_wrong_type},
    {"key.missing", detail::key_missing},
    {"key.alignment", detail::key_alignment},
    {"key.not_finite", detail::key_not_finite},
    {"key.many", detail::key_many},
    {"hyper.layers", detail::hyper_layers},
    {"hyper.heads_zero", detail::hyper_heads_zero},
    {"hyper.heads_indivisible", detail::hyper_heads_indivisible},
    {"hyper.head_dim", detail::hyper_head_dim},
    {"hyper.rope_dims", detail::hyper_rope_dims},
    {"hyper.context", detail::hyper_context},
    {"hyper.vocabulary", detail::hyper_vocabulary},
    {"hyper.ffn", detail::hyper_ffn},
    {"hyper.per_layer", detail::hyper_per_layer},
    {"hyper.unknown_arch", detail::hyper_unknown_arch},
    {"hyper.experts", detail::hyper_experts},
    {"hyper.rope_scaling", detail::hyper_rope_scaling},
    {"tensor.name", detail::tensor_name},
    {"tensor.duplicate", detail::tensor_duplicate},
    {"tensor.n_dims", detail::tensor_n_dims},
    {"tensor.zero_dim", detail::tensor_zero_dim},
    {"tensor.product_overflow", detail::tensor_product},
    {"tensor.padding_wrap", detail::tensor_padding},
    {"tensor.sum_overflow", detail::tensor_sum},
    {"tensor.type", detail::tensor_type},
    {"tensor.partial_block", detail::tensor_partial_block},
    {"tensor.misaligned", detail::tensor_misaligned},
    {"tensor.past_end", detail::tensor_past_end},
    {"tensor.wrapping_offset", detail::tensor_wrapping_offset},
    {"tensor.overlap", detail::tensor_overlap},
    {"tensor.gap", detail::tensor_gap},
    {"tensor.missing", detail::tensor_missing},
    {"tensor.shape", detail::tensor_shape},
    {"tensor.role", detail::tensor_role},
    {"tensor.more_declared", detail::tensor_more_declared},
    {"tensor.norm_type", detail::tensor_norm_type},
    {"vocabulary.missing", detail::vocabulary_missing},
    {"vocabulary.types", detail::vocabulary_types},
    {"vocabulary.scores", detail::vocabulary_scores},
    {"vocabulary.ids", detail::vocabulary_ids},
    {"vocabulary.duplicates", detail::vocabulary_duplicates},
    {"vocabulary.bytes", detail::vocabulary_bytes},
    {"vocabulary.merges", detail::vocabulary_merges},
    {"vocabulary.giant", detail::vocabulary_giant},
    {"vocabulary.pre_tokenizer", detail::vocabulary_pre},
    {"vocabulary.bad_utf8", detail::vocabulary_bad_utf8},
    {"vocabulary.no_eos", detail::vocabulary_no_eos},
    {"vocabulary.template", detail::vocabulary_template},
    {"vocabulary.empty_token", detail::vocabulary_empty_token},
    {"data.truncated", detail::data_truncated},
    {"data.scales", detail::data_scales},
    {"data.random", detail::data_random},
    {"data.zero", detail::data_zero},
    {"data.overflow", detail::data_overflow},
    {"data.changed", detail::data_changed},
    {"data.sparse", detail::data_sparse},
    {"data.special_files", detail::data_special_files},
    {"data.split", detail::data_split},
    {"data.big_offsets", detail::data_big_offsets},
};

static_assert(std::size(kClasses) == 81);

inline Case make_case(const Class& kind, uint64_t number) {
  Random random(number * 0x9E3779B97F4A7C15u + (static_cast<uint64_t>(&kind - kClasses) << 56));
  Case out;
  kind.make(random, out);
  return out;
}

}  // namespace hostile
