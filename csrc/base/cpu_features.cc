#include "base/cpu_features.h"

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#define PE_X86_64 1
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace pe {
namespace {

#ifdef PE_X86_64

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero for a leaf the processor does not have.
Registers cpuid(uint32_t leaf, uint32_t sub_leaf) {
  Registers r;
#ifdef _MSC_VER
  int v[4];
  __cpuid(v, 0);
  if (leaf > static_cast<uint32_t>(v[0])) return r;
  __cpuidex(v, static_cast<int>(leaf), static_cast<int>(sub_leaf));
  r = {static_cast<uint32_t>(v[0]), static_cast<uint32_t>(v[1]), static_cast<uint32_t>(v[2]),
       static_cast<uint32_t>(v[3])};
#else
  __get_cpuid_count(leaf, sub_leaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

// Extended control register 0: the register states the operating system saves. Only to be asked when OSXSAVE is set.
uint64_t xcr0() {
#ifdef _MSC_VER
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low | static_cast<uint64_t>(high) << 32;
#endif
}

CpuFeatures detect() {
  constexpr uint32_t kFma = 1u << 12, kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;  // leaf 1, ecx
  constexpr uint32_t kAvx2 = 1u << 5;                                                          // leaf 7, ebx
  constexpr uint32_t kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;                      // F, DQ, BW, VL: ebx
  constexpr uint32_t kVnni = 1u << 11;                                                         // leaf 7, ecx
  constexpr uint64_t kYmmState = 6;                                                            // xmm and upper ymm
  constexpr uint64_t kZmmState = kYmmState | 0xe0;  // and masks, upper halves of zmm 0-15, zmm 16-31
  constexpr uint32_t kNeeded = kFma | kOsxsave | kAvx | kF16c;
  CpuFeatures f;
  if ((cpuid(1, 0).ecx & kNeeded) != kNeeded) return f;
  if ((xcr0() & kYmmState) != kYmmState) return f;
  const Registers leaf7 = cpuid(7, 0);
  f.avx2 = (leaf7.ebx & kAvx2) != 0;
  f.avx512 =
      f.avx2 && (leaf7.ebx & kAvx512) == kAvx512 && (leaf7.ecx & kVnni) != 0 && (xcr0() & kZmmState) == kZmmState;
  return f;
}

#else

CpuFeatures detect() { return {}; }

#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

}  // namespace pe
