// Lets every k-th allocation fail, once and from then on, through everything the C interface does: open, evaluate, share,
// observe, quantise, close.
//
//   fault_check [--every N] MODEL...     N > 1 tries every N-th allocation only (the first and the last always)
//
// After each failure: a status with a message, the same call succeeds on the same object once there is memory again, the
// results are those of an undisturbed run to the bit, and nothing is left behind. An allocation is whatever asks for
// memory: malloc and its relatives (under a sanitizer, whose malloc must not be replaced, operator new and aligned_alloc),
// mmap and pthread_create. Exit status 1 when anything went wrong.
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <functional>
#include <new>
#include <string>
#include <vector>

#include "api/pyengine.h"

// ---- the allocator that fails ----

namespace {

std::atomic<bool> active{false};  // inside a call into the engine
std::atomic<long> count{0};       // allocations there since the beginning of the workflow
std::atomic<long> fail_at{0};     // which of them fails; 0: none
std::atomic<bool> from_then_on{false};
std::atomic<long> fired{0};  // how many failed

bool refused() {
  if (!active) return false;
  const long n = ++count, at = fail_at;
  if (at == 0 || (from_then_on ? n < at : n != at)) return false;
  ++fired;
  errno = ENOMEM;
  return true;
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
namespace {
void* allocate(size_t n, size_t alignment) {
  if (refused()) return nullptr;
  void* p = nullptr;
  return posix_memalign(&p, std::max(alignment, sizeof p), n ? n : 1) ? nullptr : p;
}
void* allocate_or_throw(size_t n, size_t alignment) {
  void* p = allocate(n, alignment);
  if (!p) throw std::bad_alloc();
  return p;
}
}  // namespace

void* operator new(size_t n) { return allocate_or_throw(n, 16); }
void* operator new[](size_t n) { return allocate_or_throw(n, 16); }
void* operator new(size_t n, std::align_val_t a) { return allocate_or_throw(n, static_cast<size_t>(a)); }
void* operator new[](size_t n, std::align_val_t a) { return allocate_or_throw(n, static_cast<size_t>(a)); }
void* operator new(size_t n, const std::nothrow_t&) noexcept { return allocate(n, 16); }
void* operator new[](size_t n, const std::nothrow_t&) noexcept { return allocate(n, 16); }
void operator delete(void* p) noexcept { free(p); }
void operator delete[](void* p) noexcept { free(p); }
void operator delete(void* p, size_t) noexcept { free(p); }
void operator delete[](void* p, size_t) noexcept { free(p); }
void operator delete(void* p, std::align_val_t) noexcept { free(p); }
void operator delete[](void* p, std::align_val_t) noexcept { free(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { free(p); }
void operator delete[](void* p, size_t, std::align_val_t) noexcept { free(p); }

extern "C" void* aligned_alloc(size_t alignment, size_t n) { return allocate(n, alignment); }

#else
extern "C" {
void* __libc_malloc(size_t n);
void* __libc_calloc(size_t n, size_t size);
void* __libc_realloc(void* p, size_t n);
void* __libc_memalign(size_t alignment, size_t n);

void* malloc(size_t n) { return refused() ? nullptr : __libc_malloc(n); }
void* calloc(size_t n, size_t size) { return refused() ? nullptr : __libc_calloc(n, size); }
void* realloc(void* p, size_t n) { return refused() ? nullptr : __libc_realloc(p, n); }
void* aligned_alloc(size_t alignment, size_t n) { return refused() ? nullptr : __libc_memalign(alignment, n); }
int posix_memalign(void** out, size_t alignment, size_t n) {
  *out = refused() ? nullptr : __libc_memalign(alignment, n);
  return *out ? 0 : ENOMEM;
}
}
#endif

extern "C" {
void* mmap(void* at, size_t n, int protection, int flags, int fd, off_t offset) {
  if (refused()) return MAP_FAILED;
  // The system call itself: a sanitizer's or the C library's function is what this one stands in front of.
  return reinterpret_cast<void*>(syscall(SYS_mmap, at, n, protection, flags, fd, offset));
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*entry)(void*), void* argument) {
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const auto create = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
  if (refused()) return EAGAIN;
  const bool was = active.exchange(false);  // what the C library needs for it is its own affair
  const int result = create(thread, attributes, entry, argument);
  active = was;
  return result;
}
}

namespace {

long checks = 0, failures = 0;
std::string context;

void check(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  if (++failures <= 30) std::printf("FAILED: %s: %s\n", context.c_str(), what.c_str());
}

// One call into the engine, as a program makes it that frees memory and tries again.
pe_status attempt(const char* what, const std::function<pe_status()>& call, pe_status expected = PE_OK) {
  const long before = fired;
  active = true;
  pe_status status = call();
  active = false;
  if (status == expected) return status;
  const pe_error* e = pe_last_error();
  const bool short_of_memory = status == PE_E_MEMORY || (status == PE_E_IO && strcmp(e->code, "io_error") == 0);
  check(fired > before && short_of_memory, std::string(what) + ": status " + std::to_string(status) + " " + e->message);
  check(e->status == status && *e->code && *e->message, std::string(what) + ": the failure has no message");
  status = call();
  check(status == expected, std::string(what) + " again, with memory: " + pe_last_error()->message);
  return status;
}

uint64_t digest(uint64_t h, const void* data, size_t n) {
  const auto* p = static_cast<const uint8_t*>(data);
  for (size_t i = 0; i < n; ++i) h = (h ^ p[i]) * 0x100000001b3;
  return h;
}

constexpr uint64_t kSeed = 0xcbf29ce484222325;

// ---- the workflows: each returns a digest of its results ----

std::vector<int32_t> tokens_from(int32_t first, size_t n) {
  std::vector<int32_t> out(n);
  for (size_t i = 0; i < n; ++i) out[i] = 3 + (first + static_cast<int32_t>(i * i)) % 200;
  return out;
}

void close_model(pe_model* model) {
  active = true;
  pe_model_close(model);
  active = false;
}

void free_session(pe_session* session) {
  active = true;
  pe_session_free(session);
  active = false;
}

uint64_t sessions(const char* path, pe_load load, std::vector<float>& logits) {
  pe_model_options mo;
  pe_model_options_init(&mo);
  mo.load = load;
  mo.progress = [](void*, float) -> int32_t { return 0; };
  pe_model* model = nullptr;
  if (attempt("pe_model_open", [&] { return pe_model_open(path, &mo, &model); }) != PE_OK) return 0;
  pe_model_info info;
  pe_model_info_init(&info);
  attempt("pe_model_get_info", [&] { return pe_model_get_info(model, &info); });
  if (logits.size() < info.n_vocab) logits.resize(info.n_vocab);

  uint64_t h = kSeed;
  static const std::vector<int32_t> text = tokens_from(1, 150), other = tokens_from(2, 90);
  const auto evaluate = [&](pe_session* s, const int32_t* ids, size_t n) {
    attempt("pe_session_eval", [&] { return pe_session_eval(s, ids, n, PE_LOGITS_LAST, logits.data(), info.n_vocab); });
    h = digest(h, logits.data(), info.n_vocab * sizeof(float));
  };
  // `known` may be less than it could be where memory is short; never more, and never wrong.
  const auto reuse = [&](pe_session* s, const std::vector<int32_t>& ids) {
    size_t known = 0;
    attempt("pe_session_reuse", [&] { return pe_session_reuse(s, ids.data(), ids.size(), &known); });
    check(known < ids.size() && pe_session_length(s) == known, "pe_session_reuse says what the session holds");
    evaluate(s, ids.data() + known, ids.size() - known);
  };
  const auto create = [&](uint32_t threads) {
    pe_session_options so;
    pe_session_options_init(&so);
    so.n_ctx = 192;
    so.n_threads = threads;
    so.n_chunk = 64;
    pe_session* s = nullptr;
    attempt("pe_session_create", [&] { return pe_session_create(model, &so, &s); });
    return s;
  };
  pe_session* one = create(2);
  if (one) {
    reuse(one, text);
    for (const int32_t id : {5, 6}) evaluate(one, &id, 1);
    const int32_t bad = -1;
    attempt("a bad token", [&] { return pe_session_eval(one, &bad, 1, PE_LOGITS_NONE, nullptr, 0); }, PE_E_ARGUMENT);
    attempt("pe_session_observe", [&] { return pe_session_observe(one, 1); });
    reuse(one, other);
    uint64_t fingerprint = 0, size = 0;
    attempt("pe_model_fingerprint", [&] { return pe_model_fingerprint(model, &fingerprint); });
    h = digest(h, &fingerprint, sizeof fingerprint);
    attempt("pe_session_state_bytes", [&] { return pe_session_state_bytes(one, 40, &size); });
    static std::vector<uint8_t> state;
    state.resize(size);
    attempt("pe_session_save", [&] { return pe_session_save(one, 0, 40, state.data(), size); });
    h = digest(h, state.data(), size);
    pe_session* restored = create(1);
    if (restored) {
      attempt("pe_session_restore", [&] { return pe_session_restore(restored, state.data(), size); });
      evaluate(restored, other.data() + 40, 10);
      state[size / 2] ^= 1;
      attempt("a damaged state", [&] { return pe_session_restore(restored, state.data(), size); }, PE_E_FORMAT);
      free_session(restored);
    }
    pe_input input;
    pe_input_init(&input);
    attempt("pe_session_input_at", [&] { return pe_session_input_at(one, 0, &input); });
    attempt("pe_session_truncate", [&] { return pe_session_truncate(one, 10); });
    attempt("pe_session_truncate", [&] { return pe_session_truncate(one, 11); }, PE_E_ARGUMENT);
  }
  pe_session* two = create(1);
  if (two) reuse(two, other);
  if (one) free_session(one);
  if (two) free_session(two);
  pe_session* three = create(3);
  close_model(model);  // the session goes on
  if (three) reuse(three, text);
  if (three) free_session(three);
  return h;
}

uint64_t files(const char* path) {
  uint64_t h = kSeed;
  for (const pe_load load : {PE_LOAD_HEADER, PE_LOAD_MMAP}) {
    pe_file* file = nullptr;
    if (attempt("pe_file_open", [&] { return pe_file_open(path, load, &file); }) != PE_OK) continue;
    for (uint64_t i = 0; i < pe_file_value_count(file); ++i) {
      pe_value v;
      attempt("pe_file_value_at", [&] { return pe_file_value_at(file, i, &v); });
      h = digest(h, v.data, v.size);
    }
    pe_value v;
    pe_tensor t;
    attempt("pe_file_value", [&] { return pe_file_value(file, "no.such.key", &v); }, PE_E_ARGUMENT);
    attempt("pe_file_tensor", [&] { return pe_file_tensor(file, "token_embd.weight", &t); });
    attempt("pe_file_tensor", [&] { return pe_file_tensor(file, "no such", &t); }, PE_E_ARGUMENT);
    attempt("pe_file_check", [&] { return pe_file_check(file); });
    active = true;
    pe_file_close(file);
    active = false;
  }
  pe_file* none = nullptr;
  attempt("a missing file", [&] { return pe_file_open("/nonexistent.gguf", PE_LOAD_MMAP, &none); }, PE_E_IO);
  attempt("a directory", [&] { return pe_file_open("/", PE_LOAD_MMAP, &none); }, PE_E_IO);
  attempt("no GGUF file", [&] { return pe_file_open("/proc/self/exe", PE_LOAD_MMAP, &none); }, PE_E_FORMAT);
  return h;
}

uint64_t conversion(std::vector<float>& values) {
  constexpr size_t kRows = 24, kCols = 512;
  if (values.size() < 2 * kRows * kCols) values.resize(2 * kRows * kCols);
  static std::vector<uint8_t> packed(kRows * kCols * 4);
  static std::vector<float> importance(kCols);
  float* const x = values.data();
  float* const y = x + kRows * kCols;
  for (size_t i = 0; i < kRows * kCols; ++i) x[i] = std::sin(static_cast<float>(i));
  for (size_t i = 0; i < kCols; ++i) importance[i] = static_cast<float>(i % 7);
  uint64_t h = kSeed;
  pe_format f;
  for (size_t i = 0; pe_format_at(i, &f) == PE_OK; ++i) {
    if (!f.can_quantise) continue;
    const size_t bytes = kRows * kCols / f.block_size * f.block_bytes;
    attempt("pe_quantise_rows", [&] {
      return pe_quantise_rows(f.type, x, kRows * kCols, kRows, kCols, importance.data(), packed.data(), bytes, 3);
    });
    h = digest(h, packed.data(), bytes);
    attempt("pe_dequantise_rows",
            [&] { return pe_dequantise_rows(f.type, packed.data(), bytes, kRows, kCols, y, kRows * kCols); });
    h = digest(h, y, kRows * kCols * sizeof(float));
    attempt("pe_linear", [&] { return pe_linear("scalar", f.type, packed.data(), bytes, kRows, kCols, x, 2, y); });
    h = digest(h, y, 2 * kRows * sizeof(float));
    x[7] = NAN;
    attempt(
        "a value that cannot be stored",
        [&] { return pe_quantise_rows(f.type, x, kRows * kCols, kRows, kCols, nullptr, packed.data(), bytes, 2); },
        PE_E_ARGUMENT);
    x[7] = 0;
  }
  attempt("pe_attend", [&] { return pe_attend("scalar", 0, x, x, 8 * 64 * 4, 8, 64, x, 2, y); });
  h = digest(h, y, 128 * sizeof(float));
  int32_t ids[4];
  size_t found = 0;
  attempt("pe_top_k", [&] { return pe_top_k(x, 500, 4, ids, y, &found); });
  h = digest(h, ids, sizeof ids);
  double sum = 0;
  attempt("pe_softmax_sum", [&] { return pe_softmax_sum(x, 500, 1.0, nullptr, nullptr, 0, &sum); });
  h = digest(h, &sum, sizeof sum);
  attempt("an unknown type", [&] { return pe_dequantise_rows(99, packed.data(), 1, 1, 1, y, 1); }, PE_E_UNSUPPORTED);
  attempt("an unknown tier", [&] { return pe_linear("none", 0, packed.data(), 4, 1, 1, x, 1, y); }, PE_E_ARGUMENT);
  pe_limits limits;
  pe_limits_init(&limits);
  attempt("no threads", [&] { return pe_measure_limits(0, 1 << 20, &limits); }, PE_E_ARGUMENT);
  pe_shape shape;
  pe_shape_init(&shape);
  uint64_t kv = 0, scratch = 0;
  attempt("an empty shape", [&] { return pe_shape_bytes(&shape, nullptr, &kv, &scratch); }, PE_E_ARGUMENT);
  return h;
}

// A thread that meets its first failure without memory: the description of it must not need any.
uint64_t first_failure(void*) {
  static pe_status status;
  static bool described;
  pthread_t thread;
  const auto body = [](void*) -> void* {
    active = true;
    status = pe_file_open("/nonexistent.gguf", PE_LOAD_MMAP, nullptr);
    const pe_error* e = pe_last_error();
    active = false;
    described = e->status == status && *e->message && *e->code;
    return nullptr;
  };
  if (pthread_create(&thread, nullptr, body, nullptr) != 0) return 0;
  pthread_join(thread, nullptr);
  check(status == PE_E_ARGUMENT || (status == PE_E_MEMORY && fired > 0), "the first failure of a thread has a status");
  check(described, "the first failure of a thread has a message");
  return kSeed;
}

// ---- what must not grow ----

long entries(const char* folder) {
  long n = 0;
  DIR* dir = opendir(folder);
  while (dir && readdir(dir)) ++n;
  if (dir) closedir(dir);
  return n;
}

// Mappings of files: a model left mapped. (Anonymous ones come and go with the C library's heaps and stacks; the leak
// sanitizer and the address space below look after those.)
long mapped_models() {
  long n = 0;
  FILE* maps = std::fopen("/proc/self/maps", "r");
  char line[512];
  while (maps && std::fgets(line, sizeof line, maps)) n += strstr(line, ".gguf") != nullptr;
  if (maps) std::fclose(maps);
  return n;
}

long address_space_mib() {
  long pages = 0;
  FILE* file = std::fopen("/proc/self/statm", "r");
  if (file && std::fscanf(file, "%ld", &pages) != 1) pages = 0;
  if (file) std::fclose(file);
  return pages / 256;
}

void run(const std::string& name, long every, const std::function<uint64_t()>& workflow) {
  context = name;
  fail_at = 0;
  count = fired = 0;
  const uint64_t expected = workflow();
  const long total = count;
  count = 0;
  check(workflow() == expected, "two undisturbed runs agree");
  const long descriptors = entries("/proc/self/fd"), threads = entries("/proc/self/task");
  const long mapped = mapped_models(), space = address_space_mib();
  long tried = 0, failed = 0;
  for (const bool forever : {false, true}) {
    for (long k = 1; k <= total; k = k < total ? std::min(k + every, total) : k + 1) {
      context = name + ", allocation " + std::to_string(k) + (forever ? " and later" : "");
      count = fired = 0;
      from_then_on = forever;
      fail_at = k;
      const uint64_t got = workflow();
      ++tried;
      failed += fired;
      // A workflow may allocate a little less than the first time; its very last allocations may then not come.
      check(fired > 0 || k > total - 16, "the allocation was refused");
      fail_at = 0;
      check(got == expected, "the results are those of an undisturbed run");
    }
  }
  context = name;
  check(entries("/proc/self/fd") == descriptors, "no descriptor is left open");
  check(entries("/proc/self/task") == threads, "no thread is left");
  check(mapped_models() == mapped, "no file is left mapped");
  check(address_space_mib() < space + 256, "the address space does not grow");
  std::printf("%-28s %6ld allocations, %6ld runs, %8ld refusals\n", name.c_str(), total, tried, failed);
}

}  // namespace

int main(int argc, char** argv) {
  long every = 1;
  std::vector<float> buffer(1 << 20);
  std::vector<std::string> models;
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--every" && i + 1 < argc) {
      every = std::max(1L, std::atol(argv[++i]));
    } else {
      models.push_back(argv[i]);
    }
  }
  setvbuf(stdout, nullptr, _IOLBF, 1 << 16);
  run("the first failure", 1, [] { return first_failure(nullptr); });
  run("quantise, linear, sampling", every, [&] { return conversion(buffer); });
  for (const bool guarded : {false, true}) {
    if (guarded) attempt("pe_guard_mapped_files", pe_guard_mapped_files);
    const std::string how = guarded ? "guarded: " : "";
    for (const std::string& path : models) {
      run(how + "file", every, [&] { return files(path.c_str()); });
      run(how + "mapped model", every, [&] { return sessions(path.c_str(), PE_LOAD_MMAP, buffer); });
      if (!guarded) run("copied model", every, [&] { return sessions(path.c_str(), PE_LOAD_COPY, buffer); });
    }
  }
  std::printf("fault_check: %ld checks, %ld failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
