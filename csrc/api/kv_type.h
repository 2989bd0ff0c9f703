// The cache types of the interface.
#pragma once

#include <cstdint>
#include <string>

#include "base/error.h"
#include "kernels/kernels.h"

namespace pe {

// Of a tensor type. Throws Error kUnsupported.
inline Kv kv_of(int32_t type) {
  switch (type) {
    case 0: return Kv::F32;
    case 1: return Kv::F16;
    case 8: return Kv::Q8_0;
    default:
      throw Error(
          Status::kUnsupported, "bad_option",
          "a KV cache of tensor type " + std::to_string(type) + " is not supported; known: 1 (F16), 0 (F32), 8 (Q8_0)",
          "kv_type");
  }
}

}  // namespace pe
