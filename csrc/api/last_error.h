// The failure of the calling thread, and the guard that turns exceptions into statuses.
#pragma once

#include <new>
#include <string>

#include "api/pyengine.h"
#include "base/error.h"

namespace pe {

// Stores the failure for pe_last_error and returns its status. Never throws: when even the message cannot be stored, a
// static one takes its place.
pe_status store_error(const Error& error) noexcept;
pe_status store_error(Status status, const char* code, const char* message) noexcept;

// Whether this thread has what an exception needs; else its last error says that there is no memory.
bool ready_to_throw() noexcept;

// Runs the body of an interface function; nothing escapes.
template <typename Body>
pe_status guarded(Body&& body) noexcept {
  if (!ready_to_throw()) return PE_E_MEMORY;
  try {
    body();
    return PE_OK;
  } catch (const Error& e) {
    return store_error(e);
  } catch (const std::bad_alloc&) {
    return store_error(Status::kMemory, "out_of_memory", "there is not enough memory");
  } catch (const std::exception& e) {
    return store_error(Status::kInternal, "internal", e.what());
  } catch (...) {
    return store_error(Status::kInternal, "internal", "an unknown failure inside the engine");
  }
}

[[noreturn]] inline void bad_argument(const char* name, const char* why) {
  throw Error(Status::kArgument, "bad_argument", std::string(name) + " " + why, name);
}

template <typename T>
T& not_null(T* pointer, const char* name) {
  if (!pointer) bad_argument(name, "must not be NULL");
  return *pointer;
}

}  // namespace pe
