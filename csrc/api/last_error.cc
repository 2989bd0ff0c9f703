#include "api/last_error.h"

#include <cstdlib>

#ifndef _WIN32
#include <pthread.h>
#endif
#ifdef __GLIBC__
#include <cxxabi.h>
#endif

namespace pe {

namespace {

static_assert(static_cast<int>(Status::kOk) == PE_OK && static_cast<int>(Status::kArgument) == PE_E_ARGUMENT &&
              static_cast<int>(Status::kIo) == PE_E_IO && static_cast<int>(Status::kFormat) == PE_E_FORMAT &&
              static_cast<int>(Status::kUnsupported) == PE_E_UNSUPPORTED &&
              static_cast<int>(Status::kMemory) == PE_E_MEMORY &&
              static_cast<int>(Status::kCancelled) == PE_E_CANCELLED &&
              static_cast<int>(Status::kContextFull) == PE_E_CONTEXT_FULL &&
              static_cast<int>(Status::kNumeric) == PE_E_NUMERIC && static_cast<int>(Status::kCpu) == PE_E_CPU &&
              static_cast<int>(Status::kInternal) == PE_E_INTERNAL);

// A failure, and the strings behind its pointers.
struct LastError {
  std::string field;
  std::string message;
  pe_error shown{PE_OK, "", UINT64_MAX, "", ""};
};

constexpr pe_error kNone{PE_OK, "", UINT64_MAX, "", ""};
// What a thread shows that had not even the memory to describe its failure.
constexpr pe_error kNoMemory{PE_E_MEMORY, "out_of_memory", UINT64_MAX, "", "there is not enough memory"};

// Each thread's last failure, freed when the thread ends. Not thread_local: a C library may end the process when it
// has no memory for a thread's first use of such a variable, or for its destructor, and failures are when memory is short.
#ifdef _WIN32

class Slot {
 public:
  LastError* get() { return &error_; }
  LastError* make() { return &error_; }
  void set_no_memory() { error_.shown = kNoMemory; }
  bool no_memory() const { return false; }

 private:
  static thread_local LastError error_;
};
thread_local LastError Slot::error_;

#else

class Slot {
 public:
  Slot() : made_(pthread_key_create(&key_, [](void* p) { release(p); }) == 0) {}
  ~Slot() {
    if (!made_) return;
    release(pthread_getspecific(key_));  // the thread that unloads the library
    pthread_key_delete(key_);
  }

  // nullptr when there is none.
  LastError* get() {
    void* p = value();
    return p == no_memory_mark() ? nullptr : static_cast<LastError*>(p);
  }
  LastError* make() {
    if (LastError* known = get()) return known;
    auto* made = new LastError;
    if (made_ && pthread_setspecific(key_, made) == 0) return made;
    delete made;
    throw std::bad_alloc();
  }
  // Only of a thread that has none yet.
  void set_no_memory() {
    if (made_) pthread_setspecific(key_, no_memory_mark());
  }
  bool no_memory() const { return value() == no_memory_mark(); }

 private:
  static void* no_memory_mark() { return const_cast<pe_error*>(&kNoMemory); }
  static void release(void* p) {
    if (p != no_memory_mark()) delete static_cast<LastError*>(p);
  }
  void* value() const { return made_ ? pthread_getspecific(key_) : nullptr; }

  pthread_key_t key_{};
  bool made_;
};

#endif

Slot slot;

#ifdef __GLIBC__

// A thread's first throw makes the C++ library allocate a few bytes of thread-local data, and where that fails in a library
// that was loaded at run time (this one, in Python), glibc ends the process. So that is done while there is memory.
class Readiness {
 public:
  Readiness() : made_(pthread_key_create(&key_, nullptr) == 0) {}
  ~Readiness() {
    if (made_) pthread_key_delete(key_);
  }
  bool now() {
    if (!made_ || pthread_getspecific(key_)) return true;
    void* probe = std::malloc(4096);
    if (!probe) return false;
    std::free(probe);                                                  // and what was free is there for these few bytes
    [[maybe_unused]] void* volatile asked = abi::__cxa_get_globals();  // volatile: it is declared free of effects
    pthread_setspecific(key_, this);
    return true;
  }

 private:
  pthread_key_t key_{};
  bool made_;
};

Readiness readiness;

#endif

}  // namespace

bool ready_to_throw() noexcept {
#ifdef __GLIBC__
  if (!readiness.now()) {
    if (LastError* e = slot.get()) {
      e->shown = kNoMemory;
    } else {
      slot.set_no_memory();
    }
    return false;
  }
#endif
  return true;
}

pe_status store_error(const Error& error) noexcept {
  try {
    LastError& e = *slot.make();
    e.field = error.field;
    e.message = error.message;
    e.shown = {static_cast<pe_status>(error.status), error.code, error.offset, e.field.c_str(), e.message.c_str()};
    return e.shown.status;
  } catch (...) {
    return store_error(error.status, error.code, "there is not enough memory to describe the failure");
  }
}

pe_status store_error(Status status, const char* code, const char* message) noexcept {
  const auto shown = static_cast<pe_status>(status);
  try {
    LastError& e = *slot.make();
    e.message = message;
    e.shown = {shown, code, UINT64_MAX, "", e.message.c_str()};
  } catch (...) {
    if (LastError* e = slot.get()) {
      e->shown = {shown, code, UINT64_MAX, "", kNoMemory.message};
    } else {
      slot.set_no_memory();
      return PE_E_MEMORY;
    }
  }
  return shown;
}

}  // namespace pe

const pe_error* pe_last_error(void) {
  if (const pe::LastError* e = pe::slot.get()) return &e->shown;
  return pe::slot.no_memory() ? &pe::kNoMemory : &pe::kNone;
}
