// Threads, cancels, destructions, forks and changed files through the C interface, at random instants.
//
//   concurrency_check MODEL [NAME=COUNT]...
// NAME: generations, cancels, destroys, cycles, forks, changes; those not named get a quick share, 0 leaves one out;
// slow=1 is for cancels of large models: longer texts and waits, no answers to compare. Exit status 1 on failure.
// Meant to run under -fsanitize=thread and address as well; forks are left out under the former.
#include <dirent.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "api/pyengine.h"

namespace {

using Clock = std::chrono::steady_clock;
using Tokens = std::vector<int32_t>;

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

constexpr size_t kPrompts = 16;
constexpr size_t kAnswer = 6;  // tokens of a generation
constexpr uint32_t kContext = 128;

std::atomic<long> checks{0}, failures{0};
std::mutex printing;

void check(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  const std::lock_guard lock(printing);
  if (++failures <= 30) std::printf("FAILED: %s\n", what.c_str());
}

std::string last_message() { return pe_last_error()->message; }
bool last_code_is(const char* code) { return strcmp(pe_last_error()->code, code) == 0; }

void require(pe_status status, const char* what) {
  if (status == PE_OK) return;
  std::printf("%s: %s\n", what, pe_last_error()->message);
  exit(1);
}

pe_model* open_model(const char* path, pe_load load = PE_LOAD_MMAP) {
  pe_model_options o;
  pe_model_options_init(&o);
  o.load = load;
  pe_model* model = nullptr;
  require(pe_model_open(path, &o, &model), "pe_model_open");
  return model;
}

pe_session* create(pe_model* model, uint32_t threads, uint32_t context = kContext) {
  pe_session_options o;
  pe_session_options_init(&o);
  o.n_ctx = context;
  o.n_threads = threads;
  pe_session* session = nullptr;
  require(pe_session_create(model, &o, &session), "pe_session_create");
  return session;
}

uint32_t vocabulary(pe_model* model) {
  pe_model_info info;
  pe_model_info_init(&info);
  require(pe_model_get_info(model, &info), "pe_model_get_info");
  return info.n_vocab;
}

// Prompts in families that begin alike, so that sessions take over each other's beginnings.
Tokens prompt(size_t i) {
  Tokens ids;
  for (size_t k = 0; k < 20 + i * 5; ++k)
    ids.push_back(static_cast<int32_t>(3 + (k < 16 ? k + i % 4 : k * k + i) % 180));
  return ids;
}

// The ids of a greedy answer, or the status that ended it.
pe_status generate(pe_session* session, uint32_t n_vocab, size_t which, Tokens* answer) {
  Tokens ids = prompt(which);
  std::vector<float> logits(n_vocab);
  answer->clear();
  size_t known = 0;
  pe_status status = pe_session_reuse(session, ids.data(), ids.size(), &known);
  ids.erase(ids.begin(), ids.begin() + static_cast<ptrdiff_t>(known));
  while (status == PE_OK) {
    status = pe_session_eval(session, ids.data(), ids.size(), PE_LOGITS_LAST, logits.data(), n_vocab);
    if (status != PE_OK) break;
    int32_t id = 0;
    float value = 0;
    size_t found = 0;
    status = pe_top_k(logits.data(), n_vocab, 1, &id, &value, &found);
    answer->push_back(id);
    if (answer->size() == kAnswer) break;
    ids = {id};
  }
  return status;
}

std::vector<Tokens> expected_answers(pe_model* model) {
  std::vector<Tokens> out(kPrompts);
  for (size_t i = 0; i < kPrompts; ++i) {
    pe_session* alone = create(model, 1);
    require(generate(alone, vocabulary(model), i, &out[i]), "generate");
    pe_session_free(alone);
  }
  return out;
}

struct Random {
  explicit Random(size_t seed) : engine(static_cast<unsigned>(seed)) {}
  size_t below(size_t n) { return engine() % n; }
  std::mt19937 engine;
};

void sleep_us(size_t us) { std::this_thread::sleep_for(std::chrono::microseconds(us)); }

// ---- 32 threads on one model ----

void check_generations(const char* path, long wanted, const std::vector<Tokens>& expected) {
  pe_model* const model = open_model(path);
  const uint32_t n_vocab = vocabulary(model);
  std::atomic<long> left{wanted}, done{0}, wrong{0};
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 32; ++t)
    threads.emplace_back([&, t] {
      Random random(t);
      pe_session* session = nullptr;
      Tokens answer;
      while (left-- > 0) {
        if (!session) session = create(model, 1 + static_cast<uint32_t>(random.below(2)));
        const size_t which = random.below(kPrompts);
        const pe_status status = generate(session, n_vocab, which, &answer);
        wrong += status != PE_OK || answer != expected[which];
        ++done;
        if (random.below(4) == 0) {
          pe_session_free(session);
          session = nullptr;
        }
      }
      pe_session_free(session);
    });
  for (std::thread& thread : threads) thread.join();
  pe_model_close(model);
  check(wrong == 0, std::to_string(wrong) + " of " + std::to_string(done) + " generations differ or failed");
  check(done >= wanted, "all generations were made");
  std::printf("generations: %ld on 32 threads of one model, %ld wrong\n", done.load(), wrong.load());
}

