// Which kernels run: tables are filled with the scalar kernels and overlaid tier by tier.
#include <cstdlib>
#include <string>

#include "base/cpu_features.h"
#include "kernels/kernels.h"
#include "kernels/tiers.h"

namespace pe {
namespace {

constexpr const char* kTierNames[kTiers] = {"scalar", "avx2", "avx512"};

struct Tables {
  KernelTable table[kTiers] = {};
  bool available[kTiers] = {};

  Tables() {
    KernelTable kernels{};
    scalar_linear(&kernels);
    scalar_ops(&kernels);
    scalar_attention(&kernels);
    scalar_quantise(&kernels);
    set(Tier::kScalar, kernels);
#ifdef PE_HAVE_AVX2
    if (cpu_features().avx2) {
      avx2_linear_act(&kernels);
      avx2_linear_float(&kernels);
      avx2_linear_q32(&kernels);
      avx2_linear_q256(&kernels);
      avx2_linear_q5(&kernels);
      avx2_linear_q23k(&kernels);
      avx2_linear_iq4(&kernels);
      avx2_linear_iq(&kernels);
      avx2_ops(&kernels);
      avx2_attention(&kernels);
      avx2_quantise(&kernels);
      avx2_dequantise(&kernels);
      set(Tier::kAvx2, kernels);
    }
#endif
#ifdef PE_HAVE_AVX512
    if (cpu_features().avx512) {
      avx512_linear_q32(&kernels);
      avx512_linear_q256(&kernels);
      avx512_attention(&kernels);
      avx512_quantise(&kernels);
      avx512_dequantise(&kernels);
      set(Tier::kAvx512, kernels);
    }
#endif
  }

  void set(Tier tier, const KernelTable& kernels) {
    table[static_cast<int>(tier)] = kernels;
    available[static_cast<int>(tier)] = true;
  }
};

const Tables& tables() {
  static const Tables all;
  return all;
}

struct Choice {
  const KernelTable* kernels = nullptr;
  Tier tier = Tier::kScalar;
  std::string wanted;  // PYENGINE_ISA, "" when unset
};

Choice choose() {
  Choice choice;
  const char* name = std::getenv("PYENGINE_ISA");
  if (name != nullptr) choice.wanted = name;
  for (int i = 0; i < kTiers; ++i) {
    const Tier tier = static_cast<Tier>(i);
    if (!tier_available(tier)) continue;
    if (!choice.wanted.empty() && choice.wanted != kTierNames[i]) continue;
    choice.kernels = kernels_for(tier);
    choice.tier = tier;
  }
  return choice;
}

}  // namespace

const char* tier_name(Tier tier) { return kTierNames[static_cast<int>(tier)]; }

bool tier_available(Tier tier) { return tables().available[static_cast<int>(tier)]; }

const KernelTable* kernels_for(Tier tier) {
  return tier_available(tier) ? &tables().table[static_cast<int>(tier)] : nullptr;
}

const KernelTable* kernels_active(Tier* tier, const char** wanted) {
  static const Choice choice = choose();
  if (choice.kernels == nullptr) {
    *wanted = choice.wanted.c_str();
  } else {
    *tier = choice.tier;
  }
  return choice.kernels;
}

}  // namespace pe
