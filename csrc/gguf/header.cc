#include "gguf/header.h"

#include <algorithm>
#include <numeric>

#include "base/checked.h"
#include "base/error.h"
#include "base/text.h"
#include "gguf/limits.h"
#include "gguf/sniff.h"
#include "gguf/types.h"

namespace pe::gguf {
namespace {

constexpr uint32_t kMagic = 0x46554747;   // "GGUF"
constexpr uint64_t kPreambleBytes = 24;   // magic, version, two counts
constexpr uint64_t kMinKeyBytes = 14;     // length 8, one letter, type 4, value 1
constexpr uint64_t kMinTensorBytes = 33;  // length 8, one letter, dimensions 4 + 8, type 4, offset 8

void check_magic(const MappedFile& file, Cursor& cursor) {
  cursor.set_part("magic");
  uint8_t head[512];
  const size_t n = static_cast<size_t>(std::min<uint64_t>(file.size(), sizeof head));
  file.read_at(0, head, n);
  if (std::memcmp(head, &kMagic, std::min<size_t>(n, 4)) != 0) {
    const Sniffed found = sniff({head, n});
    cursor.fail(found.code, found.message);
  }
  if (n < kPreambleBytes) cursor.fail("truncated_header", "the file ends inside its header: download it again");
  cursor.take(4);
}

uint32_t read_version(Cursor& cursor) {
  cursor.set_part("version");
  const uint64_t start = cursor.pos();
  const auto version = cursor.read<uint32_t>();
  if (version == 2 || version == 3) return version;
  if (version == 1) {
    cursor.fail_at(start, "version_1",
                   "this is GGUF version 1 (2023), which nothing writes any more: get the model again");
  }
  if (version != 0 && (version & 0xFFFF) == 0) {
    cursor.fail_at(start, "big_endian", "this GGUF file was made for big-endian machines: get the little-endian one");
  }
  cursor.fail_at(start, "bad_version",
                 "GGUF version " + std::to_string(version) +
                     " is not supported (2 and 3 are): the file is damaged or newer than this program");
}

// A count is believed only as far as the file is long enough to hold that many entries.
uint64_t read_count(Cursor& cursor, uint64_t limit, uint64_t min_entry_bytes, const char* code, const char* what) {
  cursor.set_part(what);
  const uint64_t start = cursor.pos();
  const auto count = cursor.read<uint64_t>();
  if (count > limit) {
    cursor.fail_at(start, code,
                   "the file claims " + std::to_string(count) + " " + what + "; at most " + std::to_string(limit) +
                       " are allowed: the file is damaged");
  }
  if (count * min_entry_bytes > cursor.remaining()) {  // below 2^16 * 33
    cursor.fail_at(start, "truncated_header",
                   "the file is too short for its " + std::to_string(count) + " " + what + ": download it again");
  }
  return count;
}

bool has_control(std::string_view text) {
  return std::any_of(text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c == 0x7F; });
}

// A key or a tensor's name.
std::string read_name(Cursor& cursor, uint64_t max_bytes, const char* too_long, const char* bad) {
  const uint64_t start = cursor.pos();
  std::string name(cursor.string(max_bytes, too_long));
  if (name.empty()) cursor.fail_at(start, bad, "a name in the header is empty: the file is damaged");
  if (has_control(name)) {
    cursor.fail_at(start, bad,
                   "the name '" + printable(name, 80) + "' contains control characters: the file is damaged");
  }
  return name;
}

ValueType read_value_type(Cursor& cursor) {
  const uint64_t start = cursor.pos();
  const auto type = cursor.read<uint32_t>();
  if (type >= kValueTypes) {
    cursor.fail_at(start, "bad_value_type",
                   "value type " + std::to_string(type) + " does not exist: the file is damaged");
  }
  return static_cast<ValueType>(type);
}

void check_booleans(const Cursor& cursor, const uint8_t* data, uint64_t count, uint64_t start) {
  for (uint64_t i = 0; i < count; ++i) {
    if (data[i] > 1) {
      cursor.fail_at(start + i, "bad_bool",
                     "a bool is stored as " + std::to_string(data[i]) + "; only 0 and 1 exist: the file is damaged");
    }
  }
}

// `count` values of one fixed-size type.
void read_scalars(Cursor& cursor, ValueType type, uint64_t count) {
  const uint64_t start = cursor.pos();
  const uint8_t* data = cursor.take(count * value_type_size(type));  // at most 2^22 * 8
  if (type == ValueType::kBool) check_booleans(cursor, data, count, start);
}

void read_array(Cursor& cursor, Value* value) {
  const uint64_t start = cursor.pos();
  value->element_type = read_value_type(cursor);
  if (value->element_type == ValueType::kArray) {
    cursor.fail_at(start, "nested_array", "arrays of arrays are not supported");
  }
  value->count = cursor.read<uint64_t>();
  if (value->count > kMaxArrayLength) {
    cursor.fail_at(start + 4, "array_too_long",
                   "an array claims " + std::to_string(value->count) + " elements; at most " +
                       std::to_string(kMaxArrayLength) + " are allowed: the file is damaged");
  }
  value->offset = cursor.pos();
  if (value->element_type == ValueType::kString) {
    for (uint64_t i = 0; i < value->count; ++i) cursor.string(kMaxStringBytes, "string_too_long");
  } else {
    read_scalars(cursor, value->element_type, value->count);
  }
}

Value read_value(Cursor& cursor) {
  cursor.set_part("key");
  Value value{};
  value.key = read_name(cursor, kMaxKeyBytes, "key_too_long", "bad_key");
  cursor.set_field(value.key);
  value.type = value.element_type = read_value_type(cursor);
  value.count = 1;
  value.offset = cursor.pos();
  if (value.type == ValueType::kArray) {
    read_array(cursor, &value);
  } else if (value.type == ValueType::kString) {
    value.offset += sizeof(uint64_t);
    cursor.string(kMaxStringBytes, "string_too_long");
  } else {
    read_scalars(cursor, value.type, 1);
  }
  value.size = cursor.pos() - value.offset;
  return value;
}

void index_values(Header* header) {
  const std::vector<Value>& values = header->values;
  header->by_key.resize(values.size());
  std::iota(header->by_key.begin(), header->by_key.end(), 0u);
  std::sort(header->by_key.begin(), header->by_key.end(), [&](uint32_t a, uint32_t b) {
    const int order = values[a].key.compare(values[b].key);
    return order != 0 ? order < 0 : a < b;
  });
  for (size_t i = 1; i < values.size(); ++i) {
    const Value& second = values[header->by_key[i]];
    if (values[header->by_key[i - 1]].key == second.key) {
      fail_value(second, "duplicate_key", "the key '" + printable(second.key, 80) + "' occurs twice");
    }
  }
}

uint32_t read_alignment(const Cursor& cursor, const Header& header) {
  const Value* found = header.find("general.alignment");
  if (!found) return kDefaultAlignment;
  Value value = *found;
  value.data = cursor.at(value.offset);
  if (value.type == ValueType::kArray)
    fail_value(value, "wrong_type", "'general.alignment' is an array; expected an integer");
  const uint64_t alignment = integer_at(value, 0, kMinAlignment, kMaxAlignment);
  if (!std::has_single_bit(alignment)) {
    fail_value(value, "bad_alignment",
               "'general.alignment' is " + std::to_string(alignment) + "; expected a power of two");
  }
  return static_cast<uint32_t>(alignment);
}

const TensorType& read_tensor_type(Cursor& cursor, const std::string& name) {
  const uint64_t start = cursor.pos();
  const auto id = cursor.read<uint32_t>();
  if (const TensorType* type = find_type(id)) return *type;
  const std::string tensor = "tensor '" + printable(name) + "' has type ";
  if (const char* removed = removed_type_name(id)) {
    throw Error(Status::kUnsupported, "removed_tensor_type",
                tensor + removed + ", which was removed from the format: get the model again; runnable types are " +
                    runnable_types(),
                printable(name), start);
  }
  throw Error(Status::kUnsupported, "unknown_tensor_type",
              tensor + std::to_string(id) +
                  ", which does not exist: the file is newer than this program or damaged; runnable types are " +
                  runnable_types(),
              printable(name), start);
}

void read_dims(Cursor& cursor, TensorInfo* tensor) {
  const uint64_t start = cursor.pos();
  tensor->n_dims = cursor.read<uint32_t>();
  if (tensor->n_dims < 1 || tensor->n_dims > kMaxDims) {
    cursor.fail_at(start, "bad_dims",
                   "a tensor has " + std::to_string(tensor->n_dims) + " dimensions; expected 1 to 4");
  }
  for (uint32_t i = 0; i < kMaxDims; ++i) {
    tensor->dims[i] = 1;
    if (i >= tensor->n_dims) continue;
    const uint64_t at = cursor.pos();
    tensor->dims[i] = cursor.read<uint64_t>();
    if (tensor->dims[i] < 1 || tensor->dims[i] > kMaxDim) {
      cursor.fail_at(at, "bad_dims",
                     "a dimension is " + std::to_string(static_cast<int64_t>(tensor->dims[i])) +
                         "; expected 1 to 2^40: the file is damaged");
    }
  }
}

uint64_t tensor_bytes(const Cursor& cursor, const TensorInfo& tensor, const TensorType& type) {
  if (tensor.dims[0] % type.block_size != 0) {
    cursor.fail_at(tensor.entry, "partial_block",
                   "a row has " + std::to_string(tensor.dims[0]) + " values, but " + type.name +
                       " packs them in blocks of " + std::to_string(type.block_size));
  }
  uint64_t bytes = tensor.dims[0] / type.block_size;
  bool fits = checked_mul(bytes, type.block_bytes, &bytes);
  for (uint32_t i = 1; i < kMaxDims && fits; ++i) fits = checked_mul(bytes, tensor.dims[i], &bytes);
  if (!fits || bytes > INT64_MAX) {
    cursor.fail_at(tensor.entry, "tensor_too_large",
                   "the product of a tensor's dimensions overflows: the file is damaged");
  }
  return bytes;
}

// `offset` is still relative to the start of the data.
TensorInfo read_tensor(Cursor& cursor, uint32_t part) {
  cursor.set_part("tensor");
  TensorInfo tensor{};
  tensor.entry = cursor.pos();
  tensor.part = part;
  tensor.name = read_name(cursor, kMaxTensorNameBytes, "name_too_long", "bad_name");
  cursor.set_field(tensor.name);
  read_dims(cursor, &tensor);
  const TensorType& type = read_tensor_type(cursor, tensor.name);
  tensor.type = type.id;
  tensor.size = tensor_bytes(cursor, tensor, type);
  tensor.offset = cursor.read<uint64_t>();
  return tensor;
}

// The data of each tensor begins where the last one's ended, rounded up to the alignment: so GGUF files are written,
// and any other layout is refused, as the format's original reader does. `available`: bytes from the data's start to
// the end of the file. Returns where the data ends.
uint64_t check_layout(Cursor& cursor, const std::vector<TensorInfo>& tensors, uint64_t alignment, uint64_t available) {
  uint64_t end = 0;
  for (const TensorInfo& tensor : tensors) {
    cursor.set_field(tensor.name);
    const auto fail = [&](const char* code, const char* message) { cursor.fail_at(tensor.entry, code, message); };
    uint64_t expected, last;
    if (!checked_align(end, alignment, &expected) || !checked_add(expected, tensor.size, &end) || end > INT64_MAX) {
      fail("tensor_too_large", "the sizes of the tensors overflow: the file is damaged");
    }
    if (tensor.offset == expected) continue;
    if (tensor.offset % alignment != 0)
      fail("tensor_misaligned", "a tensor's data is not aligned: the file is damaged");
    if (tensor.offset < expected) fail("tensor_overlap", "two tensors share data: the file is damaged");
    if (!checked_add(tensor.offset, tensor.size, &last) || last > available) {
      fail("tensor_past_end", "a tensor's data lies outside the file: the file is damaged");
    }
    fail("tensor_gap", "there is a hole before a tensor's data: the file is damaged");
  }
  return end;
}

// Makes offsets absolute, checks that the data is there, and sets data_end.
void place_tensors(Cursor& cursor, uint64_t file_size, Header* header) {
  if (header->tensors.empty()) return;
  uint64_t start;  // no overflow: positions are below 2^63
  if (!checked_align(cursor.pos(), header->alignment, &start)) cursor.fail("truncated_data", "the header is too long");
  const uint64_t available = file_size > start ? file_size - start : 0;
  const uint64_t length = check_layout(cursor, header->tensors, header->alignment, available);
  if (!checked_add(start, length, &header->data_end))
    cursor.fail("tensor_too_large", "the sizes of the tensors overflow");
  for (TensorInfo& tensor : header->tensors) {
    if (tensor.offset + tensor.size > available) {
      cursor.set_field(tensor.name);
      cursor.fail_at(file_size, "truncated_data",
                     "the file ends " + human_bytes(header->data_end - file_size) + " early (" +
                         human_bytes(file_size) + " of " + human_bytes(header->data_end) +
                         " are there): download it again");
    }
    tensor.offset += start;
  }
}

}  // namespace