// ---- cancels ----

struct Latencies {
  std::vector<double> ms;
  double at(double p) {
    if (ms.empty()) return 0;
    std::sort(ms.begin(), ms.end());
    return ms[std::min(ms.size() - 1, static_cast<size_t>(p * static_cast<double>(ms.size())))];
  }
};

// `body` runs until it is cancelled and says with what status; `cancel` is called at a random instant of it.
template <class Body, class Cancel>
void cancel_once(Random& random, size_t within_us, Latencies& latencies, const char* what, Body body, Cancel cancel) {
  std::atomic<bool> begun{false};
  pe_status status = PE_OK;
  Clock::time_point back;
  std::thread worker([&] {
    begun = true;
    status = body();
    back = Clock::now();
  });
  while (!begun) std::this_thread::yield();
  sleep_us(random.below(within_us));
  const Clock::time_point asked = Clock::now();
  cancel();
  worker.join();
  check(status == PE_E_CANCELLED, std::string(what) + " ends with status " + std::to_string(status));
  latencies.ms.push_back(std::chrono::duration<double, std::milli>(back - asked).count());
}

void check_cancels(const char* path, long wanted, bool slow, const std::vector<Tokens>& expected) {
  std::map<std::string, Latencies> all;
  Random random(1);
  pe_model* const model = open_model(path);
  const uint32_t n_vocab = vocabulary(model);
  const uint32_t context = slow ? 1024 : 512;
  pe_session* const session = create(model, 2, context);
  const Tokens text(context - 1, 5);
  Tokens answer;
  std::vector<float> logits(n_vocab);
  const auto truncate = [&] { require(pe_session_truncate(session, 0), "pe_session_truncate"); };
  const auto cancel = [&] { pe_session_cancel(session); };
  for (long i = 0; i < wanted; ++i) {
    const size_t within_us = slow ? 1'000'000 : 4000;
    switch (i % 3) {
      case 0: {
        std::atomic<bool> stop{false};
        pe_model_options o;
        pe_model_options_init(&o);
        o.load = PE_LOAD_COPY;
        o.user = &stop;
        o.progress = [](void* user, float) -> int32_t { return static_cast<std::atomic<bool>*>(user)->load(); };
        cancel_once(
            random, within_us, all["load"], "a load",
            [&] {
              for (;;) {
                pe_model* other = nullptr;
                const pe_status status = pe_model_open(path, &o, &other);
                if (status != PE_OK) return status;
                pe_model_close(other);
              }
            },
            [&] { stop = true; });
        break;
      }
      case 1:
        truncate();
        cancel_once(
            random, within_us, all["prefill"], "a prefill",
            [&] {
              for (;;) {
                const pe_status status = pe_session_eval(session, text.data(), text.size(), PE_LOGITS_NONE, nullptr, 0);
                if (status != PE_OK) return status;
                truncate();
              }
            },
            cancel);
        break;
      default:
        truncate();
        cancel_once(
            random, within_us, all["decode"], "a decode",
            [&] {
              for (int32_t id = 3;; id = 3 + id % 100) {
                const pe_status status = pe_session_eval(session, &id, 1, PE_LOGITS_LAST, logits.data(), n_vocab);
                if (status != PE_OK) return status;
                if (pe_session_length(session) == context) truncate();
              }
            },
            cancel);
        break;
    }
    if (i % 64 == 63 && !slow) {  // and the session is none the worse for it
      const size_t which = random.below(kPrompts);
      check(generate(session, n_vocab, which, &answer) == PE_OK && answer == expected[which],
            "a session answers rightly after cancels");
    }
  }
  pe_session_free(session);
  pe_model_close(model);
  for (auto& [name, latencies] : all) {
    std::printf("cancels in %s: %zu, back after %.2f ms (median), %.2f ms (p99), %.2f ms (longest)\n", name.c_str(),
                latencies.ms.size(), latencies.at(0.5), latencies.at(0.99), latencies.at(1.0));
    // The promise is 250 ms for all; on a machine that others use too, most of them have to do.
    check(latencies.at(0.5) <= 250, "cancels in " + name + " are answered in time");
  }
}

