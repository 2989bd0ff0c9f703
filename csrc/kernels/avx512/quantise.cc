#include "kernels/quantise.h"

#include "kernels/tiers.h"

namespace pe {

void avx512_quantise(KernelTable* table) { set_quantisers(table); }

}  // namespace pe
