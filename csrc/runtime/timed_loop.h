// How the loops of limits.cc and of benchmarks/limits.cc are written: x86-64, GNU syntax.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define PE_TIMED_LOOPS 1

// clang-format off
#define X4(r) r(0) r(1) r(2) r(3)
#define X8(r) X4(r) r(4) r(5) r(6) r(7)
#define X12(r) X8(r) r(8) r(9) r(10) r(11)
#define PE_CLOBBERS "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
                    "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
#define PE_CLEAR(r) "vpxor %%xmm" #r ", %%xmm" #r ", %%xmm" #r "\n"
// void name(n, memory): registers cleared, then body n times. %[m]: the memory.
#define PE_LOOP(name, body)                                                                                        \
  void name(long n, void* m) {                                                                                     \
    __asm__ volatile(X12(PE_CLEAR) PE_CLEAR(12) PE_CLEAR(13) PE_CLEAR(14) PE_CLEAR(15) ".p2align 6\n 1:\n" body    \
                     "dec %[n]\n jnz 1b\n vzeroupper\n" : [n] "+r"(n) : [m] "r"(m) : PE_CLOBBERS);                 \
  }
// clang-format on

#endif
