// Typed access to the metadata of a File.
#include <limits>

#include "base/error.h"
#include "base/text.h"
#include "gguf/reader.h"

namespace pe::gguf {
namespace {

const Value& scalar(const Value& value, const char* expected) {
  if (value.type == ValueType::kArray) {
    fail_value(value, "wrong_type",
               "'" + printable(value.key, 80) + "' has type array of " + value_type_name(value.element_type) +
                   "; expected " + expected);
  }
  return value;
}

float to_float(const Value& value) {
  const double found = number_at(scalar(value, "f32 or f64"), 0);
  if (found > std::numeric_limits<float>::max() || found < std::numeric_limits<float>::lowest()) {
    fail_value(value, "value_out_of_range", "'" + printable(value.key, 80) + "' does not fit into a 32-bit float");
  }
  return static_cast<float>(found);
}

bool is_kind(ValueType type, ElementKind kind) {
  switch (kind) {
    case ElementKind::kFloat: return type == ValueType::kFloat32 || type == ValueType::kFloat64;
    case ElementKind::kBool: return type == ValueType::kBool;
    case ElementKind::kString: return type == ValueType::kString;
    case ElementKind::kInteger: break;
  }
  return type != ValueType::kFloat32 && type != ValueType::kFloat64 && type != ValueType::kBool &&
         type != ValueType::kString && type != ValueType::kArray;
}

const char* kind_name(ElementKind kind) {
  static constexpr const char* kNames[] = {"an array of integers", "an array of f32 or f64", "an array of bool",
                                           "an array of strings"};
  return kNames[static_cast<int>(kind)];
}

}  // namespace

const Value& File::need(std::string_view key) const {
  if (const Value* value = find(key)) return *value;
  const std::string name = printable(key, 80);
  throw Error(Status::kFormat, "missing_key", "the key '" + name + "' is missing from the file's metadata", name);
}

uint64_t File::integer(std::string_view key, uint64_t min, uint64_t max) const {
  return integer_at(scalar(need(key), "an integer"), 0, min, max);
}

uint32_t File::u32(std::string_view key, uint32_t min, uint32_t max) const {
  return static_cast<uint32_t>(integer(key, min, max));
}

float File::f32(std::string_view key) const { return to_float(need(key)); }

bool File::boolean(std::string_view key) const { return boolean_at(scalar(need(key), "bool"), 0); }

std::string_view File::string(std::string_view key) const { return string_of(need(key)); }

std::optional<uint64_t> File::maybe_integer(std::string_view key, uint64_t min, uint64_t max) const {
  if (!find(key)) return {};
  return integer(key, min, max);
}

std::optional<uint32_t> File::maybe_u32(std::string_view key, uint32_t min, uint32_t max) const {
  if (!find(key)) return {};
  return u32(key, min, max);
}

std::optional<float> File::maybe_f32(std::string_view key) const {
  if (!find(key)) return {};
  return f32(key);
}

std::optional<bool> File::maybe_boolean(std::string_view key) const {
  if (!find(key)) return {};
  return boolean(key);
}

std::optional<std::string_view> File::maybe_string(std::string_view key) const {
  if (!find(key)) return {};
  return string(key);
}

const Value& File::array(std::string_view key, ElementKind kind, uint64_t min_count, uint64_t max_count) const {
  const Value& value = need(key);
  const std::string name = "'" + printable(key, 80) + "'";
  if (value.type != ValueType::kArray || !is_kind(value.element_type, kind)) {
    const bool is_array = value.type == ValueType::kArray;
    fail_value(value, "wrong_type",
               name + " has type " + (is_array ? "array of " : "") + value_type_name(value.element_type) +
                   "; expected " + kind_name(kind));
  }
  if (value.count < min_count || value.count > max_count) {
    const std::string range = min_count == max_count ? "exactly " + std::to_string(min_count)
                                                     : std::to_string(min_count) + " to " + std::to_string(max_count);
    fail_value(value, "wrong_length", name + " has " + std::to_string(value.count) + " elements; expected " + range);
  }
  return value;
}

}  // namespace pe::gguf
