// Entry for coverage-guided fuzzing of the reader; tests/gguf/gguf_check.cc uses it too. Not part of the library.
//   clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Icsrc
//     csrc/gguf/*.cc csrc/base/*.cc -o gguf_fuzz
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string_view>

#include "base/error.h"
#include "base/text.h"
#include "gguf/reader.h"

namespace {

volatile uint64_t sink;  // keeps the reads of touch()

void require(bool holds, const char* promise) {
  if (holds) return;
  std::fprintf(stderr, "broken promise: %s\n", promise);
  std::abort();
}

// Touches what the reader vouches for, so that a sanitizer sees a wrong bound: all metadata, both ends of every tensor.
uint64_t touch(const pe::gguf::File& file) {
  uint64_t sum = 0;
  for (const pe::gguf::Value& value : file.values()) {
    require(file.find(value.key) == &value, "every key is found");
    if (value.element_type == pe::gguf::ValueType::kString && value.type == pe::gguf::ValueType::kArray) {
      pe::gguf::StringCursor strings(value);
      for (uint64_t i = 0; i < value.count; ++i) sum += pe::valid_utf8(strings.next());
    }
    for (uint64_t i = 0; i < value.size; ++i) sum += value.data[i];
  }
  for (const pe::gguf::TensorInfo& tensor : file.tensors()) {
    require(file.find_tensor(tensor.name) == &tensor, "every tensor is found");
    require(tensor.size > 0, "no tensor is empty");
    sum += tensor.data[0];
    sum += tensor.data[tensor.size - 1];
  }
  return sum;
}

// Whether the bytes are a file; aborts when the reader breaks a promise.
bool probe(std::span<const std::byte> bytes) {
  try {
    sink = touch(*pe::gguf::File::from_memory(bytes));
    return true;
  } catch (const pe::Error& error) {
    require(error.code != nullptr && *error.code != '\0', "an error has a code");
    require(!error.message.empty(), "an error has a message");
    require(error.status == pe::Status::kFormat || error.status == pe::Status::kUnsupported, "the file is blamed");
    require(error.offset == pe::kNoOffset || error.offset <= bytes.size(), "the offset is inside the file");
    require(pe::printable(error.message, error.message.size()) == error.message, "a message is safe to print");
    require(pe::printable(error.field, error.field.size()) == error.field, "a field is safe to print");
    return false;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  probe(std::as_bytes(std::span(data, size)));
  return 0;
}
