// Opens every kind of malformed model there is, millions of them, and asks for what PROMISES says each time: a model that
// runs, or an error with code, place, field and sentence; no crash, no hang, a bounded heap, nothing leaked.
// Best under AddressSanitizer and UndefinedBehaviorSanitizer ("make hostile").
//
//   hostile_check list                       the names of the 81 classes
//   hostile_check incidents                  one file for each publicly known kind of vulnerability; prints the table
//   hostile_check classes CASES [NAME]       CASES files of every class (or of those whose names begin with NAME)
//   hostile_check cut STEP                   six small models cut at every STEP-th byte
//   hostile_check bytes STEP                 every STEP-th of 4,096 metadata bytes of three models, by all 255 others
//   hostile_check integers STEP              every STEP-th integer of six models, by 48 boundary values
//   hostile_check case NAME NUMBER           one case, here and now, for a debugger
//   hostile_check write FOLDER               six small models and the files of the incidents: what the fuzzers start from
//   hostile_check emit NAME FIRST COUNT      the files themselves on stdout, for the Python half (text_half.py)
// Cases run in JOBS processes (environment; default: one a core). One that dies is named, counted and left behind.
// Exit status 1: a promise was broken.
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <thread>

#include "boundary.h"
#include "classes.h"
#include "incidents.h"
#include "judge.h"

