// Memory for weights, caches and scratch.
#pragma once

#include <cstddef>
#include <utility>

namespace pe {

// Owns `size` bytes, 64-byte aligned; from 2 MiB on they come straight from the operating system, aligned to 2 MiB and
// offered to it for huge pages, so that zeroed memory costs nothing until touched. Failure is Error(kMemory).
class AlignedBuffer {
 public:
  enum class Fill { kNone, kZero };

  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t size, Fill fill = Fill::kNone);
  ~AlignedBuffer() { release(); }
  AlignedBuffer(AlignedBuffer&& other) noexcept { *this = std::move(other); }
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  std::byte* data() { return data_; }
  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }
  template <class T>
  const T* as() const {
    return reinterpret_cast<const T*>(data_);
  }

 private:
  void release() noexcept;

  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace pe
