#include "base/mapped_file.h"

#include <algorithm>
#include <cstring>
#include <system_error>
#include <utility>

#include "base/error.h"
#include "base/text.h"

#ifdef _WIN32
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#endif

namespace pe {
namespace {

constexpr size_t kReadStep = size_t{16} << 20;  // bytes between two looks at the progress callback

[[noreturn]] void fail_io(const char* code, const std::string& message, uint64_t offset = kNoOffset) {
  throw Error(Status::kIo, code, message, {}, offset);
}

[[noreturn]] void fail_changed(uint64_t offset) {
  fail_io("file_changed", "the file became shorter while it was being read: something else is writing to it", offset);
}

std::string reason(int error) { return printable(std::system_category().message(error)); }

size_t to_size(uint64_t bytes) {
  if (bytes > SIZE_MAX) {
    throw Error(Status::kMemory, "out_of_memory", human_bytes(bytes) + " do not fit into this machine's address space");
  }
  return static_cast<size_t>(bytes);
}

// What the two operating systems have in common. open_file gives the handle and the size, or throws.
struct Opened {
  intptr_t handle;
  uint64_t size;
  int64_t modified;  // nanoseconds
};

#ifdef _WIN32

std::wstring widen(const std::string& text) {
  const int length = static_cast<int>(text.size());
  const int wide = MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, text.data(), length, nullptr, 0);
  if (wide <= 0) throw Error(Status::kArgument, "bad_path", "the path is not valid UTF-8");
  std::wstring out(static_cast<size_t>(wide), L'\0');
  MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, text.data(), length, out.data(), wide);
  return out;
}

HANDLE as_handle(intptr_t handle) { return reinterpret_cast<HANDLE>(handle); }

void close_file(intptr_t handle) { CloseHandle(as_handle(handle)); }

Opened open_file(const std::string& path) {
  const std::string shown = printable(path);
  const std::wstring wide = widen(path);
  const DWORD attributes = GetFileAttributesW(wide.c_str());
  if (attributes != INVALID_FILE_ATTRIBUTES && (attributes & FILE_ATTRIBUTE_DIRECTORY)) {
    fail_io("is_directory", "'" + shown + "' is a directory, not a file");
  }
  const DWORD share = FILE_SHARE_READ | FILE_SHARE_DELETE;
  const HANDLE file =
      CreateFileW(wide.c_str(), GENERIC_READ, share, nullptr, OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, nullptr);
  if (file == INVALID_HANDLE_VALUE) {
    const DWORD error = GetLastError();
    if (error == ERROR_FILE_NOT_FOUND || error == ERROR_PATH_NOT_FOUND) {
      fail_io("file_not_found", "there is no file '" + shown + "'");
    }
    if (error == ERROR_ACCESS_DENIED) fail_io("permission_denied", "no permission to read '" + shown + "'");
    fail_io("io_error", "'" + shown + "' cannot be opened: " + reason(static_cast<int>(error)));
  }
  const auto handle = reinterpret_cast<intptr_t>(file);
  LARGE_INTEGER size;
  if (GetFileType(file) != FILE_TYPE_DISK || !GetFileSizeEx(file, &size)) {
    close_file(handle);
    fail_io("not_regular_file", "'" + shown + "' is not a regular file");
  }
  return {handle, static_cast<uint64_t>(size.QuadPart), 0};
}

// Bytes read, 0 at the end of the file.
size_t read_some(intptr_t handle, uint64_t offset, void* dst, size_t n) {
  OVERLAPPED at{};
  at.Offset = static_cast<DWORD>(offset);
  at.OffsetHigh = static_cast<DWORD>(offset >> 32);
  DWORD got = 0;
  if (!ReadFile(as_handle(handle), dst, static_cast<DWORD>(std::min(n, kReadStep)), &got, &at)) {
    const DWORD error = GetLastError();
    if (error == ERROR_HANDLE_EOF) return 0;
    fail_io("io_error", "reading the file failed: " + reason(static_cast<int>(error)), offset);
  }
  return got;
}

const std::byte* map_file(intptr_t handle, size_t) {
  const HANDLE mapping = CreateFileMappingW(as_handle(handle), nullptr, PAGE_READONLY, 0, 0, nullptr);
  const void* view = mapping ? MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0) : nullptr;
  const auto error = static_cast<int>(GetLastError());
  if (mapping) CloseHandle(mapping);  // the view keeps it alive
  if (!view) fail_io("io_error", "the file cannot be mapped into memory: " + reason(error));
  return static_cast<const std::byte*>(view);
}

void unmap_file(const std::byte* data, size_t) { UnmapViewOfFile(data); }

bool is_as_opened(intptr_t, uint64_t, int64_t) { return true; }  // nobody can write to it

#else

void close_file(intptr_t handle) { ::close(static_cast<int>(handle)); }

