// What is asked of the engine for every file: a model that runs, or an error with code, place, field and sentence.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/text.h"
#include "gguf/reader.h"
#include "heap.h"
#include "model/model.h"
#include "model/session.h"

namespace hostile {

// Called before a broken promise ends the process; says which file it was.
inline std::function<void()> describe_case = [] {};

inline void require(bool holds, const char* promise, std::string_view detail = "") {
  if (holds) return;
  describe_case();
  std::fprintf(stderr, "broken promise: %s\n%.*s\n", promise, static_cast<int>(detail.size()), detail.data());
  std::abort();
}

inline volatile uint64_t sink;  // keeps the reads of touch()

// Touches what the reader vouches for, so that a sanitizer sees a wrong bound: all metadata, both ends of every tensor.
inline uint64_t touch(const pe::gguf::File& file) {
  uint64_t sum = 0;
  for (const pe::gguf::Value& value : file.values()) {
    require(file.find(value.key) == &value, "every key is found");
    if (value.element_type == pe::gguf::ValueType::kString && value.type == pe::gguf::ValueType::kArray) {
      pe::gguf::StringCursor strings(value);
      for (uint64_t i = 0; i < value.count; ++i) sum += pe::valid_utf8(strings.next());
    }
    for (uint64_t i = 0; i < value.size; ++i) sum += value.data[i];
  }
  for (const pe::gguf::TensorInfo& tensor : file.tensors()) {
    require(file.find_tensor(tensor.name) == &tensor, "every tensor is found");
    require(tensor.size > 0, "no tensor is empty");
    if (!tensor.data) continue;
    sum += tensor.data[0];
    sum += tensor.data[tensor.size - 1];
  }
  return sum;
}

inline bool one_of(std::string_view word, std::string_view words) {
  for (size_t at = 0; at <= words.size();) {
    const size_t end = std::min(words.find(' ', at), words.size());
    if (words.substr(at, end - at) == word) return true;
    at = end + 1;
  }
  return false;
}

// An error as docs/errors.md promises it.
inline void check_error(const pe::Error& error, uint64_t file_size) {
  const std::string_view code = error.code ? error.code : "";
  require(!code.empty() && code.find_first_not_of("abcdefghijklmnopqrstuvwxyz_0123456789") == code.npos,
          "an error has a code");
  const std::string& message = error.message;
  require(message.size() > 10 && message.find(' ') != message.npos && message.size() < 2000, "an error has a sentence",
          message);
  require(pe::printable(message, message.size()) == message, "a message is safe to print", message);
  require(pe::printable(error.field, error.field.size()) == error.field, "a field is safe to print", error.field);
  const bool blames_file = error.status == pe::Status::kFormat || error.status == pe::Status::kUnsupported;
  if (!blames_file) return;
  require(error.offset == pe::kNoOffset || error.offset <= file_size, "the offset is inside the file", message);
  require(!error.field.empty() || code == "empty_file", "an error names its field", message);
  // What is absent has no place.
  static constexpr std::string_view kPlaceless = "missing_key missing_tensor split_part_missing split_mismatch rope";
  require(error.offset != pe::kNoOffset || one_of(code, kPlaceless), "an error tells where", message);
}

// The model's memory is a matter of its sizes alone: asked for the longest context it claims, and not allocated.
inline void plan(const pe::Model& model) {
  pe::SessionOptions options;
  options.n_ctx = model.config().n_ctx_train;
  options.n_threads = 1;
  const auto bytes = pe::Session::bytes(model.config(), options);
  require(bytes.kv > 0 && bytes.scratch > 0, "memory is planned");
}

// A few tokens, one step of several and one of one. Throws Error(kNumeric) for what is not finite.
inline void evaluate(std::shared_ptr<const pe::Model> model) {
  const size_t n_vocab = model->config().n_vocab;
  pe::SessionOptions options;
  options.n_ctx = 8;
  options.n_threads = 1;
  options.n_chunk = 4;
  pe::Session session(std::move(model), options);
  std::vector<float> logits(n_vocab);
  const int32_t last = static_cast<int32_t>(n_vocab - 1);
  const int32_t tokens[] = {0, last, last / 2};
  session.eval(tokens, 2, pe::Want::kLast, logits.data());
  for (const float logit : logits) require(std::isfinite(logit), "logits are finite");
  session.eval(tokens + 2, 1, pe::Want::kLast, logits.data());
  for (const float logit : logits) require(std::isfinite(logit), "logits are finite");
}

inline int64_t heap_bound(uint64_t metadata) { return static_cast<int64_t>(6 * metadata + (uint64_t{32} << 20)); }

// From here on the heap counts; at most so much may be added until the model is planned.
class HeapLimit {
 public:
  explicit HeapLimit(uint64_t metadata) : bound_(heap_bound(metadata)) { heap::forget_peak(); }
  void check() const {
    require(heap::peak - before_ <= bound_, "the heap stays below 6 x metadata + 32 MiB",
            std::to_string(heap::peak - before_));
  }

 private:
  const int64_t bound_;
  const int64_t before_ = heap::live;
};

// The answer to one file: "runs", or the code of its error. `metadata`: an upper bound of its header's bytes.
template <class Open>
std::string answer(uint64_t file_size, uint64_t metadata, bool run, Open open) {
  const HeapLimit limit(metadata);
  try {
    const std::shared_ptr<const pe::gguf::File> file = open();
    sink = touch(*file);
    if (!file->tensors().empty() && !file->tensors()[0].data) return "runs";
    const std::shared_ptr<const pe::Model> model = pe::Model::of(file);
    plan(*model);
    limit.check();
    if (run) evaluate(model);
    return "runs";
  } catch (const pe::Error& error) {
    if (std::string_view(error.code) != "not_finite") limit.check();
    check_error(error, file_size);
    return error.code;
  } catch (const std::exception& error) {
    require(false, "nothing but an Error is thrown", error.what());
    return "";
  }
}

inline std::string answer_in_memory(std::span<const std::byte> bytes) {
  return answer(bytes.size(), bytes.size(), true, [&] { return pe::gguf::File::from_memory(bytes); });
}

}  // namespace hostile
