// Random numbers that are the same everywhere, for cases that can be made again by name and number.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

namespace hostile {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  uint64_t below(uint64_t n) { return next() % n; }
  uint64_t between(uint64_t low, uint64_t high) { return low + below(high - low + 1); }
  bool chance(uint64_t one_in) { return below(one_in) == 0; }
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[below(choices.size())];
  }
  template <class T>
  T& pick(std::vector<T>& choices) {
    return choices[below(choices.size())];
  }
  // Any magnitude is as likely as any other.
  uint64_t any() { return next() >> below(64); }
  std::string bytes(size_t n) {
    std::string out(n, '\0');
    for (char& c : out) c = static_cast<char>(next());
    return out;
  }
  std::string letters(size_t n) {
    std::string out(n, '\0');
    for (char& c : out) c = static_cast<char>('a' + below(26));
    return out;
  }

 private:
  uint64_t state_;
};

}  // namespace hostile
