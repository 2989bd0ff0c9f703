#include "gguf/value.h"

#include <cmath>

#include "base/error.h"
#include "base/text.h"

namespace pe::gguf {
namespace {

struct TypeRow {
  const char* name;
  uint32_t size;
};

// Indexed by ValueType.
constexpr TypeRow kRows[kValueTypes] = {{"u8", 1},  {"i8", 1},  {"u16", 2},  {"i16", 2},    {"u32", 4},
                                        {"i32", 4}, {"f32", 4}, {"bool", 1}, {"string", 0}, {"array", 0},
                                        {"u64", 8}, {"i64", 8}, {"f64", 8}};

template <class T>
T load(const Value& value, uint64_t i) {
  T out;
  std::memcpy(&out, value.data + i * sizeof(T), sizeof(T));
  return out;
}

std::string shown(const Value& value) { return "'" + printable(value.key, 80) + "'"; }

std::string shown_type(const Value& value) {
  if (value.type != ValueType::kArray) return value_type_name(value.type);
  return std::string("array of ") + value_type_name(value.element_type);
}

[[noreturn]] void fail_type(const Value& value, const char* expected) {
  fail_value(value, "wrong_type", shown(value) + " has type " + shown_type(value) + "; expected " + expected);
}

[[noreturn]] void fail_range(const Value& value, const std::string& found, uint64_t min, uint64_t max) {
  const std::string range = min == max ? "exactly " + std::to_string(min)
                                       : "an integer from " + std::to_string(min) + " to " + std::to_string(max);
  fail_value(value, "value_out_of_range", shown(value) + " is " + found + "; expected " + range);
}

uint64_t in_range(const Value& value, uint64_t found, uint64_t min, uint64_t max) {
  if (found < min || found > max) fail_range(value, std::to_string(found), min, max);
  return found;
}

uint64_t in_range_signed(const Value& value, int64_t found, uint64_t min, uint64_t max) {
  if (found < 0) fail_range(value, std::to_string(found), min, max);
  return in_range(value, static_cast<uint64_t>(found), min, max);
}

}  // namespace

const char* value_type_name(ValueType type) { return kRows[static_cast<uint32_t>(type)].name; }

uint32_t value_type_size(ValueType type) { return kRows[static_cast<uint32_t>(type)].size; }

void fail_value(const Value& value, const char* code, const std::string& message) {
  throw Error(Status::kFormat, code, message, printable(value.key, 80), value.offset);
}

uint64_t integer_at(const Value& value, uint64_t i, uint64_t min, uint64_t max) {
  switch (value.element_type) {
    case ValueType::kUint8: return in_range(value, load<uint8_t>(value, i), min, max);
    case ValueType::kUint16: return in_range(value, load<uint16_t>(value, i), min, max);
    case ValueType::kUint32: return in_range(value, load<uint32_t>(value, i), min, max);
    case ValueType::kUint64: return in_range(value, load<uint64_t>(value, i), min, max);
    case ValueType::kInt8: return in_range_signed(value, load<int8_t>(value, i), min, max);
    case ValueType::kInt16: return in_range_signed(value, load<int16_t>(value, i), min, max);
    case ValueType::kInt32: return in_range_signed(value, load<int32_t>(value, i), min, max);
    case ValueType::kInt64: return in_range_signed(value, load<int64_t>(value, i), min, max);
    default: fail_type(value, value.type == ValueType::kArray ? "an array of integers" : "an integer");
  }
}

double number_at(const Value& value, uint64_t i) {
  double found;
  if (value.element_type == ValueType::kFloat32) {
    found = load<float>(value, i);
  } else if (value.element_type == ValueType::kFloat64) {
    found = load<double>(value, i);
  } else {
    fail_type(value, value.type == ValueType::kArray ? "an array of f32 or f64" : "f32 or f64");
  }
  if (!std::isfinite(found)) {
    fail_value(value, "value_not_finite", shown(value) + " is NaN or infinite; expected a finite number");
  }
  return found;
}

bool boolean_at(const Value& value, uint64_t i) {
  if (value.element_type != ValueType::kBool) {
    fail_type(value, value.type == ValueType::kArray ? "an array of bool" : "bool");
  }
  return value.data[i] != 0;
}

std::string_view string_of(const Value& value) {
  if (value.type != ValueType::kString) fail_type(value, "string");
  return {reinterpret_cast<const char*>(value.data), static_cast<size_t>(value.size)};
}

}  // namespace pe::gguf
