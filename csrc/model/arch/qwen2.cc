// Qwen2, Qwen2.5, R1-Distill-Qwen: Llama's block with biases on Q, K and V.
#include "model/arch/archs.h"

namespace pe {

const ArchSpec kQwen2 = {
    .name = "qwen2",
    .adjacent_rope = false,
    .qkv_bias = ArchSpec::Presence::kRequired,
    .out_bias = ArchSpec::Presence::kNever,
    .qk_norm = ArchSpec::Presence::kNever,
};

}  // namespace pe