namespace {

using namespace hostile;
namespace fs = std::filesystem;

constexpr double kSecondsPerMiB = 1;
constexpr int kMaxFailures = 20;

struct Suite {
  std::string name;
  uint64_t count;
  std::function<std::string(uint64_t)> describe;
  std::function<std::string(uint64_t)> run;  // the answer, after all was checked
  std::vector<std::string> groups = {};      // what the counts are kept by; one when empty
  std::function<size_t(uint64_t)> group = [](uint64_t) { return 0; };
};

// ---------------------------------------------------------------- time, heap and folders of one case

std::string g_folder;    // of this process, for cases about files
std::string g_describe;  // the running case

void on_hang(int) {  // CPU time is up
  const char text[] = "\nbroken promise: no more than a second a MiB\n";
  if (write(2, g_describe.data(), g_describe.size()) < 0 || write(2, text, sizeof text - 1) < 0) _exit(3);
  abort();
}

double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// The limits on one case: CPU time (a machine in use must not fail it), a wall for what blocks, and leaks.
template <class Run>
std::string limited(uint64_t bytes, Run run) {
  const double limit = kSecondsPerMiB * std::max(1.0, static_cast<double>(bytes) / (1 << 20));
  static constexpr itimerval kNever{};
  const itimerval timer{{0, 0}, {static_cast<time_t>(limit) + 1, 0}};
  setitimer(ITIMER_PROF, &timer, nullptr);
  alarm(60 + static_cast<unsigned>(limit));
  static std::string kept;  // holds the answer without an allocation that would be counted
  kept.reserve(256);
  const int64_t live = heap::live;
  const double before = cpu_seconds();
  kept = std::string_view(run());  // a copy: moved in, its memory would be another
  const double took = cpu_seconds() - before;
  alarm(0);
  setitimer(ITIMER_PROF, &kNever, nullptr);
  const int64_t leaked = heap::live - live;
  require(leaked == 0, "nothing is leaked", kept + ": " + std::to_string(leaked));
  require(took <= limit, "no more than a second a MiB", std::to_string(took));
  return kept;
}

fs::path make_folder() {
  std::string name = (fs::temp_directory_path() / "pe-hostile-XXXXXX").string();
  require(mkdtemp(name.data()) != nullptr, "a folder can be made");
  return name;
}

void empty_folder() {
  for (const auto& entry : fs::directory_iterator(g_folder)) fs::remove_all(entry);
}

// ---------------------------------------------------------------- one case

// What the files of a case take, holes not counted, and how long the longest is.
struct OnDisk {
  uint64_t bytes = 0, longest = 0;
};

OnDisk on_disk() {
  OnDisk out;
  for (const auto& entry : fs::directory_iterator(g_folder)) {
    struct stat info;
    if (::lstat(entry.path().c_str(), &info) != 0 || !S_ISREG(info.st_mode)) continue;
    out.bytes += static_cast<uint64_t>(info.st_blocks) * 512;
    out.longest = std::max(out.longest, static_cast<uint64_t>(info.st_size));
  }
  return out;
}

std::string answer_on_disk(const Case& c, pe::gguf::Load load) {
  empty_folder();
  const std::string path = c.place(g_folder);
  const OnDisk disk = on_disk();
  return limited(disk.bytes, [&] {
    return answer(disk.longest, disk.bytes, c.evaluate, [&] {
      bool first = true;
      auto file = pe::gguf::File::open(path, load, [&](float) {
        if (first && c.while_loading) c.while_loading(path);
        first = false;
        return false;
      });
      if (c.after_mapping) c.after_mapping(path);
      return file;
    });
  });
}

std::string run_case(const Case& c) {
  std::string result;
  if (c.place) {
    for (const pe::gguf::Load load : c.loads) result = answer_on_disk(c, load);
    empty_folder();
  } else {
    std::string bytes = c.raw ? *c.raw : c.file.build();
    // A heap block of exactly this size, so that a sanitizer sees the first byte read past it.
    const std::unique_ptr<std::byte[]> exact(new std::byte[bytes.size()]);
    std::memcpy(exact.get(), bytes.data(), bytes.size());
    result = limited(bytes.size(), [&] {
      return answer(bytes.size(), bytes.size(), c.evaluate, [&] {
        auto file = pe::gguf::File::from_memory({exact.get(), bytes.size()});
        if (c.after_opening) {
          c.after_opening(bytes);
          std::memcpy(exact.get(), bytes.data(), bytes.size());
        }
        return file;
      });
    });
  }
  const bool expected = one_of(result, c.expect) || (one_of("error", c.expect) && result != "runs");
  require(expected, "the answer is the expected one", result + "; expected " + c.expect);
  return result;
}

// ---------------------------------------------------------------- many cases, in processes of their own

struct Shared {
  std::atomic<uint64_t> next;
  std::atomic<uint64_t> opened[128], refused[128];
  struct Place {
    std::atomic<uint64_t> at, end;  // the case that runs, and where this process's share ends
  } places[64];
};

void work(const Suite& suite, Shared& shared, size_t me) {
  constexpr uint64_t kShare = 32;
  signal(SIGPROF, on_hang);
  g_folder = make_folder().string();
  Shared::Place& place = shared.places[me];
  describe_case = [&] {
    const std::string text = suite.name + ": " + g_describe;
    std::fprintf(stderr, "%s\n", text.c_str());
  };
  for (;;) {
    if (place.at == place.end) {
      const uint64_t begin = shared.next.fetch_add(kShare);
      if (begin >= suite.count) break;
      place.at = begin;
      place.end = std::min(begin + kShare, suite.count);
    }
    const uint64_t item = place.at;
    g_describe = suite.describe(item);
    const std::string result = suite.run(item);
    const bool opened = result == "runs" || result == "not_finite";
    ++(opened ? shared.opened : shared.refused)[suite.group(item)];
    ++place.at;
  }
  fs::remove_all(g_folder);
}

int run_suite(const Suite& suite) {
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  require(memory != MAP_FAILED, "shared memory");
  Shared& shared = *new (memory) Shared();
  const char* jobs_text = std::getenv("JOBS");
  const size_t jobs =
      std::clamp<size_t>(jobs_text ? std::stoul(jobs_text) : std::thread::hardware_concurrency(), 1, 64);
  int failures = 0;
  std::map<pid_t, size_t> running;
  std::fflush(nullptr);
  const auto start = [&](size_t me) {
    const pid_t child = fork();
    require(child >= 0, "a process can be started");
    if (child == 0) {
      work(suite, shared, me);
      std::fflush(nullptr);
      std::exit(0);  // the leak sanitizer looks now
    }
    running[child] = me;
  };
  for (size_t me = 0; me < jobs; ++me) start(me);
  while (!running.empty()) {
    int status = 0;
    const pid_t child = waitpid(-1, &status, 0);
    const size_t me = running.at(child);
    running.erase(child);
    if (status == 0) continue;
    ++failures;
    Shared::Place& place = shared.places[me];
    const uint64_t item = place.at;
    const bool at_work = item < place.end;
    std::printf("FAILED (%s %d) %s: %s\n", WIFSIGNALED(status) ? "signal" : "exit",
                WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status), suite.name.c_str(),
                at_work ? suite.describe(item).c_str() : "when it ended");
    std::fflush(nullptr);
    if (!at_work || failures >= kMaxFailures) continue;
    ++place.at;
    start(me);
  }
  uint64_t opened = 0, refused = 0;
  for (size_t i = 0; i < std::max<size_t>(1, suite.groups.size()); ++i) {
    if (!suite.groups.empty())
      std::printf("  %-26s %8llu opened %8llu refused\n", suite.groups[i].c_str(),
                  static_cast<unsigned long long>(shared.opened[i].load()),
                  static_cast<unsigned long long>(shared.refused[i].load()));
    opened += shared.opened[i];
    refused += shared.refused[i];
  }
  const uint64_t missing = suite.count - opened - refused;
  std::printf("%s: %llu cases, %llu opened, %llu refused, %d failures\n", suite.name.c_str(),
              static_cast<unsigned long long>(opened + refused), static_cast<unsigned long long>(opened),
              static_cast<unsigned long long>(refused), failures);
  if (missing && !failures) std::printf("%llu cases are missing\n", static_cast<unsigned long long>(missing));
  std::fflush(nullptr);
  munmap(memory, sizeof(Shared));
  return failures || missing ? 1 : 0;
}

