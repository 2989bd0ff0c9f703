#include "gguf/reader.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "base/text.h"
#include "gguf/limits.h"

namespace pe::gguf {
namespace {

// "<prefix>-00001-of-00003.gguf": parts are counted from 1 in names, from 0 in the key split.no.
struct PartName {
  std::string prefix;
  uint32_t number = 0;
  uint32_t count = 0;
};

std::string part_path(const std::string& prefix, uint32_t number, uint32_t count) {
  char tail[32];
  std::snprintf(tail, sizeof tail, "-%05u-of-%05u.gguf", number, count);
  return prefix + tail;
}

std::optional<PartName> parse_part_name(const std::string& path) {
  constexpr size_t kTail = 20;  // "-00001-of-00003.gguf"
  if (path.size() < kTail) return {};
  const std::string tail = path.substr(path.size() - kTail);
  PartName name{path.substr(0, path.size() - kTail)};
  for (size_t i = 1; i <= 5; ++i) {
    const char a = tail[i], b = tail[i + 9];
    if (a < '0' || a > '9' || b < '0' || b > '9') return {};
    name.number = name.number * 10 + static_cast<uint32_t>(a - '0');
    name.count = name.count * 10 + static_cast<uint32_t>(b - '0');
  }
  if (part_path(name.prefix, name.number, name.count) != path) return {};
  return name;
}

std::optional<uint64_t> split_key(const Header& header, const char* key, uint64_t max) {
  const Value* value = header.find(key);
  if (!value) return {};
  if (value->type == ValueType::kArray) {
    fail_value(*value, "wrong_type", "'" + value->key + "' is an array; expected an integer");
  }
  return integer_at(*value, 0, 0, max);
}

uint32_t part_count(const Header& header) {
  return static_cast<uint32_t>(split_key(header, "split.count", kMaxParts).value_or(1));
}

[[noreturn]] void fail_split(const Header& header, const char* key, const char* code, const std::string& message) {
  const Value* value = header.find(key);
  throw Error(Status::kFormat, code, message, key, value ? value->offset : kNoOffset);
}

// The opened file says it is one of several: it must be the first, and its name must tell where the others are.
PartName check_first_part(const std::string& path, const Header& header, uint32_t count) {
  const auto number = split_key(header, "split.no", kMaxParts);
  const std::optional<PartName> name = parse_part_name(path);
  const std::string shown = "this is part " + std::to_string(number.value_or(0) + 1) + " of " + std::to_string(count);
  if (number.value_or(0) != 0) {
    const std::string first = name ? "'" + printable(part_path(name->prefix, 1, count)) + "'" : "the first part";
    fail_split(header, "split.no", "split_not_first", shown + " of a split model: open " + first + " instead");
  }
  if (!name || name->number != 1 || name->count != count) {
    fail_split(header, "split.count", "split_bad_name",
               shown + " of a split model, but its file is not named '...-00001-of-" +
                   part_path("", 1, count).substr(10, 5) +
                   ".gguf', so the other parts cannot be found: give the files their original names");
  }
  return *name;
}

void check_other_part(const Header& header, uint32_t index, uint32_t count) {
  const auto number = split_key(header, "split.no", kMaxParts);
  const auto total = split_key(header, "split.count", kMaxParts);
  if (number != index || total != count) {
    const auto text = [](std::optional<uint64_t> n, uint64_t plus) { return n ? std::to_string(*n + plus) : "?"; };
    fail_split(
        header, "split.no", "split_mismatch",
        "it says it is part " + text(number, 1) + " of " + text(total, 0) + ": the files do not belong together");
  }
}

// Runs `read`; its errors get the part's file name in front.
template <class Read>
void in_part(const std::string& path, Read read) {
  try {
    read();
  } catch (Error& error) {
    error.message = "in '" + printable(path) + "': " + error.message;
    throw;
  }
}

}  // namespace

std::shared_ptr<const File> File::open(const std::string& path, Load load, const Progress& progress) {
  std::shared_ptr<File> out(new File());
  MappedFile first = MappedFile::open(path);
  Header header = read_header(first, 0);
  const uint32_t count = std::max(1u, part_count(header));
  PartName name;
  if (count > 1) name = check_first_part(path, header, count);

  uint32_t index = 0;
  Progress of_part;
  if (progress)
    of_part = [&](float done) { return progress((static_cast<float>(index) + done) / static_cast<float>(count)); };
  out->add_part(std::move(first), &header, load, of_part);
  out->header_ = std::move(header);
  for (index = 1; index < count; ++index) {
    const std::string other = part_path(name.prefix, index + 1, count);
    in_part(other, [&] {
      try {
        MappedFile file = MappedFile::open(other);
        Header next = read_header(file, index);
        check_other_part(next, index, count);
        out->add_part(std::move(file), &next, load, of_part);
      } catch (const Error& error) {
        if (std::string_view(error.code) != "file_not_found") throw;
        throw Error(
            Status::kIo, "split_part_missing",
            "this part of the split model is missing: put all " + std::to_string(count) + " parts into one folder",
            "split.count");
      }
    });
  }
  out->check_tensor_total(count);
  out->index_tensors();
  return out;
}

std::shared_ptr<const File> File::from_memory(std::span<const std::byte> bytes, Load load) {
  std::shared_ptr<File> out(new File());
  MappedFile file = MappedFile::borrow(bytes);
  Header header = read_header(file, 0);
  const uint32_t count = part_count(header);
  if (count > 1)
    fail_split(header, "split.count", "split_in_memory", "a part of a split model cannot be opened from memory");
  out->add_part(std::move(file), &header, load, {});
  out->header_ = std::move(header);
  out->index_tensors();
  return out;
}

void File::add_part(MappedFile file, Header* header, Load load, const Progress& progress) {
  if (!header->tensors.empty() && load == Load::kMap) file.map();
  if (!header->tensors.empty() && load == Load::kCopy) file.copy(header->data_end, progress);
  for (TensorInfo& tensor : header->tensors) {
    if (load != Load::kHeader) tensor.data = reinterpret_cast<const uint8_t*>(file.data()) + tensor.offset;
    tensors_.push_back(std::move(tensor));
  }
  header->tensors = {};
  file.close_handle();
  parts_.push_back(std::move(file));
}

void File::check_tensor_total(uint32_t count) const {
  const auto declared = split_key(header_, "split.tensors.count", std::numeric_limits<uint64_t>::max());
  if (count > 1 && declared && *declared != tensors_.size()) {
    fail_split(header_, "split.tensors.count", "split_tensor_count",
               "the parts hold " + std::to_string(tensors_.size()) + " tensors together, but the first says " +
                   std::to_string(*declared) + ": the files do not belong together");
  }
}

void File::index_tensors() {
  by_name_.resize(tensors_.size());
  std::iota(by_name_.begin(), by_name_.end(), 0u);
  std::sort(by_name_.begin(), by_name_.end(), [&](uint32_t a, uint32_t b) {
    const int order = tensors_[a].name.compare(tensors_[b].name);
    return order != 0 ? order < 0 : a < b;
  });
  for (size_t i = 1; i < by_name_.size(); ++i) {
    const TensorInfo& second = tensors_[by_name_[i]];
    if (tensors_[by_name_[i - 1]].name == second.name) {
      const std::string name = printable(second.name);
      const std::string part = parts_.size() > 1 ? " (again in part " + std::to_string(second.part + 1) + ")" : "";
      throw Error(Status::kFormat, "duplicate_tensor", "the tensor '" + name + "' occurs twice" + part, name,
                  second.entry);
    }
  }
}

const TensorInfo* File::find_tensor(std::string_view name) const {
  const auto it = std::lower_bound(by_name_.begin(), by_name_.end(), name,
                                   [&](uint32_t i, std::string_view wanted) { return tensors_[i].name < wanted; });
  return it != by_name_.end() && tensors_[*it].name == name ? &tensors_[*it] : nullptr;
}

std::vector<std::span<const std::byte>> File::mappings() const {
  std::vector<std::span<const std::byte>> out;
  for (const MappedFile& part : parts_) out.push_back(part.mapping());
  return out;
}

void File::check_unchanged() const {
  for (size_t i = 0; i < parts_.size(); ++i) {
    if (!parts_[i].changed()) continue;
    const std::string which =
        parts_.size() > 1 ? "part " + std::to_string(i + 1) + " of the model file" : "the model file";
    throw Error(Status::kIo, "file_changed",
                which + " was cut or written to while it was in use: open it again once it is complete");
  }
}

}  // namespace pe::gguf
