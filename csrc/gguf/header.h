// One GGUF file: its metadata and tensor table, checked. A split model has several.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "gguf/cursor.h"
#include "gguf/value.h"

namespace pe::gguf {

struct TensorInfo {
  std::string name;
  uint32_t type;        // a GGUF tensor type id that find_type knows
  uint32_t n_dims;      // 1..4
  uint64_t dims[4];     // dims[0] is the length of a row; 1 past n_dims
  uint64_t offset;      // of the data, from the start of its file
  uint64_t size;        // bytes of the data
  uint64_t entry;       // where its description stands in the file, for error messages
  uint32_t part;        // which file of a split model, from 0
  const uint8_t* data;  // `size` bytes; NULL when opened with Load::kHeader
};

struct Header {
  uint32_t version = 0;
  uint32_t alignment = 0;
  uint64_t data_end = 0;            // one past the last byte of tensor data; 0 without tensors
  std::vector<Value> values;        // in file order; their data is in `bytes`
  std::vector<uint32_t> by_key;     // indices of values, keys ascending
  std::vector<TensorInfo> tensors;  // in file order; data is NULL
  Cursor::Bytes bytes;

  const Value* find(std::string_view key) const;
};

// Reads and checks everything but the contents of tensors and that their names differ. `part` goes into the tensors.
Header read_header(const MappedFile& file, uint32_t part);

}  // namespace pe::gguf
