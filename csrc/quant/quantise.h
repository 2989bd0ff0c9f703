// The reference quantisers: float32 weights into the blocks of every format.
#pragma once

#include <cstddef>

#include "quant/formats.h"

namespace pe {

// Quantises a row of n finite weights (n a multiple of the block) into bytes_per_row(format, n) bytes at dst, which
// need no alignment. What is written always decodes to finite values. Deterministic; any thread.
//   F32, F16, BF16                        round to nearest even
//   Q4_0, Q4_1, Q5_0, Q5_1, Q8_0          byte-identical with the gguf package
//   K-quants, IQ4_NL, IQ4_XS              scales by weighted least squares
// Returns n. Otherwise the index of a weight that cannot be stored - the first that is NaN or infinite, or one so large
// that its value or its block's scale would overflow in the file - and dst holds nothing of use.
size_t quantise_row(Format format, const float* x, size_t n, void* dst);

// False for the formats that are only read: IQ1, IQ2, IQ3, TQ and MXFP4.
bool can_quantise(Format format);

}  // namespace pe
