// Keys and values of every position, layer and KV head: [layer][kv head][position][head_dim], so that the keys a head
// walks are one contiguous stream.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/aligned_buffer.h"
#include "kernels/kernels.h"

namespace pe {

class KvCache {
 public:
  struct Shape {
    size_t layers, kv_heads, positions, head_dim_k, head_dim_v;
    Kv type;
  };

  // Throws Error kMemory; pages are taken from the system as positions are first written.
  explicit KvCache(const Shape& shape);

  static size_t element_bytes(Kv type) { return type == Kv::F16 ? 2 : 4; }
  // Overflow-checked; throws Error kMemory when the cache cannot exist on this machine.
  static size_t bytes(const Shape& shape);

  const Shape& shape() const { return shape_; }
  uint8_t* k(size_t layer, size_t head, size_t pos) { return base_ + k_row(layer, head, pos) * element_; }
  uint8_t* v(size_t layer, size_t head, size_t pos) { return base_ + v_at_ + v_row(layer, head, pos) * element_; }

 private:
  size_t k_row(size_t layer, size_t head, size_t pos) const {
    return ((layer * shape_.kv_heads + head) * shape_.positions + pos) * shape_.head_dim_k;
  }
  size_t v_row(size_t layer, size_t head, size_t pos) const {
    return ((layer * shape_.kv_heads + head) * shape_.positions + pos) * shape_.head_dim_v;
  }

  Shape shape_;
  size_t element_;
  size_t v_at_;  // byte offset of the values
  AlignedBuffer memory_;
  uint8_t* base_;
};

}  // namespace pe
