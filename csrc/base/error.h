// Errors inside the library are one exception type; api.cc turns it into a status and pe_last_error().
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <utility>

#include "base/status.h"

namespace pe {

inline constexpr uint64_t kNoOffset = UINT64_MAX;

// code: a stable identifier ("bad_magic"); field: what was being read; message: one sentence for a person.
class Error : public std::exception {
 public:
  Error(Status status, const char* code, std::string message, std::string field = {}, uint64_t offset = kNoOffset)
      : status(status), code(code), offset(offset), field(std::move(field)), message(std::move(message)) {}
  const char* what() const noexcept override { return message.c_str(); }

  Status status;
  const char* code;  // a string literal
  uint64_t offset;   // bytes from the start of the file, or kNoOffset
  std::string field;
  std::string message;
};

}  // namespace pe
