#include "runtime/limits.h"

#include <cstring>
#include <ctime>
#include <string_view>

#include "base/aligned_buffer.h"
#include "runtime/timed_loop.h"

#ifdef PE_TIMED_LOOPS
#include <immintrin.h>
#endif
#ifndef _WIN32
#include <sys/mman.h>
#endif

namespace pe {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Time this thread has run: other programs on the same core do not lengthen it.
double thread_seconds() {
#ifdef CLOCK_THREAD_CPUTIME_ID
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
#else
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
#endif
}

#ifdef PE_TIMED_LOOPS

// Twelve chains of fma and of vpdpbusd (four or five cycles long, two a cycle); eight of vpmaddubsw + vpaddw.
// clang-format off
#define FMA256(r) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #r "\n"
#define FMA512(r) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" #r "\n"
#define DOT256(r) "vpdpbusd %%ymm14, %%ymm15, %%ymm" #r "\n"
#define DOT512(r) "vpdpbusd %%zmm14, %%zmm15, %%zmm" #r "\n"
#define MADD256(r) "vpmaddubsw %%ymm14, %%ymm15, %%ymm12\n vpaddw %%ymm12, %%ymm" #r ", %%ymm" #r "\n"
#define MADD512(r) "vpmaddubsw %%zmm14, %%zmm15, %%zmm12\n vpaddw %%zmm12, %%zmm" #r ", %%zmm" #r "\n"
PE_LOOP(fma256, X12(FMA256))
PE_LOOP(fma512, X12(FMA512))
PE_LOOP(dot256, X12(DOT256))
PE_LOOP(dot512, X12(DOT512))
PE_LOOP(madd256, X8(MADD256))
PE_LOOP(madd512, X8(MADD512))
// clang-format on

bool avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool avx512() { return __builtin_cpu_supports("avx512bw"); }
bool vnni() { return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl"); }

__attribute__((target("avx2"))) uint64_t read_wide(const uint8_t* p, size_t n) {
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  for (size_t i = 0; i < n; i += 128) {
    const auto* v = reinterpret_cast<const __m256i*>(p + i);
    a = _mm256_xor_si256(a, _mm256_loadu_si256(v));
    b = _mm256_xor_si256(b, _mm256_loadu_si256(v + 1));
    c = _mm256_xor_si256(c, _mm256_loadu_si256(v + 2));
    d = _mm256_xor_si256(d, _mm256_loadu_si256(v + 3));
  }
  a = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
  return static_cast<uint64_t>(_mm256_extract_epi64(a, 0) ^ _mm256_extract_epi64(a, 2));
}

#endif

}  // namespace

Figure figure(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return {v[v.size() / 2], v.front(), v.back()};
}

double core_hertz(size_t rounds) {
  std::vector<double> v;
  constexpr int kAdds = 4'000'000;
  for (size_t i = 0; i < 3 * rounds; ++i) {
    uint64_t a = 1;
    const double start = thread_seconds();
#ifdef __GNUC__
    for (int k = 0; k < kAdds; ++k) __asm__ volatile("" : "+r"(a = a + 1));  // one addition after another
#else
    for (volatile int k = 0; k < kAdds; k = k + 1) ++a;
#endif
    v.push_back(kAdds / (thread_seconds() - start));
  }
  return figure(std::move(v)).median;
}

#ifdef PE_TIMED_LOOPS

double per_cycle(const Loop& loop, size_t rounds) {
  alignas(64) static uint8_t memory[8192];
  std::vector<double> v;
  for (size_t i = 0; i < 3 * rounds; ++i) {
    constexpr long kAdds = 16, kCycles = 2'000'000;  // under a millisecond: the clock is the same for both
    uint64_t a = 0;
    const double t0 = thread_seconds();
    for (long k = 0; k < kCycles / kAdds; ++k) {
#define ADD4 "add $1, %0\n\tadd $1, %0\n\tadd $1, %0\n\tadd $1, %0\n\t"
      __asm__ volatile(ADD4 ADD4 ADD4 ADD4 : "+r"(a));
#undef ADD4
    }
    const double t1 = thread_seconds();
    constexpr long kRounds = 100'000;
    loop.run(kRounds, memory);
    const double t2 = thread_seconds();
    v.push_back(loop.per_round * kRounds / (t2 - t1) * (t1 - t0) / kCycles);
  }
  return figure(std::move(v)).median;
}

std::vector<Loop> mac_loops() {
  return {{"fp32 fma 256", 12 * 8, fma256, avx2()},      {"fp32 fma 512", 12 * 16, fma512, avx512()},
          {"int8 maddubs 256", 8 * 32, madd256, avx2()}, {"int8 maddubs 512", 8 * 64, madd512, avx512()},
          {"int8 dpbusd 256", 12 * 32, dot256, vnni()},  {"int8 dpbusd 512", 12 * 64, dot512, vnni()}};
}

#else

double per_cycle(const Loop&, size_t) { return 0; }
std::vector<Loop> mac_loops() { return {}; }

#endif

MacPeak mac_peak(Tier tier, size_t rounds) {
  MacPeak peak;
  for (const Loop& loop : mac_loops()) {
    const std::string_view name = loop.name;
    const bool wide = name.ends_with("512"), dot = name.find("dpbusd") != name.npos;
    if (!loop.available || tier == Tier::kScalar || (tier == Tier::kAvx2 && (wide || dot))) continue;
    double& best = name.starts_with("int8") ? peak.int8 : peak.fp32;
    best = std::max(best, per_cycle(loop, rounds));
  }
  return peak;
}

uint64_t read_all(const uint8_t* p, size_t n) {
#ifdef PE_TIMED_LOOPS
  static const bool wide = avx2();
  if (wide) return read_wide(p, n);
#endif
  uint64_t sum[8] = {};
  for (size_t i = 0; i < n; i += 64) {
    for (size_t k = 0; k < 8; ++k) {
      uint64_t v;
      std::memcpy(&v, p + i + 8 * k, 8);
      sum[k] ^= v;
    }
  }
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
}

double barrier_seconds(ThreadPool& pool, size_t threads, size_t rounds) {
  constexpr int kBarriers = 10'000;
  std::vector<double> v;
  for (size_t i = 0; i < rounds; ++i) {
    Clock::time_point start;
    pool.run(static_cast<int>(threads), [&](Team& team) {
      team.barrier();
      if (team.index() == 0) start = Clock::now();
      for (int k = 0; k < kBarriers; ++k) team.barrier();
      if (team.index() == 0) v.push_back(seconds_since(start) / kBarriers);
    });
  }
  return figure(std::move(v)).median;
}

Limits measure_limits(size_t threads, size_t bytes, Tier tier) {
  constexpr size_t kPiece = 512 << 10, kRounds = 5;
  ThreadPool pool(static_cast<int>(threads));
  AlignedBuffer memory(std::max(bytes / kPiece, threads) * kPiece);
#if defined(MADV_NOHUGEPAGE)
  madvise(memory.data(), memory.size(), MADV_NOHUGEPAGE);  // as the pages of a mapped model
#endif
  pool.run(static_cast<int>(threads), [&](Team& team) {  // every page present, and no two alike
    team.for_each(memory.size() / kPiece, 1, [&](size_t k, size_t) {
      for (size_t i = k * kPiece; i < (k + 1) * kPiece; i += 8) {
        const uint64_t v = i * 0x9e3779b97f4a7c15u;
        std::memcpy(memory.data() + i, &v, 8);
      }
    });
  });
  const auto* data = memory.as<uint8_t>();
  Limits out{};
  out.read = read_stream(pool, threads, memory.size(), kPiece, kRounds,
                         [&](size_t at, size_t size) { return read_all(data + at, size); });
  out.clock_hz = core_hertz(kRounds);
  out.macs = mac_peak(tier, kRounds);
  out.barrier = barrier_seconds(pool, threads, kRounds);
  return out;
}

}  // namespace pe
