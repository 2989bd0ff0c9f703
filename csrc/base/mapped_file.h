// A file to read: by position, as a mapping, or as a private copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "base/aligned_buffer.h"
#include "base/file_guard.h"

namespace pe {

// A regular, non-empty file that is open for reading. Its size is fixed when it is opened; if the file is found shorter
// later, read_at and copy fail with "file_changed". Reading through map() after something else truncated the file is
// SIGBUS, as with any mapping; copy() is the safe way, and guard_mapped_files() (file_guard.h) the other one.
class MappedFile {
 public:
  // Called with 0..1 while copying; returning true stops it with Error(kCancelled).
  using Progress = std::function<bool(float)>;

  // `path` is UTF-8. Never blocks on a FIFO or device. Codes: file_not_found, permission_denied, is_directory,
  // not_regular_file, empty_file, bad_path, io_error.
  static MappedFile open(const std::string& path);
  // The caller's memory as if it were a file; it must outlive the object.
  static MappedFile borrow(std::span<const std::byte> bytes);

  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  uint64_t size() const { return size_; }
  // The whole file after map() or borrow(), its first bytes after copy(), NULL otherwise.
  const std::byte* data() const { return data_; }

  // The pages map() made, empty without it.
  std::span<const std::byte> mapping() const { return {data_, mapped_ ? static_cast<size_t>(size_) : 0}; }

  // Exactly n bytes from `offset`; the range must be inside the file.
  void read_at(uint64_t offset, void* dst, size_t n) const;
  // Makes data() the file's pages, shared and read-only.
  void map();
  // Makes data() a private copy of bytes 0..end.
  void copy(uint64_t end, const Progress& progress = {});
  // Gives the file handle back, unless a guarded mapping is watched through it; data() stays. read_at, map and copy need
  // the handle.
  void close_handle() noexcept;
  // Whether a guarded mapping is no longer what was opened: its pages went, or the file has been written to since.
  // What was read before the call is sound when the answer is no. Always no for files that are not guarded.
  bool changed() const;

 private:
  MappedFile() = default;

  uint64_t size_ = 0;
  int64_t modified_ = 0;  // when it was opened, in nanoseconds
  const std::byte* data_ = nullptr;
  bool borrowed_ = false;
  bool mapped_ = false;
  intptr_t handle_ = -1;  // a file descriptor, or a Windows HANDLE
  AlignedBuffer copy_;
  GuardedRange* guarded_ = nullptr;
};

}  // namespace pe
