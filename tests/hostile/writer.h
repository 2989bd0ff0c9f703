// GGUF files in the making, right or wrong on purpose: what tests/gguf/builder.py is for Python, fast enough for
// millions of them. Knows the format from its specification; nothing of the engine is used.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace hostile {

enum : uint32_t { U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 };  // value types

inline unsigned width_of(uint32_t type) {
  static constexpr unsigned kWidths[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  return type < 13 ? kWidths[type] : 0;
}

inline bool is_integer(uint32_t type) { return width_of(type) != 0 && type != F32 && type != F64 && type != BOOL; }

template <class T>
void put(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

inline void put_text(std::string& out, std::string_view text, std::optional<uint64_t> length = {}) {
  put<uint64_t>(out, length.value_or(text.size()));
  out += text;
}

// The low bytes of an integer, as many as the type has.
inline std::string integer(uint32_t type, uint64_t value) {
  return std::string(reinterpret_cast<const char*>(&value), width_of(type));
}

inline std::string real(uint32_t type, double value) {
  std::string out;
  if (type == F32) {
    put(out, static_cast<float>(value));
  } else {
    put(out, value);
  }
  return out;
}

inline std::string text(std::string_view value, std::optional<uint64_t> length = {}) {
  std::string out;
  put_text(out, value, length);
  return out;
}

// The payload of an array: `packed` elements of a fixed size.
inline std::string packed_array(uint32_t type, uint64_t count, std::string_view packed) {
  std::string out;
  put(out, type);
  put(out, count);
  out += packed;
  return out;
}

inline std::string text_array(const std::vector<std::string>& items, std::optional<uint64_t> count = {}) {
  std::string out;
  put<uint32_t>(out, STRING);
  put<uint64_t>(out, count.value_or(items.size()));
  for (const std::string& item : items) put_text(out, item);
  return out;
}

struct Key {
  std::string name;
  uint32_t type;
  std::string payload;                  // everything after the type
  std::optional<uint64_t> name_length;  // overrides the true one
};

struct Tensor {
  std::string name;
  std::vector<uint64_t> dims;
  uint32_t type;
  std::string data;
  std::optional<uint64_t> offset;       // overrides the true one
  std::optional<uint32_t> n_dims;       // overrides the true one
  std::optional<uint64_t> name_length;  // overrides the true one
};

struct Integer {
  size_t at;
  unsigned width;
};

struct Layout {
  size_t header = 0;              // where the tensor table ends
  size_t data = 0;                // where the data begins
  std::vector<Integer> integers;  // every integer of the header: counts, lengths, types, values, dimensions, offsets
};

struct Gguf {
  std::vector<Key> keys;
  std::vector<Tensor> tensors;
  std::string magic = "GGUF";
  uint32_t version = 3;
  std::optional<uint64_t> n_tensors, n_keys;  // override the true ones
  uint64_t alignment = 32;                    // what the data is laid out by; the key is separate

  Key* key(std::string_view name) {
    for (Key& k : keys)
      if (k.name == name) return &k;
    return nullptr;
  }
  Tensor* tensor(std::string_view name) {
    for (Tensor& t : tensors)
      if (t.name == name) return &t;
    return nullptr;
  }
  // Replaces the key, or adds it.
  void set(std::string name, uint32_t type, std::string payload) {
    if (Key* found = key(name)) {
      found->type = type;
      found->payload = std::move(payload);
    } else {
      keys.push_back({std::move(name), type, std::move(payload), {}});
    }
  }
  void remove_key(std::string_view name) {
    std::erase_if(keys, [&](const Key& k) { return k.name == name; });
  }
  void remove_tensor(std::string_view name) {
    std::erase_if(tensors, [&](const Tensor& t) { return t.name == name; });
  }

  std::string build(Layout* layout = nullptr) const;
};

namespace detail {

inline void note(Layout* layout, size_t at, unsigned width) {
  if (layout) layout->integers.push_back({at, width});
}

// The integers of a well-formed payload that begins at `at`.
inline void note_payload(Layout* layout, uint32_t type, std::string_view payload, size_t at) {
  if (is_integer(type) || type == BOOL) note(layout, at, width_of(type));
  if (type == STRING) note(layout, at, 8);
  if (type != ARRAY || payload.size() < 12) return;
  uint32_t element;
  std::memcpy(&element, payload.data(), 4);
  note(layout, at, 4);
  note(layout, at + 4, 8);
  size_t p = 12;
  while (p < payload.size()) {
    if (element == STRING) {
      if (payload.size() - p < 8) return;
      uint64_t length;
      std::memcpy(&length, payload.data() + p, 8);
      note(layout, at + p, 8);
      if (length > payload.size() - p - 8) return;
      p += 8 + length;
    } else {
      if (width_of(element) == 0) return;
      if (is_integer(element)) note(layout, at + p, width_of(element));
      p += width_of(element);
    }
  }
}

}  // namespace detail

inline std::string Gguf::build(Layout* layout) const {
  std::string out = magic;
  detail::note(layout, out.size(), 4);
  put(out, version);
  detail::note(layout, out.size(), 8);
  put<uint64_t>(out, n_tensors.value_or(tensors.size()));
  detail::note(layout, out.size(), 8);
  put<uint64_t>(out, n_keys.value_or(keys.size()));
  for (const Key& key : keys) {
    detail::note(layout, out.size(), 8);
    put_text(out, key.name, key.name_length);
    detail::note(layout, out.size(), 4);
    put(out, key.type);
    if (layout) detail::note_payload(layout, key.type, key.payload, out.size());
    out += key.payload;
  }
  uint64_t offset = 0;
  for (const Tensor& tensor : tensors) {
    detail::note(layout, out.size(), 8);
    put_text(out, tensor.name, tensor.name_length);
    detail::note(layout, out.size(), 4);
    put<uint32_t>(out, tensor.n_dims.value_or(static_cast<uint32_t>(tensor.dims.size())));
    for (const uint64_t dim : tensor.dims) {
      detail::note(layout, out.size(), 8);
      put(out, dim);
    }
    detail::note(layout, out.size(), 4);
    put(out, tensor.type);
    detail::note(layout, out.size(), 8);
    put<uint64_t>(out, tensor.offset.value_or(offset));
    offset += (tensor.data.size() + alignment - 1) / alignment * alignment;
  }
  if (layout) layout->header = out.size();
  if (!tensors.empty()) out.resize((out.size() + alignment - 1) / alignment * alignment);
  if (layout) layout->data = out.size();
  for (const Tensor& tensor : tensors) {
    out += tensor.data;
    out.resize(out.size() + (alignment - tensor.data.size() % alignment) % alignment);
  }
  return out;
}

}  // namespace hostile
