#include "runtime/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "base/cpu_count.h"
#include "base/error.h"
#include "base/fp_env.h"
#include "base/process.h"

namespace pe {
namespace {

// How long a waiting thread spins before it sleeps. Between barriers of a decoder pass threads wait microseconds; waking a
// sleeper costs about as much as this. It never yields in between: the scheduler may give the core to any background task
// until its next tick, milliseconds later, while a sleeper is woken at once.
constexpr int64_t kSpinNs = 40'000;

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
  asm volatile("yield" : : : "memory");
#endif
}

int64_t now_ns() {
  const auto t = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(t).count();
}

}  // namespace

namespace detail {

uint32_t wait_for_change(const std::atomic<uint32_t>& value, uint32_t old, int64_t spin_ns, int64_t* waited_ns) {
  const int64_t start = now_ns();
  if (spin_ns > 0) {
    for (int64_t now = start; now < start + spin_ns; now = now_ns()) {
      for (int i = 0; i < 32; ++i) {
        const uint32_t seen = value.load(std::memory_order_acquire);
        if (seen != old) {
          *waited_ns += now - start;
          return seen;
        }
        relax();
      }
    }
  }
  for (;;) {
    const uint32_t seen = value.load(std::memory_order_acquire);
    if (seen != old) {
      *waited_ns += now_ns() - start;
      return seen;
    }
    value.wait(old, std::memory_order_acquire);
  }
}

}  // namespace detail

// The last thread to arrive resets the loop counter and the barrier, then opens it. No thread can arrive at the next
// barrier before this one opens, so neither reset can be overtaken. Stores that a sleeper may wait for are sequentially
// consistent: notify looks at a count of sleepers to decide whether to wake anyone, and that look must not pass the
// store.
void Team::meet() {
  const uint32_t phase = state_.phase.load(std::memory_order_relaxed);
  if (state_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    state_.arrived.store(0, std::memory_order_relaxed);
    state_.next.store(0, std::memory_order_relaxed);
    state_.phase.store(phase + 1, std::memory_order_seq_cst);
    state_.phase.notify_all();
  } else {
    detail::wait_for_change(state_.phase, phase, state_.spin_ns, &waited_ns_);
  }
}

struct ThreadPool::Workers {
  // Where one thread is called: the number of runs it has been asked to join. A line each, so that a run disturbs no
  // thread it does not need.
  struct Call {
    alignas(detail::kCacheLine) std::atomic<uint32_t> count{0};
  };

  detail::PoolState state;
  std::atomic<bool> busy{false};
  std::atomic<bool> stop{false};
  std::vector<Call> calls;  // calls[i - 1] for thread i
  std::vector<std::thread> threads;

  explicit Workers(int n) : calls(static_cast<size_t>(n - 1)) { threads.reserve(calls.size()); }

  void call(size_t i) {
    calls[i].count.fetch_add(1, std::memory_order_seq_cst);
    calls[i].count.notify_one();
  }

  void work(uint32_t index) noexcept {
    const FpEnv environment;
    int64_t idle_ns = 0;
    for (uint32_t seen = 0;;) {
      seen = detail::wait_for_change(calls[index - 1].count, seen, state.spin_ns, &idle_ns);
      if (stop.load(std::memory_order_acquire)) return;
      Team team(state, index, state.team_size);
      state.entry(state.context, team);
      state.waited_ns.fetch_add(team.waited_ns(), std::memory_order_relaxed);
      team.barrier();
    }
  }

  void join() {
    stop.store(true, std::memory_order_release);
    for (size_t i = 0; i < threads.size(); ++i) call(i);
    for (std::thread& thread : threads) thread.join();
    threads.clear();
  }
};

ThreadPool::ThreadPool(int n_threads) : size_(std::clamp(n_threads, 1, kMaxThreads)), process_(process_id()) {
  workers_ = std::make_unique<Workers>(size_);
  // With more threads than can run at once, a spinning thread only keeps the awaited one from its core. One thread waits
  // for nobody: the files that tell the number of cores are not read for it.
  workers_->state.spin_ns = size_ == 1 || size_ <= usable_cpus() ? kSpinNs : 0;
  const SignalsBlocked blocked;
  try {
    for (int i = 1; i < size_; ++i) {
      workers_->threads.emplace_back([workers = workers_.get(), i] { workers->work(static_cast<uint32_t>(i)); });
    }
  } catch (const std::exception& e) {
    const size_t started = workers_->threads.size() + 1;
    workers_->join();
    throw Error(Status::kMemory, "thread_create",
                "the system refused thread " + std::to_string(started + 1) + " of " + std::to_string(size_) + " (" +
                    e.what() + "): use fewer threads");
  }
}

ThreadPool::~ThreadPool() {
  if (abandoned()) {
    workers_.release();  // handles of threads that do not exist here can be neither joined nor destroyed
  } else {
    workers_->join();
  }
}

bool ThreadPool::abandoned() const { return process_id() != process_; }

int64_t ThreadPool::run_entry(int n_active, detail::PoolState::Entry entry, void* context) {
  const FpEnv environment;
  if (abandoned()) {  // after a fork: alone, and not on state another thread may have left half-way
    detail::PoolState alone;
    Team team(alone, 0, 1);
    entry(context, team);
    return 0;
  }
  Workers& workers = *workers_;
  if (workers.busy.exchange(true, std::memory_order_acquire)) {
    throw Error(Status::kInternal, "pool_busy", "two runs at once on one thread pool");
  }
  const int n = std::clamp(n_active, 1, size_);
  detail::PoolState& state = workers.state;
  state.entry = entry;
  state.context = context;
  state.team_size = static_cast<uint32_t>(n);
  state.next.store(0, std::memory_order_relaxed);
  state.waited_ns.store(0, std::memory_order_relaxed);
  for (int i = 0; i + 1 < n; ++i) workers.call(static_cast<size_t>(i));
  Team team(state, 0, state.team_size);
  entry(context, team);
  team.barrier();
  const int64_t waited_ns = state.waited_ns.load(std::memory_order_relaxed) + team.waited_ns();
  workers.busy.store(false, std::memory_order_release);
  return waited_ns;
}

}  // namespace pe
