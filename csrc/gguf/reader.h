// A GGUF file (or all parts of a split one), opened, checked and immutable.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/mapped_file.h"
#include "gguf/header.h"

namespace pe::gguf {

// The numbers of pe_load.
enum class Load : int { kMap = 0, kCopy = 1, kHeader = 2 };

// What the elements of an array have to be.
enum class ElementKind { kInteger, kFloat, kBool, kString };

// Any number of threads may use one File. Pointers and views into it live as long as it does.
// All failures are pe::Error; docs/errors.md lists the codes.
class File {
 public:
  using Progress = MappedFile::Progress;

  // Opens one file, or all parts when it is the first part of a split model ("name-00001-of-0000N.gguf").
  static std::shared_ptr<const File> open(const std::string& path, Load load, const Progress& progress = {});
  // A whole (unsplit) file in memory that the caller keeps alive.
  static std::shared_ptr<const File> from_memory(std::span<const std::byte> bytes, Load load = Load::kMap);

  uint32_t version() const { return header_.version; }
  uint32_t n_parts() const { return static_cast<uint32_t>(parts_.size()); }
  // Metadata in file order; of a split model the first part's.
  std::span<const Value> values() const { return header_.values; }
  // Tensors in file order, part after part.
  std::span<const TensorInfo> tensors() const { return tensors_; }

  // NULL when absent.
  const Value* find(std::string_view key) const { return header_.find(key); }
  const TensorInfo* find_tensor(std::string_view name) const;

  // Typed access. Integers may have any integer type of the format as long as the value is in min..max, floats must be
  // f32 or f64 and finite. Codes: missing_key, wrong_type, value_out_of_range, value_not_finite, wrong_length.
  // The maybe_ forms give nothing when the key is absent and fail all the same when it is wrong.
  uint64_t integer(std::string_view key, uint64_t min, uint64_t max) const;
  uint32_t u32(std::string_view key, uint32_t min, uint32_t max) const;
  float f32(std::string_view key) const;
  bool boolean(std::string_view key) const;
  std::string_view string(std::string_view key) const;
  std::optional<uint64_t> maybe_integer(std::string_view key, uint64_t min, uint64_t max) const;
  std::optional<uint32_t> maybe_u32(std::string_view key, uint32_t min, uint32_t max) const;
  std::optional<float> maybe_f32(std::string_view key) const;
  std::optional<bool> maybe_boolean(std::string_view key) const;
  std::optional<std::string_view> maybe_string(std::string_view key) const;
  // An array of min_count..max_count elements of that kind.
  const Value& array(std::string_view key, ElementKind kind, uint64_t min_count, uint64_t max_count) const;

  // What is mapped of each part; nothing of copies.
  std::vector<std::span<const std::byte>> mappings() const;

  // Throws Error kIo "file_changed" when a guarded mapping (base/file_guard.h) is no longer what was opened: to be called
  // after reading tensor data, before the result counts.
  void check_unchanged() const;

 private:
  File() = default;
  void add_part(MappedFile file, Header* header, Load load, const Progress& progress);
  void check_tensor_total(uint32_t count) const;
  void index_tensors();
  const Value& need(std::string_view key) const;

  Header header_;  // of the first part; its tensors have moved to tensors_
  std::vector<MappedFile> parts_;
  std::vector<TensorInfo> tensors_;
  std::vector<uint32_t> by_name_;  // indices of tensors_, names ascending
};

}  // namespace pe::gguf
