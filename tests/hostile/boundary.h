// 48 integers on both sides of every limit that arithmetic or the reader knows.
#pragma once

#include <cstdint>
#include <vector>

namespace hostile {

inline std::vector<uint64_t> boundary_integers() {
  std::vector<uint64_t> out = {0, 1, 2, 3, 12, 13, 24, 33};
  for (const int bit : {7, 8, 15, 16, 22, 24, 28, 31, 32, 40, 62, 63}) {
    const uint64_t power = uint64_t{1} << bit;
    out.insert(out.end(), {power - 1, power, power + 1});
  }
  out.insert(out.end(), {UINT64_MAX, UINT64_MAX - 1, UINT64_MAX - 7, UINT64_MAX - 31});
  return out;
}

}  // namespace hostile
