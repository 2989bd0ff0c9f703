// Keys and values of every position, layer and KV head: [layer][kv head][position][row of head_dim elements], so that the
// keys a head walks are one contiguous stream. kernels.h says how a row is stored.
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

  // Throws Error kMemory, kUnsupported; pages are taken from the system as positions are first written.
  explicit KvCache(const Shape& shape);

  // Overflow-checked; throws Error kMemory when the cache cannot exist on this machine, kUnsupported when a head's dimension
  // is no multiple of the type's block.
  static size_t bytes(const Shape& shape);

  const Shape& shape() const { return shape_; }
  uint8_t* k(size_t layer, size_t head, size_t pos) { return base_ + row(layer, head, pos) * k_bytes_; }
  uint8_t* v(size_t layer, size_t head, size_t pos) { return base_ + v_at_ + row(layer, head, pos) * v_bytes_; }

 private:
  size_t row(size_t layer, size_t head, size_t pos) const {
    return (layer * shape_.kv_heads + head) * shape_.positions + pos;
  }

  Shape shape_;
  size_t k_bytes_, v_bytes_;  // of a row
  size_t v_at_;               // byte offset of the values
  AlignedBuffer memory_;
  uint8_t* base_;
};

}  // namespace pe