// ---- destruction ----

void check_destroys(const char* path, long wanted, const std::vector<Tokens>& expected) {
  Random random(2);
  pe_model* model = open_model(path);
  const uint32_t n_vocab = vocabulary(model);
  long cancelled = 0, finished = 0;
  for (long i = 0; i < wanted; ++i) {
    pe_session* const session = create(model, 1 + static_cast<uint32_t>(random.below(3)), 512);
    const bool close_model_too = random.below(10) == 0;
    pe_status status = PE_OK;
    std::atomic<bool> over{false};
    std::thread worker([&] {
      const Tokens text(500, 7);
      do status = pe_session_eval(session, text.data(), text.size(), PE_LOGITS_NONE, nullptr, 0);
      while (status == PE_E_ARGUMENT && last_code_is("busy"));  // the other thread was asking
      over = true;
    });
    // Freed only when a call has begun and none will begin any more: "busy" says that the eval is inside.
    while (!over) {
      if (pe_session_eval(session, nullptr, 0, PE_LOGITS_NONE, nullptr, 0) == PE_E_ARGUMENT && last_code_is("busy"))
        break;
      std::this_thread::yield();
    }
    sleep_us(random.below(3000));
    if (close_model_too) pe_model_close(model);
    pe_session_free(session);
    worker.join();
    if (close_model_too) model = open_model(path);
    cancelled += status == PE_E_CANCELLED;
    finished += status == PE_OK;
    check(status == PE_E_CANCELLED || status == PE_OK, "an eval whose session is freed: " + std::to_string(status));
  }
  pe_session* const session = create(model, 2);
  Tokens answer;
  check(generate(session, n_vocab, 3, &answer) == PE_OK && answer == expected[3], "the model is as it was");
  pe_session_free(session);
  pe_model_close(model);
  check(wanted < 20 || cancelled > wanted / 10, "evals were met while they ran");
  std::printf("destroys while generating: %ld, %ld cancelled, %ld had just finished\n", wanted, cancelled, finished);
}

// ---- what must not grow ----

long entries(const char* folder) {
  long n = 0;
  DIR* dir = opendir(folder);
  while (dir && readdir(dir)) ++n;
  if (dir) closedir(dir);
  return n;
}

struct Footprint {
  long descriptors, threads, mappings, anonymous_kib;
};

Footprint footprint() {
  Footprint f{entries("/proc/self/fd"), entries("/proc/self/task"), 0, 0};
  char line[512];
  FILE* maps = std::fopen("/proc/self/maps", "r");
  while (maps && std::fgets(line, sizeof line, maps)) ++f.mappings;
  if (maps) std::fclose(maps);
  FILE* status = std::fopen("/proc/self/status", "r");
  while (status && std::fgets(line, sizeof line, status)) {
    long kib = 0;
    if (std::sscanf(line, "RssAnon: %ld", &kib) == 1 || std::sscanf(line, "VmSwap: %ld", &kib) == 1)
      f.anonymous_kib += kib;
  }
  if (status) std::fclose(status);
  return f;
}

