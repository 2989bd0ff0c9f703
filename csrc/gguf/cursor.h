// Reads a file's header from its beginning, through a private copy that nothing else can change.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "base/mapped_file.h"

namespace pe::gguf {

// Invariant: pos <= loaded <= file size. The copy grows by doubling with what was taken, never with what a file claims.
// Every failure is Error(kFormat) at the current position that names the current field.
class Cursor {
 public:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  using Bytes = std::unique_ptr<uint8_t, Free>;

  // Positions past max_bytes are "metadata_too_large".
  Cursor(const MappedFile& file, uint64_t max_bytes) : file_(file), max_bytes_(max_bytes) {}

  uint64_t pos() const { return pos_; }
  uint64_t remaining() const { return file_.size() - pos_; }

  // What is being read, for errors. A key or a tensor is named in the message too; of the fixed parts the message speaks.
  void set_field(std::string_view name) { set(name, true); }
  void set_part(std::string_view name) { set(name, false); }

  // The next n bytes, valid until the next call of take.
  const uint8_t* take(uint64_t n);
  // Bytes that were taken before, valid until the next call of take.
  const uint8_t* at(uint64_t offset) const { return bytes_.get() + offset; }
  template <class T>
  T read() {  // little-endian, as is every supported machine
    T value;
    std::memcpy(&value, take(sizeof(T)), sizeof(T));
    return value;
  }
  // A u64 length and that many bytes of UTF-8. Codes: too_long (given), "bad_utf8".
  std::string_view string(uint64_t max_bytes, const char* too_long);

  // Error at `offset`, by default where the cursor stands.
  [[noreturn]] void fail(const char* code, const std::string& message) const { fail_at(pos_, code, message); }
  [[noreturn]] void fail_at(uint64_t offset, const char* code, const std::string& message) const;

  // Hands over the copy of bytes 0..pos, trimmed. The cursor is finished.
  Bytes finish();

 private:
  void set(std::string_view field, bool named) {
    field_ = field;
    named_ = named;
  }
  void load(uint64_t end);

  const MappedFile& file_;
  const uint64_t max_bytes_;
  uint64_t pos_ = 0;
  uint64_t loaded_ = 0;
  Bytes bytes_;
  std::string field_;
  bool named_ = false;
};

}  // namespace pe::gguf
