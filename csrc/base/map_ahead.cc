#include "base/map_ahead.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <utility>

#include "base/process.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pe {

namespace {

// Bytes a call, which the destructor waits for. With 2 or 32 MiB files come from the disk more slowly (docs/performance.md).
constexpr size_t kPiece = size_t{8} << 20;
constexpr size_t kPage = 4096;  // the smallest

#if defined(__linux__)

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14
#endif

// False where the system has no such call, and where the file became shorter or cannot be read.
bool map(const std::byte* p, size_t n) { return madvise(const_cast<std::byte*>(p), n, MADV_POPULATE_READ) == 0; }

// Whether all of it is in memory. The system says yes too where it does not tell: of files of other users.
bool is_resident(const std::byte* p, size_t n) {
  unsigned char pages[kPiece / kPage];
  const size_t count = (n + kPage - 1) / kPage;  // bytes written, or fewer where pages are larger
  std::fill_n(pages, count, 1);
  if (mincore(const_cast<std::byte*>(p), n, pages) != 0) return true;
  return std::all_of(pages, pages + count, [](unsigned char page) { return (page & 1) != 0; });
}

#else

bool map(const std::byte*, size_t) { return false; }
bool is_resident(const std::byte*, size_t) { return true; }

#endif

}  // namespace

struct MapAhead::Walk {
  std::vector<std::span<const std::byte>> ranges;
  const int64_t process = process_id();
  std::atomic<bool> stop{false};
  std::thread thread;

  // A file larger than memory pushes out its own beginning: where an earlier piece is gone, going on does harm.
  void run() const noexcept {
    for (const std::span<const std::byte> range : ranges) {
      const auto piece = [range](size_t i) {
        return range.subspan(i * kPiece).first(std::min(kPiece, range.size() - i * kPiece));
      };
      for (size_t i = 0; i * kPiece < range.size(); ++i) {
        if (stop.load(std::memory_order_relaxed)) return;
        const auto next = piece(i), earlier = piece(i / 4);
        if (i > 0 && !is_resident(earlier.data(), earlier.size())) return;
        if (!map(next.data(), next.size())) return;
      }
    }
  }
};

MapAhead::MapAhead(std::vector<std::span<const std::byte>> ranges) noexcept {
  size_t bytes = 0;
  for (const auto range : ranges) bytes += range.size();
  if (bytes < kWorthwhile) return;
  try {
    auto walk = std::make_unique<Walk>();
    walk->ranges = std::move(ranges);
    const SignalsBlocked blocked;
    walk->thread = std::thread([w = walk.get()] { w->run(); });
    walk_ = std::move(walk);
  } catch (const std::exception&) {  // pages come as they are touched
  }
}

MapAhead::~MapAhead() {
  if (!walk_) return;
  if (walk_->process != process_id()) {
    walk_.release();  // the handle of a thread that does not exist here can be neither joined nor destroyed
    return;
  }
  walk_->stop.store(true, std::memory_order_relaxed);
  walk_->thread.join();
}

}  // namespace pe