void check_cycles(const char* path, long wanted, const std::vector<Tokens>& expected) {
  Random random(3);
  Tokens answer;
  const auto cycle = [&](long i) {
    pe_model* const model = open_model(path, i % 16 == 0 ? PE_LOAD_COPY : PE_LOAD_MMAP);
    const uint32_t n_vocab = vocabulary(model);
    pe_session* const one = create(model, 1 + static_cast<uint32_t>(i % 3));
    pe_session* const two = create(model, 2);
    const size_t which = random.below(kPrompts);
    if (i % 4 == 0)
      check(generate(one, n_vocab, which, &answer) == PE_OK && answer == expected[which], "a cycle's answer");
    pe_session_free(one);
    if (i % 2) pe_model_close(model);  // in either order
    pe_session_free(two);
    if (i % 2 == 0) pe_model_close(model);
  };
  const long warm = std::min<long>(wanted, 100);
  for (long i = 0; i < warm; ++i) cycle(i);
  const Footprint before = footprint();
  for (long i = 0; i < wanted; ++i) cycle(i);
  const Footprint after = footprint();
  check(after.descriptors == before.descriptors, "descriptors stay");
  check(after.threads == before.threads, "threads stay");
  check(after.mappings <= before.mappings + 8, "mappings stay");
  check(kThreadSanitizer || after.anonymous_kib <= before.anonymous_kib + 4096, "anonymous memory stays");
  std::printf(
      "create/destroy cycles: %ld; descriptors %ld -> %ld, threads %ld -> %ld, mappings %ld -> %ld, "
      "anonymous memory %ld -> %ld KiB\n",
      wanted, before.descriptors, after.descriptors, before.threads, after.threads, before.mappings, after.mappings,
      before.anonymous_kib, after.anonymous_kib);
}

// ---- forks ----

// 0, or the line of the child's check that failed.
int in_child(pe_model* model, pe_session* idle, const std::vector<pe_session*>& busy, const char* path,
             const std::vector<Tokens>& expected) {
  const uint32_t n_vocab = vocabulary(model);
  Tokens answer;
  const auto right = [&](pe_session* session, size_t which) {
    return generate(session, n_vocab, which, &answer) == PE_OK && answer == expected[which];
  };
  if (!right(idle, 1)) return __LINE__;
  for (pe_session* session : busy) {  // between two evals at the fork: works; inside one: says so
    const pe_status status = generate(session, n_vocab, 2, &answer);
    if (status == PE_OK ? answer != expected[2] : status != PE_E_ARGUMENT || !last_code_is("busy")) return __LINE__;
  }
  pe_session* own = create(model, 2);
  if (!right(own, 4)) return __LINE__;
  pe_model* other = open_model(path);
  pe_session* fresh = create(other, 2);
  if (!right(fresh, 5)) return __LINE__;
  pe_session_free(fresh);
  pe_model_close(other);
  pe_session_free(own);
  for (pe_session* session : busy) pe_session_free(session);
  pe_session_free(idle);
  pe_model_close(model);
  return 0;
}

