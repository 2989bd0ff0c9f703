// A fast hash that finds accidents: damage, mixed-up files, equal texts. It proves nothing against somebody who forges.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace pe {

// A bijection of `h` for each word and of `word` for each h: two inputs that differ in one word never hash alike.
inline uint64_t hash_word(uint64_t h, uint64_t word) {
  h = (h ^ word) * 0x9e3779b97f4a7c15;
  return h ^ (h >> 29);
}

// Eight bytes at a time; the length counts too.
inline uint64_t hash_bytes(uint64_t h, const void* data, size_t n) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  h = hash_word(h, n);
  uint64_t word;
  for (; n >= sizeof word; n -= sizeof word, bytes += sizeof word) {
    std::memcpy(&word, bytes, sizeof word);
    h = hash_word(h, word);
  }
  if (n) {
    word = 0;
    std::memcpy(&word, bytes, n);
    h = hash_word(h, word);
  }
  return h;
}

}  // namespace pe
