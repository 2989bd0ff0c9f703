#include "api/last_error.h"

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

// The strings behind the pointers of `shown`.
struct LastError {
  std::string field;
  std::string message;
  pe_error shown{PE_OK, "", UINT64_MAX, "", ""};
};

LastError& last() {
  thread_local LastError error;
  return error;
}

}  // namespace

pe_status store_error(const Error& error) noexcept {
  try {
    LastError& e = last();
    e.field = error.field;
    e.message = error.message;
    e.shown = {static_cast<pe_status>(error.status), error.code, error.offset, e.field.c_str(), e.message.c_str()};
    return e.shown.status;
  } catch (...) {
    return store_error(error.status, error.code, "there is not enough memory to describe the failure");
  }
}

pe_status store_error(Status status, const char* code, const char* message) noexcept {
  LastError& e = last();
  try {
    e.message = message;
    message = e.message.c_str();
  } catch (...) {
    message = "there is not enough memory";
  }
  e.shown = {static_cast<pe_status>(status), code, UINT64_MAX, "", message};
  return e.shown.status;
}

}  // namespace pe

const pe_error* pe_last_error(void) { return &pe::last().shown; }
