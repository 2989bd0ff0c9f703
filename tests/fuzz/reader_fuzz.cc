// Coverage-guided fuzzing, from the bytes of a GGUF file to a planned model ("make fuzz TARGET=reader"). What is mutated
// is the header and the beginning of the weights: inputs of even length are followed by zeros for the rest of them.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../hostile/judge.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static constexpr size_t kWeights = 128 << 10;  // more than the small models of tests/hostile have
  static std::vector<uint8_t> file;
  file.assign(data, data + size);
  if (size % 2 == 0) file.resize(size + kWeights);
  file.shrink_to_fit();  // so that a sanitizer sees the first byte read past it
  const auto bytes = std::as_bytes(std::span(file));
  hostile::answer(bytes.size(), bytes.size(), false, [&] { return pe::gguf::File::from_memory(bytes); });
  return 0;
}
