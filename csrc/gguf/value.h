// Metadata values of a GGUF file and typed access to them.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace pe::gguf {

// The numbers of the format.
enum class ValueType : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

inline constexpr uint32_t kValueTypes = 13;

const char* value_type_name(ValueType type);  // "u32", "string", ...
// Bytes of one value; 0 for strings and arrays.
uint32_t value_type_size(ValueType type);

// One metadata entry. `data` is unaligned and little-endian:
//   scalar: the value; string: its bytes; array: packed elements, or for strings u64 length and bytes each.
struct Value {
  std::string key;
  ValueType type;
  ValueType element_type;  // of an array; `type` otherwise
  uint64_t count;          // elements of an array; 1 otherwise
  uint64_t size;           // bytes at data
  uint64_t offset;         // of data in the file
  const uint8_t* data;
};

// Error(kFormat) that carries the key and the place of its value. `message` names the key itself.
[[noreturn]] void fail_value(const Value& value, const char* code, const std::string& message);

// Element i < count of an array, or the scalar itself (i = 0).
// Integers: any integer type of the format, min <= value <= max. Codes: wrong_type, value_out_of_range.
uint64_t integer_at(const Value& value, uint64_t i, uint64_t min, uint64_t max);
// f32 or f64, finite. Codes: wrong_type, value_not_finite.
double number_at(const Value& value, uint64_t i);
// Code: wrong_type.
bool boolean_at(const Value& value, uint64_t i);
// A scalar string. Code: wrong_type.
std::string_view string_of(const Value& value);

// Walks an array of strings: next() may be called value.count times.
class StringCursor {
 public:
  explicit StringCursor(const Value& value) : p_(value.data) {}
  std::string_view next() {
    uint64_t length;
    std::memcpy(&length, p_, sizeof length);
    const auto* text = reinterpret_cast<const char*>(p_ + sizeof length);
    p_ += sizeof length + length;
    return {text, static_cast<size_t>(length)};
  }

 private:
  const uint8_t* p_;
};

}  // namespace pe::gguf
