// The entries of the tiers: each object in a tier's folder defines exactly one of these functions, and it overwrites
// its part of the table. Only dispatch.cc calls them.
#pragma once

#include "kernels/kernels.h"

namespace pe {

void scalar_linear(KernelTable* table);     // linear, dequantise, quantise_act
void scalar_ops(KernelTable* table);        // norms, rope, element-wise
void scalar_attention(KernelTable* table);  // KV cache and attention
void scalar_quantise(KernelTable* table);

void avx2_linear_act(KernelTable* table);    // quantise_act
void avx2_linear_float(KernelTable* table);  // F32, F16, BF16
void avx2_linear_q32(KernelTable* table);    // Q4_0, Q8_0
void avx2_linear_q256(KernelTable* table);   // Q4_K, Q5_K, Q6_K
void avx2_linear_q5(KernelTable* table);     // Q4_1, Q5_0, Q5_1, MXFP4
void avx2_linear_q23k(KernelTable* table);   // Q2_K, Q3_K
void avx2_linear_iq4(KernelTable* table);    // IQ4_NL, IQ4_XS
void avx2_linear_iq(KernelTable* table);     // IQ1_S .. IQ3_S, TQ1_0, TQ2_0
void avx2_ops(KernelTable* table);
void avx2_attention(KernelTable* table);
void avx2_quantise(KernelTable* table);
void avx2_dequantise(KernelTable* table);

void avx512_linear_q32(KernelTable* table);   // Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL
void avx512_linear_q256(KernelTable* table);  // Q2_K .. Q6_K, IQ4_XS
void avx512_attention(KernelTable* table);
void avx512_quantise(KernelTable* table);
void avx512_dequantise(KernelTable* table);

}  // namespace pe