// ---------------------------------------------------------------- the suites

std::string answer_bytes(const std::string& bytes) {
  const std::unique_ptr<std::byte[]> exact(new std::byte[bytes.size()]);
  std::memcpy(exact.get(), bytes.data(), bytes.size());
  return limited(bytes.size(), [&] { return answer_in_memory({exact.get(), bytes.size()}); });
}

Suite classes(uint64_t cases, const std::string& prefix) {
  std::vector<const Class*> chosen;
  for (const Class& c : kClasses)
    if (std::string_view(c.name).starts_with(prefix)) chosen.push_back(&c);
  Suite suite{"malformed", cases * chosen.size(), {}, {}};
  for (const Class* c : chosen) suite.groups.emplace_back(c->name);
  suite.group = [cases](uint64_t i) { return i / cases; };
  suite.describe = [=](uint64_t i) {
    return "case " + std::string(chosen[i / cases]->name) + " " + std::to_string(i % cases);
  };
  suite.run = [=](uint64_t i) { return run_case(make_case(*chosen[i / cases], i % cases)); };
  return suite;
}

Suite incidents() {
  Suite suite{"incidents", std::size(kIncidents), {}, {}};
  suite.describe = [](uint64_t i) { return std::string(kIncidents[i].what); };
  suite.run = [](uint64_t i) {
    Case c;
    kIncidents[i].make(c);
    std::string result = run_case(c);
    const std::string then = c.text.empty() ? "" : "; tokenizer and template: `" + c.text + "`";
    std::printf("| %s | %s | `%s` | `%s`%s |\n", kIncidents[i].known_as, kIncidents[i].what, kIncidents[i].of_class,
                result.c_str(), then.c_str());
    std::fflush(stdout);
    return result;
  };
  return suite;
}

struct Built {
  std::string bytes;
  Layout layout;
};

Suite cut(uint64_t step) {
  auto files = std::make_shared<std::vector<Built>>(kSmallFiles);
  auto starts = std::make_shared<std::vector<uint64_t>>();
  uint64_t total = 0;
  for (size_t i = 0; i < kSmallFiles; ++i) {
    (*files)[i].bytes = small_file(i).build(&(*files)[i].layout);
    starts->push_back(total);
    total += ((*files)[i].bytes.size() + step - 1) / step;
  }
  const auto find = [starts](uint64_t i) {
    return static_cast<size_t>(std::upper_bound(starts->begin(), starts->end(), i) - starts->begin()) - 1;
  };
  Suite suite{"truncation", total, {}, {}};
  suite.describe = [=](uint64_t i) {
    return "small file " + std::to_string(find(i)) + " cut to " + std::to_string((i - (*starts)[find(i)]) * step);
  };
  suite.run = [=](uint64_t i) {
    const Built& file = (*files)[find(i)];
    const uint64_t size = (i - (*starts)[find(i)]) * step;
    const std::string result = answer_bytes(file.bytes.substr(0, size));
    const uint64_t needed = small_file(find(i)).tensors.back().data.size();
    const uint64_t end = file.bytes.size() - (needed + 31) / 32 * 32 + needed;
    const bool whole = size >= end;
    require((result == "runs") == whole, "a cut file is refused", result);
    require(whole || size == 0 || one_of(result, "truncated_header truncated_data"), "a cut file is called that",
            result);
    return result;
  };
  return suite;
}

constexpr size_t kMetadata = 4096;

// Small files whose header has exactly so many bytes.
std::vector<Built> files_of_4096() {
  std::vector<Built> out;
  for (const size_t index : {1, 2, 5}) {
    Gguf file = small_file(index);
    file.set("general.description", STRING, text(""));
    Built built;
    file.build(&built.layout);
    require(built.layout.header < kMetadata, "the header is small enough");
    file.set("general.description", STRING, text(Random(index).letters(kMetadata - built.layout.header)));
    built.layout = {};
    built.bytes = file.build(&built.layout);
    require(built.layout.header == kMetadata, "the header has 4,096 bytes");
    out.push_back(std::move(built));
  }
  return out;
}

Suite bytes(uint64_t step) {
  auto files = std::make_shared<std::vector<Built>>(files_of_4096());
  const uint64_t places = (kMetadata + step - 1) / step;
  Suite suite{"byte substitution", files->size() * places * 255, {}, {}};
  const auto changed = [=](uint64_t i) {
    std::string bytes = (*files)[i / 255 / places].bytes;
    char& byte = bytes[i / 255 % places * step];
    byte = static_cast<char>(static_cast<unsigned char>(byte) + 1 + i % 255);
    return bytes;
  };
  suite.describe = [=](uint64_t i) {
    return "file " + std::to_string(i / 255 / places) + ", byte " + std::to_string(i / 255 % places * step) +
           ", plus " + std::to_string(1 + i % 255);
  };
  suite.run = [=](uint64_t i) { return answer_bytes(changed(i)); };
  return suite;
}

