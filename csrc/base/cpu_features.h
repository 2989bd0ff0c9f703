// What the processor can do and the operating system lets it do.
#pragma once

namespace pe {

struct CpuFeatures {
  bool avx2 = false;    // AVX2, FMA and F16C, with the operating system saving the 256-bit registers
  bool avx512 = false;  // also AVX-512 F, BW, DQ, VL and VNNI, with the mask and 512-bit registers saved
};

// Asked once; the same answer for the life of the process.
const CpuFeatures& cpu_features();

}  // namespace pe
