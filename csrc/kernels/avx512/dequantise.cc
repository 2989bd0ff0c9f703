#include "kernels/dequantise.h"

#include "kernels/tiers.h"

namespace pe {

void avx512_dequantise(KernelTable* table) { set_dequantisers(table); }

}  // namespace pe