Suite integers(uint64_t step) {
  static const std::vector<uint64_t> kValues = boundary_integers();
  struct Item {
    size_t file;
    Integer at;
  };
  auto files = std::make_shared<std::vector<Built>>(kSmallFiles);
  auto items = std::make_shared<std::vector<Item>>();
  for (size_t i = 0; i < kSmallFiles; ++i) {
    Built& built = (*files)[i];
    built.bytes = small_file(i).build(&built.layout);
    for (size_t k = 0; k < built.layout.integers.size(); k += step) items->push_back({i, built.layout.integers[k]});
  }
  Suite suite{"boundary integers", items->size() * kValues.size(), {}, {}};
  suite.describe = [=](uint64_t i) {
    const Item& item = (*items)[i / kValues.size()];
    return "file " + std::to_string(item.file) + ", " + std::to_string(item.at.width) + " bytes at " +
           std::to_string(item.at.at) + ": " + std::to_string(kValues[i % kValues.size()]);
  };
  suite.run = [=](uint64_t i) {
    const Item& item = (*items)[i / kValues.size()];
    std::string bytes = (*files)[item.file].bytes;
    std::memcpy(&bytes[item.at.at], &kValues[i % kValues.size()], item.at.width);
    return answer_bytes(bytes);
  };
  return suite;
}

const Class& find_class(const std::string& name) {
  for (const Class& c : kClasses)
    if (c.name == name) return c;
  std::fprintf(stderr, "there is no class %s\n", name.c_str());
  std::exit(2);
}

// NAME "incidents": those instead of a class.
void emit(const std::string& name, uint64_t first, uint64_t count) {
  const auto frame = [](const std::string& part) {
    const uint32_t size = static_cast<uint32_t>(part.size());
    std::fwrite(&size, sizeof size, 1, stdout);
    std::fwrite(part.data(), 1, part.size(), stdout);
  };
  for (uint64_t i = first; i < first + count; ++i) {
    Case c;
    if (name != "incidents") c = make_case(find_class(name), i);
    if (name == "incidents" && i < std::size(kIncidents)) kIncidents[i].make(c);
    frame(c.text);
    frame(c.text.empty() ? "" : c.raw ? *c.raw : c.file.build());
  }
}

void write_seeds(const std::string& folder) {
  for (size_t i = 0; i < kSmallFiles; ++i)
    detail::write_file(folder + "/small-" + std::to_string(i), small_file(i).build());
  for (size_t i = 0; i < std::size(kIncidents); ++i) {
    Case c;
    kIncidents[i].make(c);
    const std::string bytes = c.raw ? *c.raw : c.file.build();
    if (!c.place && bytes.size() < 100000) detail::write_file(folder + "/incident-" + std::to_string(i), bytes);
  }
}

// What is allocated once and kept (tables of the library, the valid files) is allocated before anything is counted.
void warm_up() {
  try {  // the first exception of a process
    pe::gguf::File::from_memory({});
  } catch (const pe::Error&) {
  }
  for (size_t i = 0; i < kSmallFiles; ++i) {
    require(answer_bytes(small_file(i).build()) == "runs", "a valid file runs", std::to_string(i));
    require(answer_bytes(small_file(i, true).build()) == "runs", "a valid file runs", std::to_string(i));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> args(argv + 1, argv + argc);
  const auto number = [&](size_t i, uint64_t fallback) { return i < args.size() ? std::stoull(args[i]) : fallback; };
  const std::string command = args.empty() ? "" : args[0];
  if (command == "list") {
    for (const Class& c : kClasses) std::printf("%s\n", c.name);
    return 0;
  }
  if (command == "emit" && args.size() == 4) {
    emit(args[1], number(2, 0), number(3, 0));
    return 0;
  }
  if (command == "write" && args.size() == 2) {
    write_seeds(args[1]);
    return 0;
  }
  warm_up();
  if (command == "case" && args.size() == 3) {
    g_folder = make_folder().string();
    std::printf("%s\n", run_case(make_case(find_class(args[1]), number(2, 0))).c_str());
    fs::remove_all(g_folder);
    return 0;
  }
  if (!heap::counted) std::printf("the heap is not measured in this build\n");
  if (command == "incidents") return run_suite(incidents());
  if (command == "classes") return run_suite(classes(number(1, 100), args.size() > 2 ? args[2] : ""));
  if (command == "cut") return run_suite(cut(number(1, 1)));
  if (command == "bytes") return run_suite(bytes(number(1, 1)));
  if (command == "integers") return run_suite(integers(number(1, 1)));
  return 2;
}
