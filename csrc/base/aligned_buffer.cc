#include "base/aligned_buffer.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "base/error.h"
#include "base/text.h"

#ifdef _WIN32
#include <malloc.h>
#else
#include <sys/mman.h>
#endif

namespace pe {
namespace {

constexpr size_t kLine = 64;
[[maybe_unused]] constexpr size_t kHuge = size_t{2} << 20;

[[noreturn]] void fail(size_t size) {
  throw Error(Status::kMemory, "out_of_memory", "not enough memory: " + human_bytes(size) + " could not be allocated");
}

size_t round_up(size_t size, size_t unit) {
  if (size > SIZE_MAX - unit) fail(size);
  return (size + unit - 1) / unit * unit;
}

#ifdef _WIN32

std::byte* allocate(size_t size, bool zero) {
  void* p = _aligned_malloc(round_up(size, kLine), kLine);
  if (p && zero) std::memset(p, 0, size);
  return static_cast<std::byte*>(p);
}

void deallocate(std::byte* p, size_t) { _aligned_free(p); }

#else

// Maps one huge page more than needed and gives back what sticks out on both sides.
std::byte* map_huge(size_t size) {
  const size_t wanted = round_up(size, kHuge);
  const size_t mapped = round_up(wanted + 1, kHuge);
  void* raw = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  auto* base = static_cast<std::byte*>(raw);
  const size_t head = (kHuge - reinterpret_cast<uintptr_t>(base) % kHuge) % kHuge;
  const size_t tail = mapped - wanted - head;
  if (head) munmap(base, head);
  if (tail) munmap(base + head + wanted, tail);
#ifdef MADV_HUGEPAGE
  madvise(base + head, wanted, MADV_HUGEPAGE);  // a wish; refusal costs only speed
#endif
  return base + head;
}

std::byte* allocate(size_t size, bool zero) {
  if (size >= kHuge) return map_huge(size);
  void* p = std::aligned_alloc(kLine, round_up(size, kLine));
  if (p && zero) std::memset(p, 0, size);
  return static_cast<std::byte*>(p);
}

void deallocate(std::byte* p, size_t size) {
  if (size >= kHuge) {
    munmap(p, round_up(size, kHuge));
  } else {
    std::free(p);
  }
}

#endif

}  // namespace

AlignedBuffer::AlignedBuffer(size_t size, Fill fill) {
  if (size == 0) return;
  data_ = allocate(size, fill == Fill::kZero);
  if (!data_) fail(size);
  size_ = size;
}

void AlignedBuffer::release() noexcept {
  if (data_) deallocate(data_, size_);
  data_ = nullptr;
  size_ = 0;
}

}  // namespace pe
