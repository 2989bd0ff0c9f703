#include "base/file_guard.h"

#include <atomic>
#include <cstdint>

#ifndef _WIN32
#include <signal.h>
#include <sys/mman.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cerrno>
#endif

namespace pe {

// All in sequentially consistent atomics: read by the signal handler, which may take no lock. `version` is odd while the
// bounds change.
struct GuardedRange {
  std::atomic<bool> used{true};
  std::atomic<uint32_t> version{0};
  std::atomic<uintptr_t> begin{0}, end{0};
  std::atomic<bool> lost{false};
  GuardedRange* next = nullptr;  // written before the range enters the list
};

namespace {

std::atomic<GuardedRange*> ranges{nullptr};  // only ever grows at its head
std::atomic<bool> guarding{false};

void set_bounds(GuardedRange& range, uintptr_t begin, uintptr_t end) {
  ++range.version;
  range.begin = begin;
  range.end = end;
  ++range.version;
}

GuardedRange* unused_range() {
  for (GuardedRange* r = ranges; r; r = r->next)
    if (!r->used.exchange(true)) return r;
  auto* made = new GuardedRange;
  made->next = ranges;
  while (!ranges.compare_exchange_weak(made->next, made)) {
  }
  return made;
}

#ifndef _WIN32

struct sigaction previous;  // written before the handler is installed

// Zeros in the place of whatever is mapped there; they take no memory. On Linux the system call itself, because the C
// library's function is not meant for signal handlers, and a sanitizer's even less.
bool map_zeros(uintptr_t begin, size_t size) {
  constexpr int kFlags = MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
#if defined(__linux__) && defined(SYS_mmap)
  return syscall(SYS_mmap, begin, size, PROT_READ, kFlags, -1, off_t{0}) != -1;
#else
  return mmap(reinterpret_cast<void*>(begin), size, PROT_READ, kFlags, -1, 0) != MAP_FAILED;
#endif
}

// Puts zeros in the place of the mapping around `address`; false when it is none of ours. A range whose bounds are
// changing is not the one that somebody is reading.
bool replace_pages(uintptr_t address) {
  for (GuardedRange* r = ranges; r; r = r->next) {
    const uint32_t version = r->version;
    const uintptr_t begin = r->begin, end = r->end;
    if (version % 2 || address < begin || address >= end || r->version != version) continue;
    r->lost = true;                        // before anybody can read a zero
    return map_zeros(begin, end - begin);  // all of it: one signal for gigabytes, and nothing of the result is of use
  }
  return false;
}

// What would have happened without our handler.
void pass_on(int number, siginfo_t* info, void* context) {
  if (previous.sa_flags & SA_SIGINFO) return previous.sa_sigaction(number, info, context);
  const bool sent = info->si_code <= 0;  // by a process; otherwise the access is tried again when we return
  if (previous.sa_handler == SIG_IGN && sent) return;
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) return previous.sa_handler(number);
  struct sigaction standard = {};
  standard.sa_handler = SIG_DFL;
  sigaction(number, &standard, nullptr);
  if (sent) raise(number);
}

void on_bus_error(int number, siginfo_t* info, void* context) {
  const int error = errno;
  const bool ours = info->si_code > 0 && replace_pages(reinterpret_cast<uintptr_t>(info->si_addr));
  errno = error;
  if (!ours) pass_on(number, info, context);
}

bool install() {
  sigaction(SIGBUS, nullptr, &previous);
  struct sigaction action = {};
  action.sa_sigaction = on_bus_error;
  action.sa_mask = previous.sa_mask;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
  return sigaction(SIGBUS, &action, nullptr) == 0;
}

#else

bool install() { return false; }

#endif

}  // namespace

void guard_mapped_files() {
  static const bool installed = install();
  guarding = installed;
}

bool mapped_files_guarded() { return guarding; }

GuardedRange* guard_range(const std::byte* data, size_t size) {
  GuardedRange* range = unused_range();
  range->lost = false;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  set_bounds(*range, begin, begin + size);
  return range;
}

void release_range(GuardedRange* range) noexcept {
  set_bounds(*range, 0, 0);
  range->used = false;
}

bool range_lost(const GuardedRange& range) { return range.lost; }

}  // namespace pe
