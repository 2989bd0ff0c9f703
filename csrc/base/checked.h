// Arithmetic on sizes that come from a file: the result, or false on overflow. Nothing else may add or multiply them.
#pragma once

#include <bit>
#include <cstdint>

namespace pe {

[[nodiscard]] inline bool checked_add(uint64_t a, uint64_t b, uint64_t* out) {
#if defined(__GNUC__)
  return !__builtin_add_overflow(a, b, out);
#else
  *out = a + b;
  return *out >= a;
#endif
}

[[nodiscard]] inline bool checked_mul(uint64_t a, uint64_t b, uint64_t* out) {
#if defined(__GNUC__)
  return !__builtin_mul_overflow(a, b, out);
#else
  *out = a * b;
  return a == 0 || *out / a == b;
#endif
}

// The next multiple of `alignment`, a power of two.
[[nodiscard]] inline bool checked_align(uint64_t a, uint64_t alignment, uint64_t* out) {
  if (!std::has_single_bit(alignment) || !checked_add(a, alignment - 1, out)) return false;
  *out &= ~(alignment - 1);
  return true;
}

}  // namespace pe
