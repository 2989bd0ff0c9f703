#include "runtime/map_ahead.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <string>
#include <thread>
#include <utility>

#include "base/process.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace pe {

namespace {

// Bytes read by one call, which the destructor waits for. With 2 or 32 MiB files come from the disk more slowly
// (docs/performance.md).
constexpr size_t kPiece = size_t{8} << 20;
// After each the thread steps back: mapping keeps others from changing the address space, as allocating does, and who only
// lets go of that lock and takes it again leaves it to nobody.
constexpr std::chrono::microseconds kPause{20};
// Of pieces: the one a quarter of the way back is done by then, whoever took it.
constexpr size_t kFirstLook = 64;

#if defined(__linux__)

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14
#endif

// False where the system has no such call, and where the file became shorter or cannot be read.
bool map(const std::byte* p, size_t n) { return madvise(const_cast<std::byte*>(p), n, MADV_POPULATE_READ) == 0; }

// Whether the page that holds this byte is in memory. (To ask for all pages of a piece takes as long as mapping them.) The
// system says yes too where it does not tell: of files of other users.
bool is_resident(const std::byte* p) {
  const auto size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  unsigned char page = 1;
  mincore(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p) / size * size), 1, &page);
  return (page & 1) != 0;
}

// What can be had without swapping, pages of files included, or all there could be where the system does not say. (Limits of
// control groups are left to the look back.)
size_t available_memory() {
  size_t kib = 0;
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);)
    if (std::sscanf(line.c_str(), "MemAvailable: %zu", &kib) == 1) return kib << 10;
  return SIZE_MAX;
}

#else

bool map(const std::byte*, size_t) { return false; }
bool is_resident(const std::byte*) { return true; }
size_t available_memory() { return 0; }

#endif

}  // namespace

struct MapAhead::Work {
  std::vector<std::span<const std::byte>> pieces;
  const int64_t process = process_id();
  std::atomic<size_t> next{0};
  std::atomic<bool> stop{false};
  std::thread thread;

  bool unfinished() const noexcept { return next.load(std::memory_order_relaxed) < pieces.size(); }

  bool next_is_resident() const noexcept {
    const size_t i = next.load(std::memory_order_relaxed);
    return i < pieces.size() && is_resident(&pieces[i].back());
  }

  // False when there is nothing left to do.
  bool map_next() noexcept {
    const size_t i = next.fetch_add(1, std::memory_order_relaxed);
    if (i < pieces.size()) {
      // A file larger than memory pushes out its own beginning: where an early piece is gone, going on does harm.
      const bool gone = i >= kFirstLook && !is_resident(pieces[i / 4].data());
      if (!gone && map(pieces[i].data(), pieces[i].size())) return true;
    }
    next.store(pieces.size(), std::memory_order_relaxed);
    return false;
  }

  void run() noexcept {
    while (!stop.load(std::memory_order_relaxed) && map_next()) std::this_thread::sleep_for(kPause);
  }
};

MapAhead::MapAhead(const std::vector<std::span<const std::byte>>& ranges) noexcept {
  size_t bytes = 0;
  for (const auto range : ranges) bytes += range.size();
  if (bytes < kWorthwhile) return;
  try {
    if (bytes > available_memory()) return;  // read to be pushed out before it is used
    auto work = std::make_unique<Work>();
    for (const auto range : ranges)
      for (size_t at = 0; at < range.size(); at += kPiece)
        work->pieces.push_back(range.subspan(at, std::min(kPiece, range.size() - at)));
    const SignalsBlocked blocked;
    work->thread = std::thread([w = work.get()] { w->run(); });
    work_ = std::move(work);
  } catch (const std::exception&) {  // pages come as they are touched
  }
}

MapAhead::~MapAhead() {
  if (!work_) return;
  if (work_->process != process_id()) {
    work_.release();  // the handle of a thread that does not exist here can be neither joined nor destroyed
    return;
  }
  work_->stop.store(true, std::memory_order_relaxed);
  work_->thread.join();
}

bool MapAhead::unfinished() const noexcept { return work_ && work_->unfinished() && work_->process == process_id(); }

void MapAhead::help(bool wait, const std::atomic<bool>& cancel) const noexcept {
  while (unfinished() && !cancel.load(std::memory_order_relaxed)) {
    if (work_->next_is_resident()) {
      work_->map_next();
    } else if (wait) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    } else {
      return;
    }
  }
}

}  // namespace pe
