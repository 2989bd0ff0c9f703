// What this machine can do at most: reading memory, multiplying and adding, meeting at barriers. Every speed is reported
// beside these.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/thread_pool.h"

namespace pe {

struct Figure {
  double median = 0, low = 0, high = 0;
};

// Of the rounds' values, at least one.
Figure figure(std::vector<double> values);

// A loop without memory traffic: run(n, memory) does n rounds, `per_round` each of what is counted; memory: 8 KiB.
struct Loop {
  const char* name;
  double per_round;
  void (*run)(long n, void* memory);
  bool available;  // the processor has its instructions
};

// How much of it one core does in a cycle. Cycles come from a chain of dependent additions timed next to the loop, in the
// thread's own time, so that neither other programs nor a changing clock matter.
double per_cycle(const Loop& loop, size_t rounds);

// Dependent additions a second: the clock of the core.
double core_hertz(size_t rounds);

// Loops of multiply-and-add instructions, counted in MAC. Empty where none were written for the processor.
std::vector<Loop> mac_loops();

// MAC a cycle and core of the best int8 (or float) instructions that the tier's kernels have; 0: not known.
struct MacPeak {
  double int8 = 0, fp32 = 0;
};
MacPeak mac_peak(Tier tier, size_t rounds);

// Reads n bytes, a multiple of 128, as fast as they come; returns a sum nobody needs.
uint64_t read_all(const uint8_t* p, size_t n);

// Bytes a second of `threads` threads that share pieces of `bytes` bytes, each taken by whoever is free; read(begin, size)
// reads one.
template <class Read>
Figure read_stream(ThreadPool& pool, size_t threads, size_t bytes, size_t piece, size_t rounds, Read&& read) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> values;
  for (size_t i = 0; i < rounds; ++i) {
    const auto start = Clock::now();
    pool.run(static_cast<int>(threads), [&](Team& team) {
      uint64_t sum = 0;
      team.for_each(bytes / piece, 1, [&](size_t k, size_t) { sum ^= read(k * piece, piece); });
      volatile uint64_t used = sum;
      (void)used;
    });
    values.push_back(static_cast<double>(bytes / piece * piece) /
                     std::chrono::duration<double>(Clock::now() - start).count());
  }
  return figure(std::move(values));
}

// Of one meeting of that many threads.
double barrier_seconds(ThreadPool& pool, size_t threads, size_t rounds);

struct Limits {
  double clock_hz;
  Figure read;  // bytes a second, all threads together, from memory in ordinary pages, `bytes` of it
  MacPeak macs;
  double barrier;  // seconds
};

// In one or two seconds. bytes: much more than any cache holds. Throws Error kMemory.
Limits measure_limits(size_t threads, size_t bytes, Tier tier);

}  // namespace pe
