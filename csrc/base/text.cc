#include "base/text.h"

#include <cstring>

namespace pe {
namespace {

// Length of the well-formed sequence at p (1..4 bytes, n >= 1 available) and its code point; 0 when ill-formed.
size_t decode(const unsigned char* p, size_t n, uint32_t* code) {
  const unsigned char lead = p[0];
  if (lead < 0x80) {
    *code = lead;
    return 1;
  }
  size_t length;
  unsigned char low = 0x80, high = 0xBF;  // the range of the second byte excludes long forms and surrogates
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return 0;
  }
  if (n < length || p[1] < low || p[1] > high) return 0;
  uint32_t value = lead & (0xFFu >> (length + 1));
  for (size_t i = 1; i < length; ++i) {
    if ((p[i] & 0xC0) != 0x80) return 0;
    value = value << 6 | (p[i] & 0x3Fu);
  }
  *code = value;
  return length;
}

bool is_line_break(uint32_t c) { return c == '\t' || c == '\n' || c == '\r' || c == 0x2028 || c == 0x2029; }

bool is_hidden(uint32_t c) {
  return c < 0x20 || (c >= 0x7F && c <= 0x9F) || c == 0xAD || c == 0x061C || c == 0x180E ||
         (c >= 0x200B && c <= 0x200F) || (c >= 0x202A && c <= 0x202E) || (c >= 0x2060 && c <= 0x206F) || c == 0xFEFF ||
         (c >= 0xFFF9 && c <= 0xFFFB) || (c >= 0xE0000 && c <= 0xE007F);
}

}  // namespace

bool valid_utf8(std::string_view text) {
  const auto* p = reinterpret_cast<const unsigned char*>(text.data());
  const auto* end = p + text.size();
  while (p != end) {
    while (end - p >= 8) {  // eight ASCII bytes at a time
      uint64_t word;
      std::memcpy(&word, p, 8);
      if (word & 0x8080808080808080u) break;
      p += 8;
    }
    if (p == end) break;
    uint32_t code;
    const size_t length = decode(p, static_cast<size_t>(end - p), &code);
    if (length == 0) return false;
    p += length;
  }
  return true;
}

std::string printable(std::string_view text, size_t max_bytes) {
  const auto* p = reinterpret_cast<const unsigned char*>(text.data());
  const auto* end = p + text.size();
  std::string out;
  while (p != end) {
    uint32_t code = 0;
    const size_t length = decode(p, static_cast<size_t>(end - p), &code);
    std::string_view piece(reinterpret_cast<const char*>(p), length);
    if (length == 0) {
      piece = "\xEF\xBF\xBD";
    } else if (is_line_break(code)) {
      piece = " ";
    } else if (is_hidden(code)) {
      piece = {};
    }
    if (piece.size() > max_bytes - out.size()) return out + "...";
    out += piece;
    p += length == 0 ? 1 : length;
  }
  return out.empty() && !text.empty() ? "\xEF\xBF\xBD" : out;
}

std::string human_bytes(uint64_t bytes) {
  if (bytes < 1000) return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes");
  static constexpr const char* kUnits[] = {"kB", "MB", "GB", "TB", "PB", "EB"};
  uint64_t tenths = bytes / 100 + (bytes % 100 >= 50);  // of a kB; then of each next unit, rounding half up
  size_t unit = 0;
  while (tenths >= 10000 && unit < 5) {
    tenths = tenths / 1000 + (tenths % 1000 >= 500);
    ++unit;
  }
  return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) + " " + kUnits[unit];
}

}  // namespace pe
