// Counts the allocations of one decode step and of a prompt: alloc_check MODEL.gguf. Exit status 1 when there are any.
//
// The program defines malloc and its relatives itself (glibc lets it), so that nothing on any thread escapes.
#include <errno.h>
#include <stdlib.h>

#include <atomic>
#include <cstdio>
#include <vector>

#include "api/pyengine.h"

namespace {
std::atomic<long> allocations{0};
}

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define PE_COUNTING 1
extern "C" {
void* __libc_malloc(size_t n);
void* __libc_calloc(size_t n, size_t size);
void* __libc_realloc(void* p, size_t n);
void* __libc_memalign(size_t alignment, size_t n);

void* malloc(size_t n) {
  ++allocations;
  return __libc_malloc(n);
}
void* calloc(size_t n, size_t size) {
  ++allocations;
  return __libc_calloc(n, size);
}
void* realloc(void* p, size_t n) {
  ++allocations;
  return __libc_realloc(p, n);
}
void* aligned_alloc(size_t alignment, size_t n) {
  ++allocations;
  return __libc_memalign(alignment, n);
}
int posix_memalign(void** out, size_t alignment, size_t n) {
  ++allocations;
  *out = __libc_memalign(alignment, n);
  return *out ? 0 : ENOMEM;
}
}
#endif

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  long checks = 0, failures = 0;
#ifdef PE_COUNTING
  pe_model* model = nullptr;
  pe_session* session = nullptr;
  pe_model_info info;
  pe_model_info_init(&info);
  pe_session_options options;
  pe_session_options_init(&options);
  options.n_ctx = 128;
  options.n_threads = 2;
  options.n_chunk = 16;
  if (pe_model_open(argv[1], nullptr, &model) != PE_OK || pe_model_get_info(model, &info) != PE_OK ||
      pe_session_create(model, &options, &session) != PE_OK) {
    std::printf("%s\n", pe_last_error()->message);
    return 1;
  }
  std::vector<float> logits(info.n_vocab);
  const auto count = [&](const char* what, const std::vector<int32_t>& tokens) {
    const long before = allocations;
    const pe_status status =
        pe_session_eval(session, tokens.data(), tokens.size(), PE_LOGITS_LAST, logits.data(), logits.size());
    const long made = allocations - before;
    ++checks;
    if (status == PE_OK && made == 0) return;
    ++failures;
    std::printf("%s: status %d, %ld allocations\n", what, static_cast<int>(status), made);
  };
  const long before = allocations;
  void* volatile kept = malloc(1);
  free(kept);
  ++checks;
  failures += allocations != before + 1;  // the counter counts
  count("a prompt of 40 tokens", std::vector<int32_t>(40, 1));
  for (int32_t id = 0; id < 20; ++id) count("one token", {id});
  pe_session_free(session);
  pe_model_close(model);
#endif
  std::printf("alloc_check: %ld checks, %ld failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
