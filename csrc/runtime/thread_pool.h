// A pool of threads that run one function together (SPMD): every thread calls it with its Team, shares loops by taking
// chunks from a counter, and meets the others at barriers. One decoder pass is one run.
//
// Which thread computes what varies from run to run; results must not depend on it. Threads that wait spin for a
// moment and then sleep: an idle pool costs no CPU time, and several pools or more threads than cores still make progress.
// Functions must not throw (kernels do not): an exception that leaves one ends the process.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

namespace pe {

class Team;

namespace detail {

inline constexpr size_t kCacheLine = 64;

// What the threads of one pool share. Each atomic has a cache line to itself.
struct PoolState {
  using Entry = void (*)(void* context, Team& team) noexcept;

  alignas(kCacheLine) std::atomic<size_t> next{0};       // first task of the current loop nobody has taken
  alignas(kCacheLine) std::atomic<uint32_t> arrived{0};  // threads at the barrier
  alignas(kCacheLine) std::atomic<uint32_t> phase{0};    // barriers completed, modulo 2^32
  alignas(kCacheLine) Entry entry = nullptr;             // the run; written before its threads are called
  void* context = nullptr;
  uint32_t team_size = 0;
  int64_t spin_ns = 0;                                    // how long a waiting thread spins before it sleeps
  alignas(kCacheLine) std::atomic<int64_t> waited_ns{0};  // at barriers in this run, all threads together
};

// Waits until value differs from old, and returns it. Everything written before the change is then visible. *waited_ns
// grows by the time that took, if that was more than a moment.
uint32_t wait_for_change(const std::atomic<uint32_t>& value, uint32_t old, int64_t spin_ns, int64_t* waited_ns);

}  // namespace detail

// One thread's view of a run.
class Team {
 public:
  Team(detail::PoolState& state, uint32_t index, uint32_t size) : state_(state), index_(index), size_(size) {}

  size_t index() const { return index_; }  // 0 .. size() - 1; 0 is the thread that called run
  size_t size() const { return size_; }
  int64_t waited_ns() const { return waited_ns_; }  // at barriers so far

  // Returns once every thread of the team has called it; what they wrote before is then visible.
  void barrier() {
    if (size_ == 1) {
      state_.next.store(0, std::memory_order_relaxed);
    } else {
      meet();
    }
  }

  // Calls body(begin, end) for consecutive ranges of at most `grain` tasks that together cover 0 .. n - 1, each on
  // whichever thread asks first, and ends with a barrier. Every thread of the team must call it with the same n and
  // grain >= 1.
  template <class Body>
  void for_each(size_t n, size_t grain, Body&& body) {
    for (;;) {
      const size_t begin = state_.next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= n) break;
      body(begin, grain < n - begin ? begin + grain : n);
    }
    barrier();
  }

 private:
  void meet();

  detail::PoolState& state_;
  const uint32_t index_;
  const uint32_t size_;
  int64_t waited_ns_ = 0;
};

class ThreadPool {
 public:
  static constexpr int kMaxThreads = 1024;

  // Starts n_threads - 1 threads; the caller of run is the remaining one. 1 <= n_threads <= kMaxThreads (clamped).
  // Throws Error kMemory "thread_create" when the system refuses a thread.
  explicit ThreadPool(int n_threads);
  // Stops and joins the threads. In the child of a fork, where they do not exist, it abandons them (and their memory).
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }
  // Whether this is the child of a fork, where the pool's threads do not exist.
  bool abandoned() const;

  // Runs fn(Team&) on n_active threads (clamped to 1 .. size()), the calling thread among them, in the default
  // floating-point environment; returns when all have finished. In the child of a fork the team is the caller alone.
  // One run at a time: a second thread, or fn itself, calling run while one is going on gets Error kInternal
  // "pool_busy".
  // Returns how many nanoseconds the threads together spent waiting at barriers.
  template <class F>
  int64_t run(int n_active, F&& fn) {
    using Fn = std::remove_reference_t<F>;
    const auto entry = [](void* context, Team& team) noexcept { (*static_cast<Fn*>(context))(team); };
    return run_entry(n_active, entry, const_cast<void*>(static_cast<const void*>(std::addressof(fn))));
  }

 private:
  struct Workers;

  int64_t run_entry(int n_active, detail::PoolState::Entry entry, void* context);

  int size_;
  int64_t process_;  // where the threads live
  std::unique_ptr<Workers> workers_;
};

}  // namespace pe
