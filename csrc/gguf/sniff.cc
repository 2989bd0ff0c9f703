#include "gguf/sniff.h"

#include <algorithm>
#include <string>
#include <string_view>

namespace pe::gguf {
namespace {

// `text` in lower case without what may stand before the first tag: a byte-order mark and white space.
std::string opening(std::string_view text) {
  if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);
  const size_t start = text.find_first_not_of(" \t\r\n");
  std::string out(text.substr(std::min(start, text.size())));
  for (char& c : out) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return out;
}

bool is_web_page(std::string_view text) {
  const std::string start = opening(text);
  for (const char* tag : {"<!doctype", "<html", "<head", "<body", "<?xml", "<!--"}) {
    if (start.starts_with(tag)) return true;
  }
  return false;
}

// Safetensors: a little-endian u64, the length of the JSON object that follows.
bool is_safetensors(std::string_view text) {
  return text.size() >= 9 && text[8] == '{' && text.substr(4, 4) == std::string_view("\0\0\0\0", 4);
}

bool is_pickle(std::string_view text) { return text.size() >= 2 && text[0] == '\x80' && text[1] >= 2 && text[1] <= 5; }

bool is_old_ggml(std::string_view text) {
  for (const char* magic : {"lmgg", "fmgg", "tjgg", "algg"}) {  // ggml, ggmf, ggjt, ggla as little-endian u32
    if (text.starts_with(magic)) return true;
  }
  return false;
}

bool is_archive(std::string_view text) {
  using namespace std::string_view_literals;
  for (const auto magic : {"\x1F\x8B"sv, "BZh"sv,
                           "\xFD"
                           "7zXZ\0"sv,
                           "\x28\xB5\x2F\xFD"sv, "7z\xBC\xAF\x27\x1C"sv}) {
    if (text.starts_with(magic)) return true;
  }
  return text.size() >= 262 && text.substr(257, 5) == "ustar";
}

}  // namespace

Sniffed sniff(std::span<const uint8_t> head) {
  const std::string_view text(reinterpret_cast<const char*>(head.data()), head.size());
  if (text.starts_with("version https://git-lfs")) {
    return {"lfs_pointer",
            "this is a Git LFS pointer, not the model: run 'git lfs pull' in its folder, or download the file itself"};
  }
  if (is_web_page(text)) {
    return {"web_page",
            "this is a web page, not a model: the download link led to a page; use the link of the file itself"};
  }
  if (text.starts_with("PK\x03\x04")) {
    return {"zip_archive",
            "this is a ZIP archive (perhaps a PyTorch checkpoint), not a GGUF file: unpack or convert it first"};
  }
  if (is_pickle(text)) {
    return {"pickle", "this is a Python pickle (an old PyTorch checkpoint), not a GGUF file: convert it first"};
  }
  if (is_safetensors(text)) {
    return {"safetensors", "this is a safetensors file, not a GGUF file: convert its folder with pyengine-convert"};
  }
  if (is_old_ggml(text)) {
    return {"old_ggml", "this is a GGML file from before GGUF (2023): get the model again in GGUF form"};
  }
  if (is_archive(text)) {
    return {"compressed", "this is a compressed file or archive, not a GGUF file: unpack it first"};
  }
  if (opening(text).starts_with("{")) {
    return {"json_text",
            "this is JSON text, not a model: perhaps an error message of the download site, or a config file"};
  }
  if (std::all_of(head.begin(), head.end(), [](uint8_t byte) { return byte == 0; })) {
    return {"all_zeros", "this file begins with zeros: its download was never finished; download it again"};
  }
  return {"bad_magic", "this is not a GGUF file: its first four bytes are not 'GGUF'"};
}

}  // namespace pe::gguf
