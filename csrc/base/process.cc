#include "base/process.h"

#ifdef _WIN32
#include <process.h>
#else
#include <pthread.h>
#include <signal.h>
#include <unistd.h>
#endif

#include <cstring>
#include <initializer_list>

namespace pe {

#ifdef _WIN32

int64_t process_id() { return _getpid(); }
SignalsBlocked::SignalsBlocked() : saved_{} {}
SignalsBlocked::~SignalsBlocked() = default;

#else

int64_t process_id() { return getpid(); }

SignalsBlocked::SignalsBlocked() {
  sigset_t all, before;
  static_assert(sizeof before <= sizeof saved_);
  sigfillset(&all);
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigdelset(&all, fault);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::memcpy(saved_, &before, sizeof before);
}

SignalsBlocked::~SignalsBlocked() {
  sigset_t before;
  std::memcpy(&before, saved_, sizeof before);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

#endif

}  // namespace pe
