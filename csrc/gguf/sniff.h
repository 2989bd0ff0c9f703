// What a file that is no GGUF probably is.
#pragma once

#include <cstdint>
#include <span>

namespace pe::gguf {

struct Sniffed {
  const char* code;     // a code of docs/errors.md
  const char* message;  // a sentence that says what to do
};

// `head`: the first bytes of the file (512 are enough), which do not begin with the GGUF magic.
Sniffed sniff(std::span<const uint8_t> head);

}  // namespace pe::gguf