int64_t modified_ns(const struct stat& info) {
#ifdef __APPLE__
  const timespec& time = info.st_mtimespec;
#else
  const timespec& time = info.st_mtim;
#endif
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

Opened open_file(const std::string& path) {
  const std::string shown = printable(path);
  int fd;
  do {  // O_NONBLOCK: opening a FIFO must not wait for a writer
    fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0) {
    const int error = errno;
    if (error == ENOENT || error == ENOTDIR) fail_io("file_not_found", "there is no file '" + shown + "'");
    if (error == EACCES || error == EPERM) fail_io("permission_denied", "no permission to read '" + shown + "'");
    if (error == ENXIO || error == ENODEV) fail_io("not_regular_file", "'" + shown + "' is not a regular file");
    fail_io("io_error", "'" + shown + "' cannot be opened: " + reason(error));
  }
  struct stat info;
  const int failed = ::fstat(fd, &info) == 0 ? 0 : errno;
  if (failed || !S_ISREG(info.st_mode)) {
    ::close(fd);
    if (failed) fail_io("io_error", "'" + shown + "' cannot be examined: " + reason(failed));
    if (S_ISDIR(info.st_mode)) fail_io("is_directory", "'" + shown + "' is a directory, not a file");
    fail_io("not_regular_file", "'" + shown + "' is a pipe, socket or device, not a regular file");
  }
  return {fd, static_cast<uint64_t>(info.st_size), modified_ns(info)};
}

// Bytes read, 0 at the end of the file.
size_t read_some(intptr_t handle, uint64_t offset, void* dst, size_t n) {
  ssize_t got;
  do {
    got = ::pread(static_cast<int>(handle), dst, std::min(n, kReadStep), static_cast<off_t>(offset));
  } while (got < 0 && errno == EINTR);
  if (got < 0) fail_io("io_error", "reading the file failed: " + reason(errno), offset);
  return static_cast<size_t>(got);
}

const std::byte* map_file(intptr_t handle, size_t size) {
  void* pages = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, static_cast<int>(handle), 0);
  if (pages == MAP_FAILED) fail_io("io_error", "the file cannot be mapped into memory: " + reason(errno));
  return static_cast<const std::byte*>(pages);
}

void unmap_file(const std::byte* data, size_t size) { ::munmap(const_cast<std::byte*>(data), size); }

bool is_as_opened(intptr_t handle, uint64_t size, int64_t modified) {
  struct stat now;
  return ::fstat(static_cast<int>(handle), &now) == 0 && static_cast<uint64_t>(now.st_size) == size &&
         modified_ns(now) == modified;
}

#endif

}  // namespace

MappedFile MappedFile::open(const std::string& path) {
  if (path.empty() || path.find('\0') != std::string::npos) {
    throw Error(Status::kArgument, "bad_path", "a path must not be empty or contain a zero byte");
  }
  const Opened opened = open_file(path);
  MappedFile file;
  file.handle_ = opened.handle;
  file.size_ = opened.size;
  file.modified_ = opened.modified;
  if (file.size_ == 0) {
    throw Error(Status::kFormat, "empty_file", "'" + printable(path) + "' is empty: download it again", {}, 0);
  }
  return file;
}

MappedFile MappedFile::borrow(std::span<const std::byte> bytes) {
  if (bytes.empty()) throw Error(Status::kFormat, "empty_file", "there are no bytes to read", {}, 0);
  MappedFile file;
  file.borrowed_ = true;
  file.data_ = bytes.data();
  file.size_ = bytes.size();
  return file;
}

MappedFile::MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(size_, other.size_);
  std::swap(modified_, other.modified_);
  std::swap(data_, other.data_);
  std::swap(borrowed_, other.borrowed_);
  std::swap(mapped_, other.mapped_);
  std::swap(handle_, other.handle_);
  std::swap(copy_, other.copy_);
  std::swap(guarded_, other.guarded_);
  return *this;
}

MappedFile::~MappedFile() {
  if (guarded_) release_range(guarded_);
  guarded_ = nullptr;
  if (mapped_) unmap_file(data_, static_cast<size_t>(size_));
  close_handle();
}

bool MappedFile::changed() const {
  return guarded_ && (range_lost(*guarded_) || !is_as_opened(handle_, size_, modified_));
}

void MappedFile::close_handle() noexcept {
  if (guarded_) return;
  if (handle_ != -1) close_file(handle_);
  handle_ = -1;
}

void MappedFile::read_at(uint64_t offset, void* dst, size_t n) const {
  if (offset > size_ || n > size_ - offset) {
    throw Error(Status::kInternal, "read_outside_file", "a read outside the file was asked for", {}, offset);
  }
  if (borrowed_) {
    std::memcpy(dst, data_ + offset, n);
    return;
  }
  auto* out = static_cast<std::byte*>(dst);
  while (n > 0) {
    const size_t got = read_some(handle_, offset, out, n);
    if (got == 0) fail_changed(offset);
    out += got;
    offset += got;
    n -= got;
  }
}

void MappedFile::map() {
  if (data_) return;
  data_ = map_file(handle_, to_size(size_));
  mapped_ = true;
  if (mapped_files_guarded()) guarded_ = guard_range(data_, static_cast<size_t>(size_));
}

void MappedFile::copy(uint64_t end, const Progress& progress) {
  if (data_) return;
  const size_t total = to_size(end);
  AlignedBuffer bytes(total);
  for (size_t done = 0; done < total;) {
    if (progress && progress(static_cast<float>(done) / static_cast<float>(total))) {
      throw Error(Status::kCancelled, "cancelled", "loading was stopped");
    }
    const size_t step = std::min(total - done, kReadStep);
    read_at(done, bytes.data() + done, step);
    done += step;
  }
  copy_ = std::move(bytes);
  data_ = copy_.data();
}

}  // namespace pe
