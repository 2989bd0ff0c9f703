// Checks the thread pool: barriers and shared loops, parking, creation and destruction, fork, refusal; the counting of
// processors; the thread that maps files. Prints a summary; exit status 1 on failure. Meant to run under
// -fsanitize=thread as well.
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/cpu_count.h"
#include "base/error.h"
#include "runtime/map_ahead.h"
#include "runtime/team_size.h"
#include "runtime/thread_pool.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

namespace {

using namespace pe;
using Clock = std::chrono::steady_clock;

long checks = 0, failures = 0;

void check(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  if (++failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double cpu_seconds() {
  rusage use;
  getrusage(RUSAGE_SELF, &use);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  };
  return seconds(use.ru_utime) + seconds(use.ru_stime);
}

// Every thread writes its own cell, meets, and reads all: a barrier that lets anyone through early is seen at once. The
// cells are plain, so that the thread sanitizer sees a barrier that does not order memory.
double check_barriers(int threads, int rounds) {
  ThreadPool pool(threads);
  std::vector<int> cell(static_cast<size_t>(threads));
  std::atomic<int> wrong{0};
  const auto start = Clock::now();
  pool.run(threads, [&](Team& team) {
    for (int round = 1; round <= rounds; ++round) {
      cell[team.index()] = round;
      team.barrier();
      for (const int c : cell) {
        if (c != round) ++wrong;
      }
      team.barrier();
    }
  });
  const double each = seconds_since(start) / (2 * rounds);
  check(wrong == 0, "barriers of " + std::to_string(threads) + " threads");
  return each;
}

// Every task done exactly once, by whatever thread; loops of all sizes follow each other without a gap.
void check_loops(int threads) {
  ThreadPool pool(threads);
  const size_t sizes[] = {0, 1, 2, 3, 7, 8, 64, 1000};
  std::vector<int> done(1000);
  std::atomic<int> wrong{0}, calls{0};
  for (int active = 1; active <= threads + 1; ++active) {  // one more than there are: clamped
    calls = 0;
    pool.run(active, [&](Team& team) {
      ++calls;
      if (team.size() != static_cast<size_t>(std::min(active, threads)) || team.index() >= team.size()) ++wrong;
      for (int repeat = 0; repeat < 20; ++repeat) {
        for (const size_t n : sizes) {
          for (const size_t grain : {size_t{1}, size_t{3}, size_t{2000}}) {
            team.for_each(n, grain, [&](size_t begin, size_t end) {
              if (begin >= end || end > n || end - begin > grain) ++wrong;
              for (size_t i = begin; i < end; ++i) ++done[i];
            });
            for (size_t i = team.index(); i < n; i += team.size()) {  // seen by another thread than the one that did it
              if (done[i] != 1) ++wrong;
              done[i] = 0;
            }
            team.barrier();
          }
        }
      }
    });
    check(calls == std::min(active, threads), "run calls every active thread once");
  }
  check(wrong == 0, "loops of " + std::to_string(threads) + " threads");
}

void check_sizes() {
  ThreadPool none(0), negative(-3);
  check(none.size() == 1 && negative.size() == 1, "the number of threads is clamped");
  int calls = 0;
  none.run(-5, [&](Team& team) { calls += team.size() == 1; });
  check(calls == 1, "at least the caller runs");
}

void check_parking() {
  ThreadPool pool(4);
  pool.run(4, [](Team& team) { team.barrier(); });
  std::this_thread::sleep_for(std::chrono::milliseconds(100));  // spinning is over
  const double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  const double used = cpu_seconds() - before;
  check(used < (kSanitized ? 0.2 : 0.01), "an idle pool uses no CPU time, used " + std::to_string(used) + " s of 0.5");
  std::atomic<int> calls{0};
  pool.run(4, [&](Team&) { ++calls; });
  check(calls == 4, "parked threads wake");
}

// A thread that the system does not run for a while: the others do its share of a loop, and while they wait for the task
// that it has taken they leave their cores to whoever it waits for.
void check_descheduled() {
  ThreadPool pool(4);
  std::vector<int> done(4);
  std::atomic<bool> stands{false};
  const double before = cpu_seconds();
  pool.run(4, [&](Team& team) {
    team.for_each(1000, 1, [&](size_t, size_t) {
      ++done[team.index()];
      if (team.index() == 1) {
        stands = true;
        std::this_thread::sleep_for(std::chrono::milliseconds(300));
      } else {
        while (!stands) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    });
  });
  const double used = cpu_seconds() - before;
  check(done[0] + done[1] + done[2] + done[3] == 1000 && done[1] <= 2, "a loop does not wait for a thread that stands");
  check(used < (kSanitized ? 0.5 : 0.15),
        "waiting for it costs no CPU time, cost " + std::to_string(used) + " s of 0.3");
}

void check_lifetimes(int rounds) {
  for (int i = 0; i < rounds; ++i) {
    ThreadPool outer(3);
    int sum[3] = {};
    ThreadPool inner(2);  // two pools at once, one used inside the other's run
    outer.run(3, [&](Team& team) {
      if (team.index() == 0) {
        std::atomic<int> calls{0};
        inner.run(2, [&](Team&) { ++calls; });
        sum[0] = calls;
      } else {
        sum[team.index()] = 1;
      }
    });
    check(sum[0] == 2 && sum[1] == 1 && sum[2] == 1, "two pools at once");
    if (i % 4 == 0) ThreadPool unused(2);
  }
}

// Pools driven by different host threads at the same time.
void check_independent_pools() {
  std::atomic<int> wrong{0};
  std::vector<std::thread> hosts;
  for (int h = 0; h < 3; ++h) {
    hosts.emplace_back([&wrong] {
      ThreadPool pool(3);
      std::vector<long> part(3);
      for (int i = 0; i < 200; ++i) {
        pool.run(3, [&](Team& team) {
          part[team.index()] = 0;
          team.for_each(100, 7, [&](size_t begin, size_t end) {
            for (size_t k = begin; k < end; ++k) part[team.index()] += static_cast<long>(k);
          });
        });
        if (part[0] + part[1] + part[2] != 4950) ++wrong;
      }
    });
  }
  for (std::thread& host : hosts) host.join();
  check(wrong == 0, "independent pools do not disturb each other");
}

void check_misuse() {
  ThreadPool pool(2);
  std::atomic<int> refused{0};
  pool.run(2, [&](Team& team) {
    if (team.index() != 0) return;
    try {
      pool.run(2, [](Team&) {});
    } catch (const Error& e) {
      refused += e.status == Status::kInternal && std::strcmp(e.code, "pool_busy") == 0;
    }
  });
  check(refused == 1, "a run inside a run is refused");
  int calls = 0;
  pool.run(1, [&](Team&) { ++calls; });
  check(calls == 1, "and the pool still works");
}

// Signals sent to the process must reach the host's threads, never the pool's.
std::atomic<bool> handled_by_host{false};
pthread_t host_thread;
void on_signal(int) { handled_by_host = pthread_equal(pthread_self(), host_thread) != 0; }

void check_signals() {
  host_thread = pthread_self();
  struct sigaction action = {}, before = {};
  action.sa_handler = on_signal;
  sigaction(SIGUSR1, &action, &before);
  ThreadPool pool(4);
  sigset_t mask;
  pthread_sigmask(SIG_SETMASK, nullptr, &mask);
  check(!sigismember(&mask, SIGUSR1), "creating a pool leaves the caller's signal mask alone");
  for (int i = 0; i < 20; ++i) {
    handled_by_host = false;
    kill(getpid(), SIGUSR1);
    for (int wait = 0; wait < 1000 && !handled_by_host; ++wait) usleep(1000);
    check(handled_by_host, "a signal is handled on the host's thread");
  }
  sigaction(SIGUSR1, &before, nullptr);
}

// Runs f in a forked child under a time limit; true when it exits with status 0.
template <class F>
bool in_child(F f) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(f() ? 0 : 1);
  }
  int status = -1;
  return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void check_fork() {
  auto pool = std::make_unique<ThreadPool>(4);
  pool->run(4, [](Team& team) { team.barrier(); });
  const bool child = in_child([&] {
    int tasks = 0, size = 0;
    pool->run(4, [&](Team& team) {
      size = static_cast<int>(team.size());
      team.for_each(100, 3, [&](size_t begin, size_t end) { tasks += static_cast<int>(end - begin); });
    });
    pool.reset();
    return tasks == 100 && size == 1;
  });
  check(child, "in the child of a fork a pool works alone and is destroyed without waiting");
  if (!kSanitized) {  // the sanitizer's own state does not allow new threads in such a child
    check(in_child([] {
            ThreadPool fresh(3);
            std::atomic<int> calls{0};
            fresh.run(3, [&](Team&) { ++calls; });
            return calls == 3;
          }),
          "a pool made in the child has its threads");
  }
  std::atomic<int> calls{0};
  pool->run(4, [&](Team&) { ++calls; });
  check(calls == 4, "the parent's pool goes on");
}

void check_refusal() {
  if (kSanitized) return;  // sanitizers reserve address space of their own
  check(in_child([] {
          rlimit limit = {64 << 20, 64 << 20};  // address space that cannot hold the stacks
          setrlimit(RLIMIT_AS, &limit);
          try {
            ThreadPool pool(200);
          } catch (const Error& e) {
            return e.status == Status::kMemory && std::strcmp(e.code, "thread_create") == 0;
          }
          return false;
        }),
        "a refused thread is an Error, and those already started are joined");
}

// A machine that is only arithmetic: what a step by n threads takes (ns), and what share of their time they wait.
struct Machine {
  double (*ns)(int n);
  double (*lost)(int n);
};

// Seconds of `steps` steps from *clock (ns) on; the team's size afterwards.
double simulate(TeamSize& team, const Machine& machine, int steps, int64_t* clock) {
  const int64_t start = *clock;
  for (int i = 0; i < steps; ++i) {
    const int n = team.next();
    const double ns = machine.ns(n);
    *clock += static_cast<int64_t>(ns);
    team.record(*clock, static_cast<int64_t>(ns), static_cast<int64_t>(ns * n * machine.lost(n)));
  }
  return static_cast<double>(*clock - start) * 1e-9;
}

void check_team_size() {
  const Machine quiet{[](int n) { return 80e6 / n; }, [](int) { return 0.05; }};
  // A model of a few megabytes: 60 us of work, 20 us of meeting for every further thread.
  const Machine tiny{[](int n) { return 60e3 / n + 20e3 * (n - 1); }, [](int n) { return n > 1 ? 0.6 : 0.0; }};
  // Another program on one of eight CPUs: the eighth thread is waited for.
  const Machine shared{[](int n) { return n == 8 ? 40e6 : 80e6 / n; }, [](int n) { return n == 8 ? 0.6 : 0.05; }};
  // Threads wait for the memory, and more of them gain nothing, but do no harm either.
  const Machine bound{[](int n) { return 80e6 / std::min(n, 4); }, [](int n) { return n > 4 ? 0.4 : 0.1; }};
  for (const int most : {1, 2, 3, 8, 64}) {
    TeamSize team(most);
    int64_t clock = 0;
    for (int i = 0; i < 2000; ++i) {
      check(team.next() == most, "a quiet machine gives all threads to every step");
      simulate(team, quiet, 1, &clock);
    }
  }
  for (const int most : {1, 2, 4, 8}) {
    TeamSize team(most);
    int64_t clock = 0;
    simulate(team, tiny, 100'000, &clock);
    const double took = simulate(team, tiny, 100'000, &clock);
    check(took < 1.03 * 100'000 * 60e-6, "a tiny model gets one of " + std::to_string(most) + " threads");
  }
  TeamSize team(8);
  int64_t clock = 0;
  simulate(team, quiet, 1000, &clock);
  const double first = simulate(team, shared, 1000, &clock);
  check(first < 1.1 * 1000 * 80e-3 / 7 + 1, "a thread that others hold up is left out after a moment");
  const double later = simulate(team, shared, 10'000, &clock);
  // Trials of the eighth thread, now and then, are the price of noticing that the other program has gone.
  check(later < 1.1 * 10'000 * 80e-3 / 7, "and trials cost little");
  simulate(team, quiet, 1000, &clock);
  check(team.next() == 8, "when the machine is quiet again all threads come back");
  TeamSize memory(8);
  const double took = simulate(memory, bound, 10'000, &clock);
  check(took < 1.02 * 10'000 * 80e-3 / 4, "trials that gain nothing cost little");
}

void write_file(const std::filesystem::path& path, const std::string& text) {
  std::filesystem::create_directories(path.parent_path());
  std::ofstream(path) << text;
}

void check_processors() {
  const int cores = usable_cores(), cpus = usable_cpus();
  check(cores >= 1 && cores <= cpus, "usable_cores");
#ifdef __linux__
  std::thread([&] {
    cpu_set_t mask;
    sched_getaffinity(0, sizeof mask, &mask);
    for (int i = 0, kept = 0; i < CPU_SETSIZE; ++i) {
      if (CPU_ISSET(i, &mask) && kept++ > 0) CPU_CLR(i, &mask);
    }
    sched_setaffinity(0, sizeof mask, &mask);
    check(usable_cores() == 1 && usable_cpus() == 1, "one allowed CPU is one core");
  }).join();
#endif
  std::string root = (std::filesystem::temp_directory_path() / "pool_check_XXXXXX").string();
  if (mkdtemp(root.data()) == nullptr) std::abort();
  const auto quota = [&](const std::string& groups) {
    write_file(root + "/proc/self/cgroup", groups);
    return cgroup_cpu_quota(root);
  };
  check(quota("") == 0 && quota("nonsense\n0:\n::\n") == 0, "no groups: no limit");
  write_file(root + "/sys/fs/cgroup/a/cpu.max", "400000 100000\n");
  write_file(root + "/sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
  write_file(root + "/sys/fs/cgroup/a/b/c/cpu.max", "650000 100000\n");
  check(quota("0::/a/b/c\n") == 4, "v2: the tightest ancestor counts");
  check(quota("0::/a/b\n") == 4 && quota("0::/elsewhere\n") == 0 && quota("0::/\n") == 0,
        "v2: inheritance and no limit");
  write_file(root + "/sys/fs/cgroup/cpu.max", "150000 100000\n");
  check(quota("0::/elsewhere\n") == 1.5 && quota("0::/\n") == 1.5, "v2: the mount's root, as inside a container");
  write_file(root + "/sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "250000\n");
  write_file(root + "/sys/fs/cgroup/cpu/x/cpu.cfs_period_us", "100000\n");
  write_file(root + "/sys/fs/cgroup/cpu/y/cpu.cfs_quota_us", "-1\n");
  write_file(root + "/sys/fs/cgroup/cpu/y/cpu.cfs_period_us", "100000\n");
  check(quota("5:memory:/x\n4:cpu,cpuacct:/x\n") == 2.5 && quota("4:cpuset:/x\n") == 0, "v1: only the cpu controller");
  check(quota("4:cpu:/y\n") == 0, "v1: no limit");
  write_file(root + "/sys/fs/cgroup/a/cpu.max", "-5 0\n");
  check(quota("0::/a\n") == 1.5, "v2: a malformed limit is none");
  std::filesystem::remove_all(root);
}

// Machines as sysfs describes them, in a folder.
struct Sysfs {
  std::string root = (std::filesystem::temp_directory_path() / "pool_check_XXXXXX").string();

  Sysfs() {
    if (mkdtemp(root.data()) == nullptr) std::abort();
  }
  ~Sysfs() { std::filesystem::remove_all(root); }
  Sysfs(const Sysfs&) = delete;
  Sysfs& operator=(const Sysfs&) = delete;

  void cpu(int i, const std::string& siblings, const std::string& file = "", const std::string& text = "") const {
    const std::string folder = root + "/sys/devices/system/cpu/cpu" + std::to_string(i) + "/";
    write_file(folder + "topology/core_cpus_list", siblings + "\n");
    if (!file.empty()) write_file(folder + file, text + "\n");
  }
  std::string counted(const std::vector<int>& allowed) const {
    const Cpus c = find_cpus(root, allowed);
    return std::to_string(c.threads) + " " + std::to_string(c.cores) + " " + std::to_string(c.performance);
  }
};

void check_kinds_of_cores() {
  const std::vector<int> first4 = {0, 1, 2, 3}, first8 = {0, 1, 2, 3, 4, 5, 6, 7};
  {
    const Sysfs plain;  // four cores of two threads
    for (int i = 0; i < 8; ++i) plain.cpu(i, std::to_string(i % 4) + "," + std::to_string(i % 4 + 4));
    check(plain.counted(first8) == "8 4 4" && plain.counted({1, 5, 6}) == "3 2 2", "siblings are one core");
    write_file(plain.root + "/proc/self/cgroup", "0::/\n");
    write_file(plain.root + "/sys/fs/cgroup/cpu.max", "250000 100000\n");
    const Cpus c = find_cpus(plain.root, first8);
    check(c.quota == 2.5 && c.granted(c.performance) == 3 && c.granted(c.threads) == 3 && c.granted(1) == 1,
          "a quota bounds the threads, rounded up");
  }
  {
    const Sysfs hybrid;  // two fast cores of two threads, four slow ones of one; nearly the same clock
    for (int i = 0; i < 4; ++i) hybrid.cpu(i, i < 2 ? "0-1" : "2-3", "cpufreq/cpuinfo_max_freq", "5000000");
    for (int i = 4; i < 8; ++i) hybrid.cpu(i, std::to_string(i), "cpufreq/cpuinfo_max_freq", "4200000");
    check(hybrid.counted(first8) == "8 6 6", "clocks that differ a little are one kind");
    write_file(hybrid.root + "/sys/devices/cpu_core/cpus", "0-3\n");
    write_file(hybrid.root + "/sys/devices/cpu_atom/cpus", "4-7\n");
    check(hybrid.counted(first8) == "8 6 2", "the list of performance cores is believed first");
    check(hybrid.counted({3, 4, 5}) == "3 3 1", "within the affinity mask");
    check(hybrid.counted({4, 5, 6}) == "3 3 3", "a mask of slow cores: all are alike");
    write_file(hybrid.root + "/sys/devices/cpu_core/cpus", "nonsense,-3,7-\n");
    check(hybrid.counted(first8) == "8 6 1" || hybrid.counted(first8) == "8 6 6", "a malformed list ends nothing");
  }
  {
    const Sysfs big_little;  // one prime core, three big, four little
    for (int i = 0; i < 8; ++i)
      big_little.cpu(i, std::to_string(i), "cpu_capacity", i == 7 ? "1024" : i > 3 ? "890" : "280");
    check(big_little.counted(first8) == "8 8 4", "big cores by their capacity");
    big_little.cpu(2, "2", "cpu_capacity", "");
    check(big_little.counted(first8) == "8 8 8", "a CPU without a capacity: nothing is known of any");
  }
  {
    const Sysfs dense;  // two full cores and two dense ones of the same kind that clock lower
    for (int i = 0; i < 4; ++i)
      dense.cpu(i, std::to_string(i), "cpufreq/cpuinfo_max_freq", i < 2 ? "5100000" : "3300000");
    check(dense.counted(first4) == "4 4 2", "by the highest clock where nothing else is said");
  }
  const Sysfs nothing;
  check(nothing.counted(first4) == "4 4 4", "an empty sysfs: every CPU is a core");
}

// A mapped file without content.
struct Mapped {
  size_t size;
  std::string path = (std::filesystem::temp_directory_path() / "pool_check_XXXXXX").string();
  int fd = mkstemp(path.data());
  std::byte* data = nullptr;

  explicit Mapped(size_t bytes) : size(bytes) {
    if (fd < 0 || ftruncate(fd, static_cast<off_t>(size)) != 0) std::abort();
    void* pages = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
    if (pages == MAP_FAILED) std::abort();
    data = static_cast<std::byte*>(pages);
  }
  ~Mapped() {
    munmap(data, size);
    close(fd);
    std::filesystem::remove(path);
  }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;

  std::span<const std::byte> range() const { return {data, size}; }
  // KiB of it that this process has mapped.
  size_t mapped() const {
    std::ifstream maps("/proc/self/smaps");
    bool here = false;
    for (std::string line; std::getline(maps, line);) {
      if (line.find(path) != std::string::npos) here = true;
      if (here && line.starts_with("Rss:")) return std::stoull(line.substr(4));
    }
    return 0;
  }
};

void check_mapping_ahead() {
  constexpr size_t kLarge = MapAhead::kWorthwhile + (size_t{5} << 20) + 1;
  {
    const Mapped probe(4096);
    if (madvise(probe.data, 4096, 22) != 0) return;  // MADV_POPULATE_READ
  }
  const auto wait_for = [](const auto& done) {
    for (const auto start = Clock::now(); !done() && seconds_since(start) < 60;)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return done();
  };
  {
    const Mapped first(kLarge), second(3 << 20);
    auto ahead = std::make_unique<MapAhead>(std::vector<std::span<const std::byte>>{first.range(), {}, second.range()});
    check(wait_for([&] { return first.mapped() >= kLarge >> 10 && second.mapped() >= 3 << 10; }),
          "all of it is mapped ahead");
    // (The thread sanitizer takes the thread that is given up for a leak.)
    check(kSanitized || in_child([&] {
            ahead.reset();  // must not wait for a thread that is not here
            return true;
          }),
          "the child of a fork gives a mapper up");
    check(kSanitized || in_child([&] {
            const rlimit limit = {1 << 20, 1 << 20};
            setrlimit(RLIMIT_AS, &limit);
            const MapAhead refused({first.range()});
            return true;
          }),
          "a refused thread is no error");
  }
  {
    const Mapped small(MapAhead::kWorthwhile - 1);
    const MapAhead ahead({small.range()});
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    check(small.mapped() == 0, "what is quickly touched is left alone");
  }
  if (!kSanitized) {  // their own maps leave no such room
    const Mapped huge(size_t{1} << 42);
    const MapAhead ahead({huge.range()});
    check(!ahead.unfinished() && huge.mapped() == 0, "what memory cannot hold is left alone");
  }
  {
    const Mapped file(kLarge);
    for (size_t i = 0; i < kLarge; i += 1 << 20) {
      static std::vector<char> bytes(1 << 20);
      if (pread(file.fd, bytes.data(), bytes.size(), static_cast<off_t>(i)) <= 0) std::abort();
    }
    const MapAhead ahead({file.range()});
    const std::atomic<bool> cancelled{true}, wanted{false};
    ahead.help(true, cancelled);
    std::vector<std::thread> helpers;
    for (int i = 0; i < 3; ++i) helpers.emplace_back([&] { ahead.help(true, wanted); });
    for (std::thread& helper : helpers) helper.join();
    check(!ahead.unfinished(), "helpers leave no piece of a file in memory that nobody has begun");
    check(wait_for([&] { return file.mapped() >= kLarge >> 10; }), "with helpers all of it is mapped");
  }
  for (int i = 0; i < 50; ++i) {
    const Mapped file(kLarge);
    const MapAhead ahead({file.range()});
    const std::atomic<bool> wanted{false};
    if (i % 5 == 0) ahead.help(i % 10 == 0, wanted);
    std::this_thread::sleep_for(std::chrono::microseconds(37 * i));
    if (i % 2 == 0 && ftruncate(file.fd, i << 16) != 0) std::abort();  // no SIGBUS in the mapper
  }
  check(true, "a mapper ends before its file, whole or cut");
}

}  // namespace

int main() {
  const int rounds = kSanitized ? 2000 : 50000;  // two barriers each
  double each[9] = {};
  for (const int threads : {1, 2, 3, 4, 8})
    each[threads] = check_barriers(threads, threads <= 2 ? rounds : rounds / 10);
  for (const int threads : {1, 2, 3, 4, 5, 6, 7, 8}) check_loops(threads);
  check_sizes();
  check_parking();
  check_descheduled();
  check_lifetimes(kSanitized ? 100 : 1000);
  check_independent_pools();
  check_misuse();
  check_signals();
  check_fork();
  check_refusal();
  check_processors();
  check_kinds_of_cores();
  check_team_size();
  check_mapping_ahead();
  std::printf("barrier: %.2f us with 2 threads, %.2f with 4, %.2f with 8 on %d CPUs (%d cores)\n", each[2] * 1e6,
              each[4] * 1e6, each[8] * 1e6, usable_cpus(), usable_cores());
  std::printf("pool_check: %ld checks, %ld failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
