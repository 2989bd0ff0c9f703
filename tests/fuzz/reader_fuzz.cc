// Coverage-guided fuzzing, from the bytes of a GGUF file to a planned model ("make fuzz TARGET=reader").
#include <cstddef>
#include <cstdint>

#include "../hostile/judge.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  hostile::answer(size, size, false, [&] { return pe::gguf::File::from_memory(bytes); });
  return 0;
}
