// The floating-point environment every bit of the engine depends on.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64) || defined(__SSE2__)
#include <immintrin.h>
#elif !defined(__aarch64__)
#include <cfenv>
#endif

namespace pe {

// Sets round to nearest even, denormals kept (no flush to zero, no denormals-are-zero) and all exceptions masked for
// the calling thread, and restores what the caller had, its exception flags included. Held at every entry point that
// computes and by every pool thread.
class FpEnv {
 public:
#if defined(__x86_64__) || defined(_M_X64) || defined(__SSE2__)
  FpEnv() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }  // six exception masks, nothing else
  ~FpEnv() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
  FpEnv() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}) : "memory");
  }
  ~FpEnv() { asm volatile("msr fpcr, %0" : : "r"(saved_) : "memory"); }
#else
  FpEnv() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~FpEnv() { std::fesetenv(&saved_); }
#endif
  FpEnv(const FpEnv&) = delete;
  FpEnv& operator=(const FpEnv&) = delete;

 private:
#if defined(__x86_64__) || defined(_M_X64) || defined(__SSE2__)
  uint32_t saved_;
#elif defined(__aarch64__)
  uint64_t saved_;
#else
  std::fenv_t saved_;
#endif
};

}  // namespace pe
