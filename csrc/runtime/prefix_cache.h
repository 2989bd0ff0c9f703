// What the sessions of one model know of each other: a text that begins as another did takes over its keys and values,
// which depend on the tokens before them and on nothing else, instead of computing them again.
//
// Two sources. A living session's own cache is read in place, to the token. Of what sessions let go (closed, or gone on
// to another text) whole blocks of kBlock tokens are kept, bounded in memory, the least recently used dropped first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/process.h"
#include "runtime/kv_cache.h"

namespace pe {

// A session's tokens, and the keys and values of each of them.
struct Sequence {
  explicit Sequence(const KvCache::Shape& shape) : kv(shape) {
    tokens.reserve(shape.positions);
  }  // append never allocates

  KvCache kv;
  std::vector<int32_t> tokens;  // written by the session's thread alone, through resize and append; never reallocated

  void resize(size_t n) {
    const std::lock_guard lock(mutex);
    tokens.resize(n);
  }
  void append(const int32_t* ids, size_t n) {
    const std::lock_guard lock(mutex);
    tokens.insert(tokens.end(), ids, ids + n);
  }
  // While it is held no token goes away, so that other threads may copy the keys and values of those there are.
  // An evaluation writes behind them, and appends its tokens when it is done.
  ProcessMutex mutex;
};

// In the child of a fork it knows nothing and keeps nothing: another thread may have left it half-way.
class PrefixCache {
 public:
  static constexpr size_t kBlock = 64;                              // tokens
  using Hash = uint64_t (*)(uint64_t seed, const int32_t* tokens);  // of kBlock tokens

  // Chained over the blocks of a text. It finds; it proves nothing: tokens are compared, and the block before.
  static uint64_t hash_of(uint64_t seed, const int32_t* tokens);

  // `max_bytes` of keys and values are kept of what sessions let go.
  explicit PrefixCache(size_t max_bytes, Hash hash = hash_of) : max_bytes_(max_bytes), hash_(hash) {}
  ~PrefixCache();

  // From now on others may copy from the sequence; its kv types and head dimensions are those of one model.
  void add(Sequence& sequence);
  void remove(Sequence& sequence);

  // Keeps copies of the whole blocks of a sequence, as far as memory allows. Never throws: what cannot be kept is not.
  void keep(Sequence& sequence) noexcept;

  // Copies keys and values for the longest known beginning of tokens[0, n) that is longer than what `to` holds, which is
  // a beginning of them itself, and appends those tokens. Returns how many it holds then.
  size_t extend(Sequence& to, const int32_t* tokens, size_t n);

  size_t bytes() const;  // kept now

 private:
  struct Block {
    Block* before;  // nullptr: the first of a text
    uint64_t hash;
    std::vector<int32_t> tokens;  // [kBlock]
    Kv type;
    size_t followers = 0;  // blocks whose `before` this is
    uint64_t used = 0;     // clock_ of the last use
    AlignedBuffer data;    // [layer][kv head][kBlock][row], keys, then values
  };

  struct Known {
    std::vector<Sequence*> living;
    std::unordered_multimap<uint64_t, std::unique_ptr<Block>> blocks;
  };

  Block* find(const Block* before, uint64_t hash, Kv type, const int32_t* tokens);
  bool make_room(size_t bytes);

  const size_t max_bytes_;
  const Hash hash_;
  mutable ProcessMutex mutex_;  // taken before any Sequence's
  std::unique_ptr<Known> known_ = std::make_unique<Known>();
  size_t bytes_ = 0;
  uint64_t clock_ = 0;
};

}  // namespace pe