void check_forks(const char* path, long wanted, const std::vector<Tokens>& expected) {
  if (kThreadSanitizer) return;  // which does not follow threads into a child
  pe_model* const model = open_model(path);
  const uint32_t n_vocab = vocabulary(model);
  pe_session* const idle = create(model, 2);
  Tokens answer;
  generate(idle, n_vocab, 0, &answer);
  std::vector<pe_session*> busy;
  for (uint32_t t = 0; t < 4; ++t) busy.push_back(create(model, 1 + t % 2));
  std::atomic<bool> stop{false};
  std::atomic<long> wrong{0}, made{0};
  const auto one_fork = [&](const std::vector<pe_session*>& running, const char* when) {
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
      alarm(60);
      const int line = in_child(model, idle, running, path, expected);
      if (line) std::printf("line %d in the child: %s\n", line, pe_last_error()->message), std::fflush(stdout);
      _exit(line != 0);
    }
    int status = -1;
    const bool good = waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
    check(good, std::string("the child of a fork ") + when + ": wait status " + std::to_string(status));
  };
  for (long i = 0; i < wanted / 4; ++i) one_fork(busy, "while idle");
  std::vector<std::thread> threads;
  for (size_t t = 0; t < busy.size(); ++t)
    threads.emplace_back([&, t] {
      Random random(t);
      Tokens mine;
      while (!stop) {
        const size_t which = random.below(kPrompts);
        wrong += generate(busy[t], n_vocab, which, &mine) != PE_OK || mine != expected[which];
        ++made;
      }
    });
  Random random(9);
  for (long i = 0; i < wanted - wanted / 4; ++i) {
    sleep_us(random.below(2000));
    one_fork(busy, "while generating");
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  check(wrong == 0 && (wanted == 0 || made > 0), "the parent's threads go on undisturbed");
  for (pe_session* session : busy) pe_session_free(session);
  pe_session_free(idle);
  pe_model_close(model);
  std::printf("forks: %ld, meanwhile %ld generations in the parent, %ld wrong\n", wanted, made.load(), wrong.load());
}

// ---- files that change ----

std::string copy_of(const std::string& path, std::vector<char>* bytes) {
  FILE* in = std::fopen(path.c_str(), "rb");
  if (!in) exit(1);
  bytes->resize(16u << 20);
  bytes->resize(std::fread(bytes->data(), 1, bytes->size(), in));
  std::fclose(in);
  const char* folder = getenv("TMPDIR");
  std::string name = std::string(folder && *folder ? folder : "/tmp") + "/concurrency_check_XXXXXX";
  const int fd = mkstemp(name.data());
  if (fd < 0 || write(fd, bytes->data(), bytes->size()) != static_cast<ssize_t>(bytes->size())) exit(1);
  close(fd);
  return name;
}

sigjmp_buf own_fault;
volatile sig_atomic_t own_faults = 0;
void on_own_fault(int) {
  own_faults = own_faults + 1;
  siglongjmp(own_fault, 1);
}

// A fault outside every model is the host's: its handler, there before ours, still gets it.
void check_host_faults() {
  char name[] = "/tmp/concurrency_check_XXXXXX";
  const int fd = mkstemp(name);
  if (fd < 0 || ftruncate(fd, 4096) != 0) exit(1);
  unlink(name);
  const auto* page = static_cast<const volatile char*>(mmap(nullptr, 4096, PROT_READ, MAP_SHARED, fd, 0));
  if (ftruncate(fd, 0) != 0) exit(1);
  const int before = own_faults;
  if (sigsetjmp(own_fault, 1) == 0) {
    static_cast<void>(*page);
    check(false, "the host's own fault was swallowed");
  }
  check(own_faults == before + 1, "the host's handler got the host's fault");
  munmap(const_cast<char*>(page), 4096);
  close(fd);
}

