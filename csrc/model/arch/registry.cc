#include "model/arch/archs.h"

namespace pe {

namespace {
const ArchSpec* const kArchs[] = {&kLlama, &kQwen2, &kQwen3};
}  // namespace

const ArchSpec* find_arch(const std::string& name) {
  for (const ArchSpec* arch : kArchs)
    if (name == arch->name) return arch;
  return nullptr;
}

std::string known_archs() {
  std::string all;
  for (const ArchSpec* arch : kArchs) all += (all.empty() ? "" : ", ") + std::string(arch->name);
  return all;
}

}  // namespace pe
