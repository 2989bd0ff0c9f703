// All architectures. To add one: a file with its descriptor beside this header, a line here and one in registry.cc.
#pragma once

#include "model/config.h"

namespace pe {

extern const ArchSpec kLlama;
extern const ArchSpec kQwen2;
extern const ArchSpec kQwen3;

}  // namespace pe
