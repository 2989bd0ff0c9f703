// Text that came from outside: is it UTF-8, and how is it shown to a person.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace pe {

// Well-formed UTF-8 as Unicode 15 table 3-7 defines it: shortest forms only, no surrogates, at most U+10FFFF.
[[nodiscard]] bool valid_utf8(std::string_view text);

// Safe to print: control characters (C0, DEL, C1), line separators, bidirectional and invisible format characters are
// dropped, tabs and line breaks become a space, each ill-formed byte becomes U+FFFD. Past max_bytes the rest is cut at
// a character and "..." added. A text of which nothing would be left becomes one U+FFFD.
[[nodiscard]] std::string printable(std::string_view text, size_t max_bytes = 200);

// "17 bytes", "1.2 GB" (powers of ten, as download pages count).
[[nodiscard]] std::string human_bytes(uint64_t bytes);

}  // namespace pe
