// Thousands of damaged files a second, in one process, for tests/gguf/test_reader.py. Best under sanitizers.
//
//   gguf_check cut STEP FILE...       every STEP-th truncation of valid files; each must be refused
//   gguf_check mutate STEP FILE...    every STEP-th header byte replaced (STEP 1: by all 255 others), and boundary
//                                     integers written over every STEP-th position; each gives a file or an error
//   gguf_check bounded FILE...        opens each file with a heap of at most 6 x its size + 32 MiB
//   gguf_check copying FILE           copy-on-load when it is stopped, and when the file shrinks under it (FILE is cut)
//   gguf_check get FILE               typed access; one request a line on stdin, one answer a line
// Prints counts; exit status 1 or an abort is a failure.
#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <new>
#include <sstream>
#include <string>
#include <vector>

#include "../hostile/boundary.h"
#include "../hostile/judge.h"

#ifdef __linux__
#include <sys/resource.h>
#endif

namespace {

using hostile::require;
using pe::gguf::ElementKind;
using pe::gguf::File;

using Bytes = std::vector<std::byte>;

Bytes slurp(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(in)), {});
  require(!text.empty(), "the test's own file can be read");
  const auto* begin = reinterpret_cast<const std::byte*>(text.data());
  return {begin, begin + text.size()};
}

// The header's size and the end of what is needed of a valid file.
struct Extent {
  size_t header;
  size_t end;
};

Extent extent(const Bytes& bytes) {
  const auto file = File::from_memory(bytes);
  if (file->tensors().empty()) return {bytes.size(), bytes.size()};
  const auto& last = file->tensors().back();
  return {static_cast<size_t>(file->tensors().front().offset), static_cast<size_t>(last.offset + last.size)};
}

struct Counts {
  uint64_t opened = 0;
  uint64_t refused = 0;
};

// The reader alone: these files are no models.
void count(Counts* counts, std::span<const std::byte> bytes) {
  try {
    hostile::sink = hostile::touch(*File::from_memory(bytes));
    ++counts->opened;
  } catch (const pe::Error& error) {
    require(error.status == pe::Status::kFormat || error.status == pe::Status::kUnsupported, "the file is blamed");
    hostile::check_error(error, bytes.size());
    ++counts->refused;
  }
}

void cut(const std::string& path, size_t step, Counts* counts) {
  const Bytes bytes = slurp(path);
  const size_t end = extent(bytes).end;
  for (size_t size = 1; size < end; size += step) {
    const Bytes shorter(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(size));  // exact size for the sanitizer
    count(counts, shorter);
  }
  require(counts->opened == 0, "a truncated file is refused");
}

void substitute(Bytes& bytes, size_t at, bool all, Counts* counts) {
  const auto original = static_cast<unsigned>(bytes[at]);
  const unsigned few[] = {0, 1, 0x7F, 0x80, 0xFF, original ^ 1, original ^ 0x80, (original + 1) & 0xFF};
  for (unsigned i = 0; i < (all ? 256 : std::size(few)); ++i) {
    const unsigned next = all ? i : few[i];
    if (next == original) continue;
    bytes[at] = static_cast<std::byte>(next);
    count(counts, bytes);
  }
  bytes[at] = static_cast<std::byte>(original);
}

void overwrite(Bytes& bytes, size_t at, size_t header, Counts* counts) {
  static const std::vector<uint64_t> kIntegers = hostile::boundary_integers();
  for (const size_t width : {size_t{8}, size_t{4}}) {
    if (at + width > header) continue;
    std::byte saved[8];
    std::memcpy(saved, &bytes[at], width);
    for (const uint64_t integer : kIntegers) {
      std::memcpy(&bytes[at], &integer, width);
      count(counts, bytes);
    }
    std::memcpy(&bytes[at], saved, width);
  }
}

void mutate(const std::string& path, size_t step, Counts* counts) {
  Bytes bytes = slurp(path);
  const size_t header = extent(bytes).header;
  for (size_t at = 0; at < header; at += step) {
    substitute(bytes, at, step == 1, counts);
    overwrite(bytes, at, header, counts);
  }
}

// Bytes of private writable memory this process may still get.
void limit_memory([[maybe_unused]] uint64_t more) {
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmData:", 0) != 0) continue;
    const uint64_t now = std::stoull(line.substr(7)) * 1024;
    const rlimit limit{now + more, RLIM_INFINITY};
    require(setrlimit(RLIMIT_DATA, &limit) == 0, "the memory limit can be set");
  }
#endif
}

