// All tensor types of the GGUF format, those this engine runs and those it only knows by name and size.
#pragma once

#include <cstdint>
#include <string>

namespace pe::gguf {

struct TensorType {
  uint32_t id;
  const char* name;
  uint32_t block_size;   // weights in a block
  uint32_t block_bytes;  // bytes of a block
  bool runnable;         // listed in quant/formats.def
};

// NULL for an id that is unknown or was removed from the format.
const TensorType* find_type(uint32_t id);
// NULL unless the id was removed from the format.
const char* removed_type_name(uint32_t id);
// "Q4_K", or "type 99" for an unknown id.
std::string type_name(uint32_t id);
// "F32, F16, Q4_0, ...": what quant/formats.def lists, for messages.
std::string runnable_types();

}  // namespace pe::gguf
