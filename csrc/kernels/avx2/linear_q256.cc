#include "kernels/tiers.h"

namespace pe {

void avx2_linear_q256(KernelTable*) {}

}  // namespace pe