// One model file is cut, emptied, overwritten, replaced or deleted while threads generate from it.
void check_changes(const char* path, long wanted, const std::vector<Tokens>& expected) {
  struct sigaction action = {};
  action.sa_handler = on_own_fault;
  sigaction(SIGBUS, &action, nullptr);
  require(pe_guard_mapped_files(), "pe_guard_mapped_files");
  require(pe_guard_mapped_files(), "pe_guard_mapped_files, again");
  check_host_faults();
  std::vector<char> bytes;
  Random random(4);
  long told = 0;
  enum { kCut, kEmptied, kOverwritten, kGrown, kReplaced, kDeleted, kHow };
  for (long i = 0; i < wanted; ++i) {
    const std::string name = copy_of(path, &bytes);
    const auto how = static_cast<int>(i % kHow);
    pe_model* const model = open_model(name.c_str());
    const uint32_t n_vocab = vocabulary(model);
    std::atomic<bool> changed{false};
    std::atomic<long> wrong{0}, errors{0};
    std::vector<std::thread> threads;
    for (size_t t = 0; t < 4; ++t)
      threads.emplace_back([&, t] {
        pe_session* const session = create(model, 1 + static_cast<uint32_t>(t % 2));
        Tokens answer;
        for (int after = 0; after < 3;) {
          after += changed;  // a few generations more
          const size_t which = (t + static_cast<size_t>(after)) % kPrompts;
          const pe_status status = generate(session, n_vocab, which, &answer);
          if (status == PE_OK)
            wrong += answer != expected[which] || (after > 1 && how != kReplaced && how != kDeleted);
          else if (status == PE_E_IO && last_code_is("file_changed"))
            ++errors;
          else
            ++wrong;
        }
        pe_session_free(session);
      });
    sleep_us(random.below(5000));
    const std::string other = name + "x";
    switch (how) {
      case kCut: check(truncate(name.c_str(), static_cast<off_t>(random.below(bytes.size()))) == 0, "truncate"); break;
      case kEmptied: check(truncate(name.c_str(), 0) == 0, "truncate"); break;
      case kOverwritten: {
        const int fd = open(name.c_str(), O_WRONLY);
        const std::vector<char> garbage(bytes.size(), static_cast<char>(random.below(256)));
        check(write(fd, garbage.data(), garbage.size()) == static_cast<ssize_t>(garbage.size()), "write");
        close(fd);
        break;
      }
      case kGrown: check(truncate(name.c_str(), static_cast<off_t>(bytes.size() + 4096)) == 0, "truncate"); break;
      case kReplaced: {
        const int fd = open(other.c_str(), O_WRONLY | O_CREAT, 0600);
        check(write(fd, "x", 1) == 1 && rename(other.c_str(), name.c_str()) == 0, "rename");
        close(fd);
        break;
      }
      default: check(unlink(name.c_str()) == 0, "unlink"); break;
    }
    changed = true;
    for (std::thread& thread : threads) thread.join();
    told += errors;
    check(wrong == 0, "change " + std::to_string(how) + ": " + std::to_string(wrong) + " wrong answers or statuses");
    const bool harmless = how == kReplaced || how == kDeleted;
    check(harmless ? errors == 0 : errors >= 4, "change " + std::to_string(how) + " is told to whom it concerns");
    const pe_status state = pe_file_check(pe_model_file(model));
    check(state == (harmless ? PE_OK : PE_E_IO), "pe_file_check: " + last_message());
    pe_model_close(model);
    unlink(name.c_str());
  }
  check_host_faults();
  std::printf("files changed while generating: %ld, told %ld times\n", wanted, told);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  setvbuf(stdout, nullptr, _IOLBF, 1 << 16);
  std::map<std::string, long> counts{{"generations", 200}, {"cancels", 200}, {"destroys", 60}, {"cycles", 100},
                                     {"forks", 24},        {"changes", 24},  {"slow", 0}};
  for (int i = 2; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t at = argument.find('=');
    if (at == std::string::npos || !counts.count(argument.substr(0, at))) return 2;
    counts[argument.substr(0, at)] = std::atol(argument.c_str() + at + 1);
  }
  const char* path = argv[1];
  std::vector<Tokens> expected(kPrompts);
  if (!counts["slow"]) {
    pe_model* const model = open_model(path);
    expected = expected_answers(model);
    pe_model_close(model);
    check(expected[0] != expected[5] || expected[1] != expected[6], "answers depend on prompts");
  }
  if (counts["forks"]) check_forks(path, counts["forks"], expected);  // first: few threads have been
  if (counts["cycles"]) check_cycles(path, counts["cycles"], expected);
  if (counts["generations"]) check_generations(path, counts["generations"], expected);
  if (counts["cancels"]) check_cancels(path, counts["cancels"], counts["slow"] != 0, expected);
  if (counts["destroys"]) check_destroys(path, counts["destroys"], expected);
  if (counts["changes"]) check_changes(path, counts["changes"], expected);
  std::printf("concurrency_check: %ld checks, %ld failures\n", checks.load(), failures.load());
  return failures == 0 ? 0 : 1;
}
