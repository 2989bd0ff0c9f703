// What the checks of the operations share: counting, buffers that end at an unmapped page, values that provoke, and
// equality of bits.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "quant/fp16.h"

namespace pe {

inline long checks = 0, failures = 0;

inline void check(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  if (++failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

// n values whose end touches an unmapped page, shifted back by `shift` bytes.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t n, size_t shift = 0) : n_(n) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    bytes_ = (n * sizeof(T) + shift + page - 1) / page * page + page;
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    base_ = static_cast<uint8_t*>(memory);
    if (mprotect(base_ + bytes_ - page, page, PROT_NONE) != 0) std::abort();
    data_ = reinterpret_cast<T*>(base_ + bytes_ - page - shift - n * sizeof(T));
  }
  ~Guarded() { munmap(base_, bytes_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* get() { return data_; }
  size_t size() const { return n_; }
  void set(const std::vector<T>& from) { std::memcpy(static_cast<void*>(data_), from.data(), n_ * sizeof(T)); }
  std::vector<T> copy() const {
    std::vector<T> out(n_);
    std::memcpy(out.data(), data_, n_ * sizeof(T));
    return out;
  }

 private:
  size_t n_, bytes_;
  uint8_t* base_;
  T* data_;
};

inline uint64_t random_state = 1;
inline uint32_t random_bits() {  // splitmix64
  uint64_t z = (random_state += 0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
}
inline size_t below(size_t n) { return random_bits() % n; }
inline float uniform() { return static_cast<float>(random_bits()) * 0x1p-31f - 1.0f; }  // -1 .. 1

enum class Values { kPlain, kWide, kTiny, kHostile };
inline constexpr Values kAllValues[] = {Values::kPlain, Values::kWide, Values::kTiny, Values::kHostile};

inline float draw(Values values) {
  switch (values) {
    case Values::kPlain: return uniform();
    case Values::kWide:  // any finite magnitude
      return std::ldexp(uniform(), static_cast<int>(below(250)) - 125);
    case Values::kTiny:  // products underflow to either zero
      return std::ldexp(uniform(), -60 - static_cast<int>(below(90)));
    case Values::kHostile: {
      const float infinity = std::numeric_limits<float>::infinity();
      const float nan = std::numeric_limits<float>::quiet_NaN();
      const float odd[] = {0.0f,      -0.0f,   infinity, -infinity, nan,      -nan,  0x1p-149f, -0x1p-149f,
                           0x1p-126f, 3.4e38f, -3.4e38f, 65504.0f,  65520.0f, 88.8f, -104.0f,   0x1p-25f};
      return below(4) == 0 ? odd[below(std::size(odd))] : uniform() * 10;
    }
  }
  return 0;
}

inline std::vector<float> floats(size_t n, Values values) {
  std::vector<float> x(n);
  for (float& f : x) f = draw(values);
  return x;
}

inline bool same(float a, float b) { return (a != a && b != b) || float_bits(a) == float_bits(b); }
inline bool same(uint16_t a, uint16_t b) { return a == b || ((a & 0x7fff) > 0x7c00 && (b & 0x7fff) > 0x7c00); }

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!same(a[i], b[i])) return false;
  }
  return true;
}

inline bool near(long double a, long double b, long double tolerance) { return fabsl(a - b) <= tolerance; }

}  // namespace pe
