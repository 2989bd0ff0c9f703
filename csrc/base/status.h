// Kinds of failure. The numbers are those of pe_status in pyengine.h; api.cc asserts it.
#pragma once

namespace pe {

enum class Status : int {
  kOk = 0,
  kArgument = 1,
  kIo = 2,
  kFormat = 3,
  kUnsupported = 4,
  kMemory = 5,
  kCancelled = 6,
  kContextFull = 7,
  kNumeric = 8,
  kCpu = 9,
  kInternal = 10,
};

}  // namespace pe
