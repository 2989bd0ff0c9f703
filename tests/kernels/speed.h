// What the speed measurements of the check programs share: clocks, the core's frequency, the machine's read stream.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <thread>
#include <vector>

namespace pe {

inline double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Time this thread has run: unlike seconds() it is not lengthened by other programs on the same core.
inline double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Core cycles per second right now: a chain of dependent additions takes one cycle each.
inline double clock_rate() {
  double best = 0;
  for (int trial = 0; trial < 5; ++trial) {
    uint64_t a = 0;
    const double start = cpu_seconds();
    for (int i = 0; i < 1000000; ++i) {
#define PE_ADD4 "add $1, %0\n\tadd $1, %0\n\tadd $1, %0\n\tadd $1, %0\n\t"
      __asm__ volatile(PE_ADD4 PE_ADD4 PE_ADD4 PE_ADD4 : "+r"(a));
#undef PE_ADD4
    }
    best = std::max(best, 16e6 / (cpu_seconds() - start));
  }
  return best;
}

// The best wall time of work(0 .. threads - 1) on threads of their own; of one thread, its own time.
template <class Work>
double best_time(size_t threads, Work work) {
  double best = 1e9;
  const double until = seconds() + 1;
  for (int trial = 0; trial < 3 || (seconds() < until && trial < 50); ++trial) {
    const double start = threads == 1 ? cpu_seconds() : seconds();
    std::vector<std::thread> pool;
    for (size_t i = 1; i < threads; ++i) pool.emplace_back(work, i);
    work(0);
    for (std::thread& t : pool) t.join();
    best = std::min(best, (threads == 1 ? cpu_seconds() : seconds()) - start);
  }
  return best;
}

inline double read_stream(size_t threads) {
  std::vector<uint64_t> memory((256u << 20) / 8, 1);
  const size_t share = memory.size() / threads;
  const double t = best_time(threads, [&](size_t i) {
    uint64_t sum[8] = {};
    for (size_t k = i * share; k + 8 <= (i + 1) * share; k += 8) {
      for (size_t j = 0; j < 8; ++j) sum[j] += memory[k + j];
    }
    __asm__ volatile("" : : "g"(sum) : "memory");
  });
  return static_cast<double>(share * threads * 8) / t * 1e-9;
}

}  // namespace pe
