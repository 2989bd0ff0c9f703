#include "gguf/types.h"

namespace pe::gguf {
namespace {

constexpr TensorType kTypes[] = {
#define PE_FORMAT(name, id, block, bytes, partner) {id, #name, block, bytes, true},
#include "quant/formats.def"
#undef PE_FORMAT
#define PE_OTHER_TYPE(name, id, block, bytes) {id, #name, block, bytes, false},
#define PE_REMOVED_TYPE(name, id)
#include "gguf/types.def"
#undef PE_OTHER_TYPE
#undef PE_REMOVED_TYPE
};

struct RemovedType {
  uint32_t id;
  const char* name;
};

constexpr RemovedType kRemoved[] = {
#define PE_OTHER_TYPE(name, id, block, bytes)
#define PE_REMOVED_TYPE(name, id) {id, #name},
#include "gguf/types.def"
#undef PE_OTHER_TYPE
#undef PE_REMOVED_TYPE
};

}  // namespace

const TensorType* find_type(uint32_t id) {
  for (const TensorType& type : kTypes) {
    if (type.id == id) return &type;
  }
  return nullptr;
}

const char* removed_type_name(uint32_t id) {
  for (const RemovedType& type : kRemoved) {
    if (type.id == id) return type.name;
  }
  return nullptr;
}

std::string type_name(uint32_t id) {
  if (const TensorType* type = find_type(id)) return type->name;
  if (const char* name = removed_type_name(id)) return name;
  return "type " + std::to_string(id);
}

std::string runnable_types() {
  std::string out;
  for (const TensorType& type : kTypes) {
    if (!type.runnable) continue;
    if (!out.empty()) out += ", ";
    out += type.name;
  }
  return out;
}

}  // namespace pe::gguf
