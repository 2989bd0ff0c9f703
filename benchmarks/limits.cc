// What this machine can do at most: the figures that every benchmark is measured against.
//
//   limits [--threads N] [--mib M] [--rounds R] [--folder DIR] [--quick] [--json]    the limits
//   limits --questions [--threads N] [--mib M] [--rounds R]                         micro-benchmarks behind the kernels' design
//
// Reading is by N threads of the engine's own pool over M MiB (default 1024, far more than any cache) in pieces of 512 KiB,
// each taken by whichever thread is free, as in a decode step. "file" is a file in the page cache, mapped as a model is.
// Arithmetic is by loops without memory, in MAC (multiply and add) per core cycle; cycles come from a chain of dependent
// additions timed next to each loop. Medians over the rounds; a shared machine gives less, and says so by its spread.
#include "runtime/limits.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "base/cpu_count.h"
#include "runtime/thread_pool.h"
#include "runtime/timed_loop.h"

#ifdef PE_TIMED_LOOPS
#define PE_X86 1
#include <immintrin.h>
#define PE_AVX2 __attribute__((target("avx2")))
#endif

namespace {

using namespace pe;

struct Options {
  size_t threads = 0, mib = 1024, rounds = 7;
  std::string folder = "/tmp";
  bool quick = false, json = false, questions = false;
};

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

#ifdef PE_X86

bool avx2() { return __builtin_cpu_supports("avx2"); }

// clang-format off
#define MADD256(r) "vpmaddubsw %%ymm14, %%ymm15, %%ymm12\n vpaddw %%ymm12, %%ymm" #r ", %%ymm" #r "\n"
PE_LOOP(madd256, X8(MADD256))

// Question 1: eight shuffles, eight broadcasts from memory, both; eight plain loads and the shuffles.
#define SHUFFLE(r) "vpshufd $0x1b, %%ymm15, %%ymm" #r "\n"
#define PERMUTE(r) "vpermq $0x1b, %%ymm15, %%ymm" #r "\n"
#define BROADCAST(r) "vpbroadcastd 4*" #r "(%[m]), %%ymm12\n"
#define LOAD(r) "vmovdqu 32*" #r "(%[m]), %%ymm13\n"
PE_LOOP(shuffles, X8(SHUFFLE))
PE_LOOP(permutes, X8(PERMUTE))
PE_LOOP(broadcasts, X8(BROADCAST))
PE_LOOP(shuffles_broadcasts, X8(SHUFFLE) X8(BROADCAST))
PE_LOOP(permutes_broadcasts, X8(PERMUTE) X8(BROADCAST))
PE_LOOP(shuffles_loads, X8(SHUFFLE) X8(LOAD))

// Question 2: a sub-block of 32 columns of a tile of 16 rows x 3 or 4 tokens, all in the first-level cache. A step is 4
// columns: two registers of codes (at 64 s), a dword per token (at 1024 t + 4 s; already in all lanes: at 1024 + 512 t +
// 32 s), products summed in int16. Eight steps, then int16 x scale is added to int32: registers where there are any left
// (3 tokens), memory otherwise (4).
#define TOKEN(s, t, lo, hi) "vpbroadcastd 1024*" #t "+1024+4*" #s "(%[m]), %%ymm2\n" TOKEN_SUM(lo, hi)
#define WIDE_TOKEN(s, t, lo, hi) "vmovdqu 512*" #t "+1024+32*" #s "(%[m]), %%ymm2\n" TOKEN_SUM(lo, hi)
#define TOKEN_SUM(lo, hi)                                                           \
  "vpmaddubsw %%ymm2, %%ymm0, %%ymm3\n vpaddw %%ymm3, %%ymm" #lo ", %%ymm" #lo "\n" \
  "vpmaddubsw %%ymm2, %%ymm1, %%ymm3\n vpaddw %%ymm3, %%ymm" #hi ", %%ymm" #hi "\n"
#define CODES(s) "vmovdqu 64*" #s "(%[m]), %%ymm0\n vmovdqu 64*" #s "+32(%[m]), %%ymm1\n"
#define STEP3(s) CODES(s) TOKEN(s, 0, 4, 5) TOKEN(s, 1, 6, 7) TOKEN(s, 2, 8, 9)
#define WIDE3(s) CODES(s) WIDE_TOKEN(s, 0, 4, 5) WIDE_TOKEN(s, 1, 6, 7) WIDE_TOKEN(s, 2, 8, 9)
#define STEP4(s) CODES(s) TOKEN(s, 0, 4, 5) TOKEN(s, 1, 6, 7) TOKEN(s, 2, 8, 9) TOKEN(s, 3, 10, 11)
#define END_REGISTER(sum, whole)                                                                                  \
  "vpmaddwd 512(%[m]), %%ymm" #sum ", %%ymm" #sum "\n vpaddd %%ymm" #sum ", %%ymm" #whole ", %%ymm" #whole "\n" \
  "vpxor %%xmm" #sum ", %%xmm" #sum ", %%xmm" #sum "\n"
#define END_MEMORY(sum)                                                                                      \
  "vpmaddwd 512(%[m]), %%ymm" #sum ", %%ymm" #sum "\n vpaddd 6144+32*" #sum "(%[m]), %%ymm" #sum ", %%ymm" #sum "\n" \
  "vmovdqu %%ymm" #sum ", 6144+32*" #sum "(%[m])\n vpxor %%xmm" #sum ", %%xmm" #sum ", %%xmm" #sum "\n"
#define END3 END_REGISTER(4, 10) END_REGISTER(5, 11) END_REGISTER(6, 12) END_REGISTER(7, 13) END_REGISTER(8, 14) END_REGISTER(9, 15)
#define END4 END_MEMORY(4) END_MEMORY(5) END_MEMORY(6) END_MEMORY(7) END_MEMORY(8) END_MEMORY(9) END_MEMORY(10) END_MEMORY(11)
PE_LOOP(tile3, X8(STEP3) END3)
PE_LOOP(tile3_wide, X8(WIDE3) END3)
PE_LOOP(tile4, X8(STEP4) END4)
// clang-format on

#endif

// ---- memory ----

enum class Pages { k4K, kHuge, kFile };
constexpr const char* kPageNames[] = {"4k", "huge", "file"};

// Memory of one kind, every page present, unmapped at the end.
class Memory {
 public:
  Memory(Pages pages, size_t bytes, const std::string& folder) : bytes_(bytes) {
    if (pages == Pages::kFile) {
      std::string path = folder + "/limits_XXXXXX";
      const int fd = mkstemp(path.data());
      if (fd < 0) fail("cannot create a file in " + folder);
      unlink(path.c_str());
      std::vector<uint64_t> piece((1 << 20) / 8);
      for (size_t i = 0; i < bytes; i += 1 << 20) {
        for (size_t k = 0; k < piece.size(); ++k) piece[k] = (i + k) * 0x9e3779b97f4a7c15u;
        if (write(fd, piece.data(), 1 << 20) != 1 << 20) fail("cannot write 1 MiB to a file in " + folder);
      }
      data_ = static_cast<uint8_t*>(mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0));
      close(fd);
      if (data_ == MAP_FAILED) fail("cannot map a file");
      base_ = data_;
      mapped_ = bytes;
      read_all(data_, bytes);  // page faults
      return;
    }
    constexpr size_t kHugePage = 2 << 20;
    mapped_ = bytes + kHugePage;
    base_ = static_cast<uint8_t*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) fail("cannot get memory");
    data_ = base_ + (kHugePage - reinterpret_cast<uintptr_t>(base_) % kHugePage) % kHugePage;
#ifdef MADV_HUGEPAGE
    madvise(data_, bytes, pages == Pages::kHuge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
    for (size_t i = 0; i < bytes; i += 8) {
      const uint64_t v = i * 0x9e3779b97f4a7c15u;
      std::memcpy(data_ + i, &v, 8);
    }
  }
  ~Memory() { munmap(base_, mapped_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  const uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  [[noreturn]] static void fail(const std::string& what) {
    std::fprintf(stderr, "limits: %s: %s\n", what.c_str(), std::strerror(errno));
    std::exit(2);
  }
  uint8_t *base_, *data_;
  size_t bytes_, mapped_;
};

double run_us(ThreadPool& pool, size_t threads, size_t rounds) {
  constexpr int kRuns = 1000;
  std::vector<double> v;
  for (size_t i = 0; i < rounds; ++i) {
    const double start = seconds();
    for (int k = 0; k < kRuns; ++k) pool.run(static_cast<int>(threads), [](Team&) {});
    v.push_back((seconds() - start) / kRuns * 1e6);
  }
  return figure(v).median;
}

// 1, 2, 4 .. and n.
std::vector<size_t> thread_counts(size_t n) {
  std::vector<size_t> counts;
  for (size_t k = 1; k < n; k *= 2) counts.push_back(k);
  counts.push_back(n);
  return counts;
}

void measure(const Options& o) {
  ThreadPool pool(static_cast<int>(o.threads));
  const std::vector<size_t> counts = o.quick ? std::vector<size_t>{o.threads} : thread_counts(o.threads);
  std::string json = "{\"threads\": " + std::to_string(o.threads);
  char text[200];
  const auto add = [&](const char* format, auto... values) {
    std::snprintf(text, sizeof text, format, values...);
    json += text;
  };
  const double clock = core_hertz(o.rounds) * 1e-9;
  add(", \"clock_ghz\": %.3f, \"mac_per_cycle\": {", clock);
  if (!o.json) std::printf("core clock %.2f GHz\n", clock);
#ifdef PE_X86
  bool first = true;
  for (const Loop& loop : mac_loops()) {
    if (!loop.available) continue;
    const double macs = per_cycle(loop, o.rounds);
    add("%s\"%s\": %.2f", first ? "" : ", ", loop.name, macs);
    first = false;
    if (!o.json) std::printf("%-18s %6.1f MAC/cycle/core  %7.1f GMAC/s/core\n", loop.name, macs, macs * clock);
  }
#endif
  add("}, \"read_gbs\": {");
  for (int p = 0; p < 3; ++p) {
    const auto pages = static_cast<Pages>(p);
    if (o.quick && pages != Pages::kFile) continue;
    const Memory memory(pages, o.mib << 20, o.folder);
    add("%s\"%s\": {", json.back() == '{' ? "" : ", ", kPageNames[p]);
    for (const size_t n : counts) {
      const Figure f = read_stream(pool, n, memory.bytes(), 512 << 10, o.rounds,
                                   [&](size_t at, size_t size) { return read_all(memory.data() + at, size); });
      const double median = f.median * 1e-9, low = f.low * 1e-9, high = f.high * 1e-9;  // GB/s
      add("%s\"%zu\": {\"median\": %.2f, \"low\": %.2f, \"high\": %.2f}", n == counts.front() ? "" : ", ", n, median,
          low, high);
      if (!o.json)
        std::printf("read, %-4s pages, %2zu threads  %6.1f GB/s (%.1f .. %.1f)\n", kPageNames[p], n, median, low, high);
    }
    json += "}";
  }
  add("}, \"barrier_us\": {");
  for (const size_t n : counts) {
    const double us = barrier_seconds(pool, n, o.rounds) * 1e6;
    add("%s\"%zu\": %.3f", n == counts.front() ? "" : ", ", n, us);
    if (!o.json) std::printf("barrier, %2zu threads  %8.3f us\n", n, us);
  }
  add("}, \"run_us\": {");
  for (const size_t n : counts) {
    const double us = run_us(pool, n, o.rounds);
    add("%s\"%zu\": %.3f", n == counts.front() ? "" : ", ", n, us);
    if (!o.json) std::printf("empty run, %2zu threads  %6.3f us\n", n, us);
  }
  json += "}}";
  if (o.json) std::printf("%s\n", json.c_str());
}

// ---- questions ----

#ifdef PE_X86

enum class Hint { kNone, kT0, kT1, kNta };

template <Hint kHint>
inline void fetch(const uint8_t* p) {
  if (kHint == Hint::kT0) _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  if (kHint == Hint::kT1) _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
  if (kHint == Hint::kNta) _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_NTA);
}

// Question 3: eight rows side by side, 32 bytes of each in turn, as the one-token kernels read. distance 0: fetch the next
// eight rows in the order of the file, eight times as fast as one row is read; otherwise `distance` bytes ahead in each row.
template <Hint kHint>
PE_AVX2 uint64_t read_rows8(const uint8_t* p, size_t bytes, size_t row, size_t distance) {
  __m256i sum[4] = {};
  for (size_t r = 0; r + 8 * row <= bytes; r += 8 * row) {
    for (size_t k = 0; k < row; k += 32) {
      if (kHint != Hint::kNone && distance == 0) {
        for (size_t i = 0; i < 256; i += 64) fetch<kHint>(p + r + 8 * row + 8 * k + i);
      }
      for (size_t i = 0; i < 8; ++i) {
        const uint8_t* at = p + r + i * row + k;
        if (kHint != Hint::kNone && distance != 0 && k % 64 == 0) fetch<kHint>(at + distance);
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        sum[i % 4] = _mm256_add_epi16(sum[i % 4], _mm256_maddubs_epi16(v, _mm256_set1_epi8(3)));
      }
    }
  }
  const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
  return static_cast<uint64_t>(_mm256_extract_epi64(all, 0));
}

void ask_prefetch(ThreadPool& pool, const Options& o) {
  const Memory memory(Pages::kFile, o.mib << 20, o.folder);
  constexpr size_t kRow = 2304, kPiece = 256 * kRow;  // 4096 columns of Q4_0 or Q4_K; 256 rows a task
  struct Variant {
    std::string name;
    uint64_t (*read)(const uint8_t*, size_t, size_t, size_t);
    size_t distance;
  };
  std::vector<Variant> variants = {{"no prefetch", read_rows8<Hint::kNone>, 0},
                                   {"the next 8 rows, T0", read_rows8<Hint::kT0>, 0},
                                   {"the next 8 rows, T1", read_rows8<Hint::kT1>, 0},
                                   {"the next 8 rows, NTA", read_rows8<Hint::kNta>, 0}};
  for (const size_t d : {512, 1024, 2048, 4096}) {
    variants.push_back({std::to_string(d) + " bytes ahead, T0", read_rows8<Hint::kT0>, d});
    variants.push_back({std::to_string(d) + " bytes ahead, T1", read_rows8<Hint::kT1>, d});
    variants.push_back({std::to_string(d) + " bytes ahead, NTA", read_rows8<Hint::kNta>, d});
  }
  std::printf("\n3. eight rows of %zu bytes side by side from a mapped file, GB/s (median, rounds interleaved)\n",
              kRow);
  for (const size_t n : thread_counts(o.threads)) {
    std::vector<std::vector<double>> gbs(variants.size() + 1);
    for (size_t round = 0; round < o.rounds; ++round) {
      gbs.back().push_back(read_stream(pool, n, memory.bytes(), 512 << 10, 1,
                                       [&](size_t at, size_t size) { return read_all(memory.data() + at, size); })
                               .median *
                           1e-9);
      for (size_t i = 0; i < variants.size(); ++i) {
        const Variant& v = variants[i];
        gbs[i].push_back(
            read_stream(pool, n, memory.bytes() - (1 << 20), kPiece, 1,
                        [&](size_t at, size_t size) { return v.read(memory.data() + at, size, kRow, v.distance); })
                .median *
            1e-9);
      }
    }
    std::printf("   %2zu threads  %6.1f  one stream, no prefetch\n", n, figure(gbs.back()).median);
    for (size_t i = 0; i < variants.size(); ++i)
      std::printf("   %2zu threads  %6.1f  %s\n", n, figure(gbs[i]).median, variants[i].name.c_str());
  }
}

void ask(const Options& o) {
  if (!avx2()) {
    std::printf("this processor has no AVX2: nothing to ask\n");
    return;
  }
  std::printf("1. instructions per cycle: does a broadcast from memory take a shuffle port?\n");
  for (const Loop& loop : {Loop{"8 vpshufd", 8, shuffles, true}, Loop{"8 vpermq", 8, permutes, true},
                           Loop{"8 vpbroadcastd from memory", 8, broadcasts, true},
                           Loop{"8 vpshufd + 8 vpbroadcastd from memory", 16, shuffles_broadcasts, true},
                           Loop{"8 vpermq + 8 vpbroadcastd from memory", 16, permutes_broadcasts, true},
                           Loop{"8 vpshufd + 8 loads", 16, shuffles_loads, true}})
    std::printf("   %5.2f  %s\n", per_cycle(loop, o.rounds), loop.name);
  std::printf("\n2. MAC/cycle of a 16-row tile in the first-level cache, int16 chains of 8\n");
  for (const Loop& loop : {Loop{"2 x 3, int32 sums in registers", 8 * 64 * 3, tile3, true},
                           Loop{"2 x 3, activations already in all lanes", 8 * 64 * 3, tile3_wide, true},
                           Loop{"2 x 4, int32 sums in memory", 8 * 64 * 4, tile4, true},
                           Loop{"vpmaddubsw + vpaddw alone", 8 * 32, madd256, true}})
    std::printf("   %5.1f  %s\n", per_cycle(loop, o.rounds), loop.name);
  ThreadPool pool(static_cast<int>(o.threads));
  ask_prefetch(pool, o);
}

#else

void ask(const Options&) { std::printf("the questions are about x86-64\n"); }

#endif

}  // namespace

int main(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const auto number = [&](size_t low, size_t high) {
      const unsigned long v = i + 1 < argc ? std::strtoul(argv[++i], nullptr, 10) : 0;
      if (v < low || v > high) {
        std::fprintf(stderr, "%s takes a number %zu..%zu\n", arg.c_str(), low, high);
        std::exit(2);
      }
      return v;
    };
    if (arg == "--json") {
      o.json = true;
    } else if (arg == "--quick") {
      o.quick = true;
    } else if (arg == "--questions") {
      o.questions = true;
    } else if (arg == "--threads") {
      o.threads = number(1, ThreadPool::kMaxThreads);
    } else if (arg == "--mib") {
      o.mib = number(16, 1 << 20);
    } else if (arg == "--rounds") {
      o.rounds = number(1, 1000);
    } else if (arg == "--folder" && i + 1 < argc) {
      o.folder = argv[++i];
    } else {
      std::fprintf(stderr, "unknown option %s\n", arg.c_str());
      return 2;
    }
  }
  if (o.threads == 0) o.threads = static_cast<size_t>(usable_cores());
  o.questions ? ask(o) : measure(o);
  return 0;
}