const Value* Header::find(std::string_view key) const {
  const auto it = std::lower_bound(by_key.begin(), by_key.end(), key,
                                   [&](uint32_t i, std::string_view wanted) { return values[i].key < wanted; });
  return it != by_key.end() && values[*it].key == key ? &values[*it] : nullptr;
}

Header read_header(const MappedFile& file, uint32_t part) {
  Header header;
  Cursor cursor(file, kMaxHeaderBytes);
  check_magic(file, cursor);
  header.version = read_version(cursor);
  const uint64_t n_tensors = read_count(cursor, kMaxTensors, kMinTensorBytes, "too_many_tensors", "tensors");
  const uint64_t n_keys = read_count(cursor, kMaxKeys, kMinKeyBytes, "too_many_keys", "keys");
  for (uint64_t i = 0; i < n_keys; ++i) header.values.push_back(read_value(cursor));
  index_values(&header);
  header.alignment = read_alignment(cursor, header);
  for (uint64_t i = 0; i < n_tensors; ++i) header.tensors.push_back(read_tensor(cursor, part));
  place_tensors(cursor, file.size(), &header);
  header.bytes = cursor.finish();
  for (Value& value : header.values) value.data = header.bytes.get() + value.offset;
  return header;
}

}  // namespace pe::gguf
