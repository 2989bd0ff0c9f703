// Entry for coverage-guided fuzzing of the reader (libFuzzer, or any driver that calls it). Not part of the library.
//   clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -Icsrc csrc/gguf/*.cc csrc/base/*.cc -o gguf_fuzz
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string_view>

#include "base/error.h"
#include "base/text.h"
#include "gguf/reader.h"

namespace {

volatile uint64_t sink;  // keeps the reads of touch()

void require(bool holds) {
  if (!holds) std::abort();
}

// Touches every byte the reader vouches for, so that a sanitizer sees a wrong bound.
uint64_t touch(const pe::gguf::File& file) {
  uint64_t sum = 0;
  for (const pe::gguf::Value& value : file.values()) {
    require(file.find(value.key) == &value);
    if (value.element_type == pe::gguf::ValueType::kString && value.type == pe::gguf::ValueType::kArray) {
      pe::gguf::StringCursor strings(value);
      for (uint64_t i = 0; i < value.count; ++i) {
        for (const char c : strings.next()) sum += static_cast<unsigned char>(c);
      }
    }
    for (uint64_t i = 0; i < value.size; ++i) sum += value.data[i];
  }
  for (const pe::gguf::TensorInfo& tensor : file.tensors()) {
    require(file.find_tensor(tensor.name) == &tensor);
    for (uint64_t i = 0; i < tensor.size; ++i) sum += tensor.data[i];
  }
  return sum;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    sink = touch(*pe::gguf::File::from_memory(std::as_bytes(std::span(data, size))));
  } catch (const pe::Error& error) {
    require(error.code != nullptr && *error.code != '\0' && !error.message.empty());
    require(error.status == pe::Status::kFormat || error.status == pe::Status::kUnsupported);
    require(error.offset == pe::kNoOffset || error.offset <= size);
    require(pe::printable(error.message, error.message.size()) == error.message);
  }
  return 0;
}
