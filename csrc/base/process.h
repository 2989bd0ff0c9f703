// The little of the operating system's process model that threads need.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace pe {

// Identifies this process; changes in the child of a fork.
int64_t process_id();

// While it lives, threads the caller starts block every asynchronous signal, so that a host's signal handlers keep
// running on the host's own threads. Nothing on systems without POSIX signals.
class SignalsBlocked {
 public:
  SignalsBlocked();
  ~SignalsBlocked();
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  alignas(8) unsigned char saved_[128];  // the caller's sigset_t
};

}  // namespace pe
