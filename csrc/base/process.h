// The little of the operating system's process model that threads need.
#pragma once

#include <cstdint>
#include <mutex>

namespace pe {

// Identifies this process; changes in the child of a fork.
int64_t process_id();

// A mutex that the child of a fork does not wait for: whoever holds it there does not exist. Locking does nothing in any
// process but the one that made it, so what it protects may be used there by one thread, or not at all.
class ProcessMutex {
 public:
  void lock() {
    if (at_home()) mutex_.lock();
  }
  void unlock() {
    if (at_home()) mutex_.unlock();
  }
  bool at_home() const { return process_id() == process_; }

 private:
  std::mutex mutex_;
  const int64_t process_ = process_id();
};

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
