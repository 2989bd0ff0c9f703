// What keeps arrays of registers in registers: loops over them unrolled (or, where code would outgrow the
// processor's buffers, kept as loops), functions around them inlined, or alone.
#pragma once

#if defined(__GNUC__)
#define PE_UNROLL _Pragma("GCC unroll 16")
#define PE_LOOP _Pragma("GCC unroll 1")
#define PE_INLINE inline __attribute__((always_inline))
#define PE_NOINLINE __attribute__((noinline))
#else
#define PE_UNROLL
#define PE_LOOP
#define PE_INLINE __forceinline
#define PE_NOINLINE __declspec(noinline)
#endif
