#include "kernels/dequantise.h"

#include "kernels/tiers.h"

namespace pe {

void avx2_dequantise(KernelTable* table) { set_dequantisers(table); }

}  // namespace pe
