#include "runtime/kv_cache.h"

#include <string>

#include "base/checked.h"
#include "base/error.h"

namespace pe {

namespace {

// Bytes of the keys (or values) of the whole cache, a multiple of 64.
size_t plane_bytes(const KvCache::Shape& s, size_t head_dim) {
  if (s.type == Kv::Q8_0 && head_dim % 32 != 0)
    throw Error(Status::kUnsupported, "bad_option",
                "a Q8_0 KV cache needs head dimensions that are multiples of 32; this model has one of " +
                    std::to_string(head_dim) + ": use an F16 cache",
                "kv_type");
  uint64_t n = kv_row_bytes(s.type, head_dim);
  for (const size_t factor : {s.layers, s.kv_heads, s.positions})
    if (!checked_mul(n, factor, &n)) n = UINT64_MAX / 2;
  if (n > SIZE_MAX / 4)
    throw Error(Status::kMemory, "kv_too_large", "the KV cache of this context is larger than the address space");
  return pad64(n);
}

}  // namespace

size_t KvCache::bytes(const Shape& s) { return plane_bytes(s, s.head_dim_k) + plane_bytes(s, s.head_dim_v); }

KvCache::KvCache(const Shape& shape)
    : shape_(shape),
      k_bytes_(kv_row_bytes(shape.type, shape.head_dim_k)),
      v_bytes_(kv_row_bytes(shape.type, shape.head_dim_v)),
      v_at_(plane_bytes(shape, shape.head_dim_k)),
      memory_(bytes(shape)),
      base_(memory_.as<uint8_t>()) {}

}  // namespace pe
