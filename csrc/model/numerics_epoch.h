#pragma once

#include <cstdint>

namespace pe {

// Bumped whenever any logit of any file may change; docs/numerics.md keeps the history.
inline constexpr uint32_t kNumericsEpoch = 1;

}  // namespace pe
