// Llama 2 and 3, R1-Distill-Llama, and every model of exactly that shape (Mistral 7B v0.2+, SmolLM, TinyLlama ...).
#include "model/arch/archs.h"

namespace pe {

const ArchSpec kLlama = {
    .name = "llama",
    .adjacent_rope = true,  // the converters permute the rows of Q and K
    .qkv_bias = ArchSpec::Presence::kOptional,
    .out_bias = ArchSpec::Presence::kOptional,
    .qk_norm = ArchSpec::Presence::kNever,
};

}  // namespace pe
