// Maps the pages of files before somebody reads them.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <span>
#include <vector>

namespace pe {

// While it lives, a thread goes through mapped files and has the system map (and read) piece after piece: for gigabytes
// that takes much less time than as many page faults of threads that wait for each other. It never fails: where the
// system has no such call, refuses a thread or is short of memory, pages come as they are touched.
class MapAhead {
 public:
  // Ranges begin at a page. Less than kWorthwhile bytes in all are left alone, and more than there is memory for.
  explicit MapAhead(const std::vector<std::span<const std::byte>>& ranges) noexcept;
  // Waits for the piece at hand, in the process where the thread lives; the child of a fork abandons it.
  ~MapAhead();
  MapAhead(const MapAhead&) = delete;
  MapAhead& operator=(const MapAhead&) = delete;

  // Whether pieces are left that nobody has begun; never in the child of a fork.
  bool unfinished() const noexcept;
  // Takes part, until none are or `cancel` is set. For threads that need the pages next, any number of them. Pieces that
  // are not in memory are left to the one thread, and waited for if so wished: read by several side by side, files come more
  // slowly, and in smaller parts for as long as they stay in memory.
  void help(bool wait, const std::atomic<bool>& cancel) const noexcept;

  static constexpr size_t kWorthwhile = size_t{64} << 20;  // touched in a few milliseconds

 private:
  struct Work;
  std::unique_ptr<Work> work_;
};

}  // namespace pe