void open_bounded(const std::string& path, Counts* counts) {
  const uint64_t size = static_cast<uint64_t>(std::ifstream(path, std::ios::binary | std::ios::ate).tellg());
  limit_memory(6 * size + (uint64_t{32} << 20));
  try {
    hostile::sink = hostile::touch(*File::open(path, pe::gguf::Load::kMap));
    ++counts->opened;
  } catch (const pe::Error& error) {
    require(error.status != pe::Status::kMemory, "the heap stays below 6 x metadata + 32 MiB");
    ++counts->refused;
  } catch (const std::bad_alloc&) {
    require(false, "the heap stays below 6 x metadata + 32 MiB");
  }
}

// The code of the error that `run` throws, "" when it throws none.
template <class Run>
std::string code_of(Run run) {
  try {
    run();
  } catch (const pe::Error& error) {
    return error.code;
  }
  return "";
}

void check_copying(const std::string& path) {
  const auto stop_at_once = [](float) { return true; };
  const auto never_stop = [](float done) { return done < 0 || done > 1; };
  require(code_of([&] { File::open(path, pe::gguf::Load::kCopy, never_stop); }).empty(), "a file can be copied");
  require(code_of([&] { File::open(path, pe::gguf::Load::kCopy, stop_at_once); }) == "cancelled",
          "copying can be stopped");

  pe::MappedFile file = pe::MappedFile::open(path);
  std::filesystem::resize_file(path, file.size() - 1);
  require(code_of([&] { file.copy(file.size()); }) == "file_changed", "a shrinking file is an error");
  require(file.data() == nullptr, "a failed copy leaves no data");
}

ElementKind kind_of(const std::string& name) {
  if (name == "integer") return ElementKind::kInteger;
  if (name == "float") return ElementKind::kFloat;
  if (name == "bool") return ElementKind::kBool;
  require(name == "string", "the request names a kind of element");
  return ElementKind::kString;
}

template <class T>
std::string shown(const std::optional<T>& value) {
  std::ostringstream out;
  out.precision(9);
  if (value) {
    out << *value;
  } else {
    out << "absent";
  }
  return out.str();
}

// "u32 KEY MIN MAX", "maybe_f32 KEY", "array KEY KIND MIN MAX", "integer_at KEY INDEX": the value as text.
std::string get(const File& file, const std::string& line) {
  std::istringstream in(line);
  std::string what, key, kind;
  uint64_t min = 0, max = 0;
  in >> what >> key;
  if (what == "array") in >> kind;
  in >> min >> max;
  const auto narrow = [](uint64_t n) { return static_cast<uint32_t>(n); };
  if (what == "integer") return std::to_string(file.integer(key, min, max));
  if (what == "u32") return std::to_string(file.u32(key, narrow(min), narrow(max)));
  if (what == "f32") return shown(std::optional(file.f32(key)));
  if (what == "boolean") return std::to_string(file.boolean(key));
  if (what == "string") return std::string(file.string(key));
  if (what == "maybe_integer") return shown(file.maybe_integer(key, min, max));
  if (what == "maybe_u32") return shown(file.maybe_u32(key, narrow(min), narrow(max)));
  if (what == "maybe_f32") return shown(file.maybe_f32(key));
  if (what == "maybe_boolean") return shown(file.maybe_boolean(key));
  if (what == "maybe_string") return shown(file.maybe_string(key));
  if (what == "array") return std::to_string(file.array(key, kind_of(kind), min, max).count);
  const pe::gguf::Value* value = file.find(key);
  require(value != nullptr, "the request names a key");
  if (what == "integer_at") return std::to_string(pe::gguf::integer_at(*value, min, 0, UINT64_MAX));
  if (what == "number_at") return shown(std::optional(pe::gguf::number_at(*value, min)));
  require(what == "boolean_at", "the request is known");
  return std::to_string(pe::gguf::boolean_at(*value, min));
}

void answer_requests(const std::string& path) {
  const auto file = File::open(path, pe::gguf::Load::kHeader);
  for (std::string line; std::getline(std::cin, line);) {
    try {
      const std::string value = get(*file, line);  // before anything is printed
      std::cout << "= " << value << '\n';
    } catch (const pe::Error& error) {
      std::cout << "! " << error.code << ' ' << static_cast<int64_t>(error.offset) << ' ' << error.field << ' '
                << error.message << '\n';
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> args(argv + 1, argv + argc);
  if (args.size() < 2) return 2;
  Counts counts;
  if (args[0] == "get") {
    answer_requests(args[1]);
    return 0;
  }
  if (args[0] == "copying") {
    check_copying(args[1]);
    return 0;
  }
  if (args[0] == "bounded") {
    for (size_t i = 1; i < args.size(); ++i) open_bounded(args[i], &counts);
  } else {
    const size_t step = std::stoull(args[1]);
    for (size_t i = 2; i < args.size(); ++i) (args[0] == "cut" ? cut : mutate)(args[i], step, &counts);
  }
  std::cout << counts.opened << " opened, " << counts.refused << " refused\n";
  return 0;
}
