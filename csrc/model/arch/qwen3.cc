// Qwen3 (dense), R1-0528-Qwen3-8B: RMS norms over each query and key head, explicit head size.
#include "model/arch/archs.h"

namespace pe {

const ArchSpec kQwen3 = {
    .name = "qwen3",
    .adjacent_rope = false,
    .qkv_bias =
        ArchSpec::Presence::kOptional,  // attention_bias exists in the configuration, published models leave it off
    .out_bias = ArchSpec::Presence::kOptional,
    .qk_norm = ArchSpec::Presence::kRequired,
};

}  // namespace pe
