#include "gguf/cursor.h"

#include <algorithm>
#include <bit>

#include "base/error.h"
#include "base/text.h"

namespace pe::gguf {

static_assert(std::endian::native == std::endian::little, "GGUF is read in place, as little-endian");

namespace {
constexpr uint64_t kFirstLoad = 256 << 10;
}

const uint8_t* Cursor::take(uint64_t n) {
  if (n > remaining()) {
    fail("truncated_header", "the file ends inside its header: download it again");
  }
  if (n > max_bytes_ - pos_) {
    fail("metadata_too_large", "the header is larger than " + human_bytes(max_bytes_) + ": the file is damaged");
  }
  if (n > loaded_ - pos_) load(pos_ + n);
  const uint8_t* p = bytes_.get() + pos_;
  pos_ += n;
  return p;
}

void Cursor::load(uint64_t end) {
  const uint64_t target = std::min(file_.size(), std::max({end, loaded_ * 2, kFirstLoad}));
  auto* grown = static_cast<uint8_t*>(std::realloc(bytes_.get(), static_cast<size_t>(target)));
  if (!grown) {
    throw Error(Status::kMemory, "out_of_memory", "not enough memory for the file's header", field_, pos_);
  }
  (void)bytes_.release();
  bytes_.reset(grown);
  file_.read_at(loaded_, grown + loaded_, static_cast<size_t>(target - loaded_));
  loaded_ = target;
}

std::string_view Cursor::string(uint64_t max_bytes, const char* too_long) {
  const uint64_t start = pos_;
  const auto length = read<uint64_t>();
  if (length > max_bytes) {
    fail_at(start, too_long,
            "a text claims " + human_bytes(length) + "; at most " + human_bytes(max_bytes) +
                " are allowed: the file is damaged");
  }
  const std::string_view text(reinterpret_cast<const char*>(take(length)), static_cast<size_t>(length));
  if (!valid_utf8(text)) fail_at(start, "bad_utf8", "a text in the header is not valid UTF-8: the file is damaged");
  return text;
}

void Cursor::fail_at(uint64_t offset, const char* code, const std::string& message) const {
  const std::string where = !named_ ? "" : " (while reading '" + printable(field_, 80) + "')";
  throw Error(Status::kFormat, code, message + where, printable(field_, 80), offset);
}

Cursor::Bytes Cursor::finish() {
  if (auto* trimmed =
          static_cast<uint8_t*>(std::realloc(bytes_.get(), static_cast<size_t>(std::max<uint64_t>(pos_, 1))))) {
    (void)bytes_.release();
    bytes_.reset(trimmed);
  }
  return std::move(bytes_);
}

}  // namespace pe::gguf
