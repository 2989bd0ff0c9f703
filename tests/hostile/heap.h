// Bytes of heap that the program holds, and the most it held: from the sanitizer's hooks, or from a malloc of our own
// where glibc allows one. Include it in one source file of a program.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PE_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define PE_ASAN 1
#endif

namespace hostile::heap {

inline std::atomic<int64_t> live{0}, peak{0};

inline void add(int64_t bytes) {
  const int64_t now = live.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  int64_t seen = peak.load(std::memory_order_relaxed);
  while (now > seen && !peak.compare_exchange_weak(seen, now, std::memory_order_relaxed)) {
  }
}

inline void forget_peak() { peak.store(live.load(std::memory_order_relaxed), std::memory_order_relaxed); }

}  // namespace hostile::heap

#ifdef PE_ASAN

extern "C" {  // as sanitizer/allocator_interface.h, which not every compiler's package has
int __sanitizer_install_malloc_and_free_hooks(void (*on_malloc)(const volatile void*, size_t),
                                              void (*on_free)(const volatile void*));
size_t __sanitizer_get_allocated_size(const volatile void* p);
}

namespace hostile::heap {

inline const bool counted = __sanitizer_install_malloc_and_free_hooks(
                                [](const volatile void*, size_t size) { add(static_cast<int64_t>(size)); },
                                [](const volatile void* p) {
                                  if (p) add(-static_cast<int64_t>(__sanitizer_get_allocated_size(p)));
                                }) != 0;

}  // namespace hostile::heap

#elif defined(__GLIBC__) && !defined(__SANITIZE_THREAD__)

#include <errno.h>
#include <malloc.h>

namespace hostile::heap {
inline constexpr bool counted = true;
inline void* added(void* p) {
  if (p) add(static_cast<int64_t>(malloc_usable_size(p)));
  return p;
}
}  // namespace hostile::heap

extern "C" {
void* __libc_malloc(size_t n);
void* __libc_calloc(size_t n, size_t size);
void* __libc_realloc(void* p, size_t n);
void* __libc_memalign(size_t alignment, size_t n);
void __libc_free(void* p);

void* malloc(size_t n) { return hostile::heap::added(__libc_malloc(n)); }
void* calloc(size_t n, size_t size) { return hostile::heap::added(__libc_calloc(n, size)); }
void* realloc(void* p, size_t n) {
  const int64_t before = p ? static_cast<int64_t>(malloc_usable_size(p)) : 0;
  void* out = __libc_realloc(p, n);
  if (out || n == 0) hostile::heap::add(-before);
  return hostile::heap::added(out);
}
void* aligned_alloc(size_t alignment, size_t n) { return hostile::heap::added(__libc_memalign(alignment, n)); }
void* memalign(size_t alignment, size_t n) { return hostile::heap::added(__libc_memalign(alignment, n)); }
int posix_memalign(void** out, size_t alignment, size_t n) {
  *out = hostile::heap::added(__libc_memalign(alignment, n));
  return *out ? 0 : ENOMEM;
}
void free(void* p) {
  if (p) hostile::heap::add(-static_cast<int64_t>(malloc_usable_size(p)));
  __libc_free(p);
}
}

#else

namespace hostile::heap {
inline constexpr bool counted = false;
}

#endif
