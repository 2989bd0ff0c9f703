#include "runtime/prefix_cache.h"

#include <algorithm>
#include <cstring>
#include <exception>

#include "base/hash.h"

namespace pe {

namespace {

// Bytes of one position's keys (values) in one layer and KV head; a head's positions follow one another.
size_t k_stride(KvCache& kv) { return static_cast<size_t>(kv.k(0, 0, 1) - kv.k(0, 0, 0)); }
size_t v_stride(KvCache& kv) { return static_cast<size_t>(kv.v(0, 0, 1) - kv.v(0, 0, 0)); }

size_t block_bytes(KvCache& kv) {
  const KvCache::Shape& s = kv.shape();
  return s.layers * s.kv_heads * PrefixCache::kBlock * (k_stride(kv) + v_stride(kv));
}

// Calls copy(cache, block, bytes) for the rows of positions [from, to) of each plane; `block` points to those of a block
// that begins at position `start`.
template <typename Copy>
void each_run(KvCache& kv, std::byte* block, size_t start, size_t from, size_t to, Copy copy) {
  const KvCache::Shape& s = kv.shape();
  const auto plane = [&](auto row_of, size_t stride) {
    for (size_t layer = 0; layer < s.layers; ++layer)
      for (size_t head = 0; head < s.kv_heads; ++head, block += PrefixCache::kBlock * stride)
        copy(row_of(layer, head), block + (from - start) * stride, (to - from) * stride);
  };
  plane([&](size_t layer, size_t head) { return kv.k(layer, head, from); }, k_stride(kv));
  plane([&](size_t layer, size_t head) { return kv.v(layer, head, from); }, v_stride(kv));
}

void copy_positions(KvCache& from, KvCache& to, size_t begin, size_t end) {
  const KvCache::Shape& s = from.shape();
  for (size_t layer = 0; layer < s.layers; ++layer)
    for (size_t head = 0; head < s.kv_heads; ++head) {
      std::memcpy(to.k(layer, head, begin), from.k(layer, head, begin), (end - begin) * k_stride(from));
      std::memcpy(to.v(layer, head, begin), from.v(layer, head, begin), (end - begin) * v_stride(from));
    }
}

uint64_t seed_of(Kv type) { return static_cast<uint64_t>(type) + 1; }

}  // namespace

uint64_t PrefixCache::hash_of(uint64_t seed, const int32_t* tokens) {
  uint64_t h = seed;
  for (size_t i = 0; i < kBlock; ++i) h = hash_word(h, static_cast<uint32_t>(tokens[i]));
  return h;
}

PrefixCache::~PrefixCache() {
  if (!mutex_.at_home()) static_cast<void>(known_.release());  // whoever was changing it does not exist here
}

void PrefixCache::add(Sequence& sequence) {
  if (!mutex_.at_home()) return;
  const std::lock_guard lock(mutex_);
  known_->living.push_back(&sequence);
}

void PrefixCache::remove(Sequence& sequence) {
  if (!mutex_.at_home()) return;
  const std::lock_guard lock(mutex_);
  std::erase(known_->living, &sequence);
}

size_t PrefixCache::bytes() const {
  const std::lock_guard lock(mutex_);
  return bytes_;
}

PrefixCache::Block* PrefixCache::find(const Block* before, uint64_t hash, Kv type, const int32_t* tokens) {
  const auto [begin, end] = known_->blocks.equal_range(hash);
  for (auto it = begin; it != end; ++it) {
    Block& b = *it->second;
    if (b.before == before && b.type == type && std::equal(b.tokens.begin(), b.tokens.end(), tokens)) return &b;
  }
  return nullptr;
}

// Drops the least recently used last blocks of texts until `bytes` more fit; never those used at the present clock_.
bool PrefixCache::make_room(size_t bytes) {
  if (bytes > max_bytes_) return false;
  while (bytes_ > max_bytes_ - bytes) {
    auto oldest = known_->blocks.end();
    for (auto it = known_->blocks.begin(); it != known_->blocks.end(); ++it) {
      const Block& b = *it->second;
      if (b.followers == 0 && b.used < clock_ && (oldest == known_->blocks.end() || b.used < oldest->second->used))
        oldest = it;
    }
    if (oldest == known_->blocks.end()) return false;
    bytes_ -= oldest->second->data.size();
    if (oldest->second->before) --oldest->second->before->followers;
    known_->blocks.erase(oldest);
  }
  return true;
}

void PrefixCache::keep(Sequence& sequence) noexcept {
  if (!mutex_.at_home()) return;
  try {
    const std::lock_guard lock(mutex_);
    ++clock_;
    const std::vector<int32_t>& tokens = sequence.tokens;
    const Kv type = sequence.kv.shape().type;
    const size_t size = block_bytes(sequence.kv);
    uint64_t hash = seed_of(type);
    Block* before = nullptr;
    for (size_t at = 0; at + kBlock <= tokens.size(); at += kBlock) {
      hash = hash_(hash, &tokens[at]);
      Block* block = find(before, hash, type, &tokens[at]);
      if (!block) {
        if (!make_room(size)) return;
        auto made = std::make_unique<Block>();
        made->before = before;
        made->hash = hash;
        made->tokens.assign(&tokens[at], &tokens[at] + kBlock);
        made->type = type;
        made->data = AlignedBuffer(size);
        each_run(sequence.kv, made->data.data(), at, at, at + kBlock,
                 [](const uint8_t* cache, std::byte* kept, size_t n) { std::memcpy(kept, cache, n); });
        block = made.get();
        known_->blocks.emplace(hash, std::move(made));
        bytes_ += size;
        if (before) ++before->followers;
      }
      block->used = clock_;
      before = block;
    }
  } catch (const std::exception&) {  // no memory for it
  }
}

size_t PrefixCache::extend(Sequence& to, const int32_t* tokens, size_t n) {
  if (!mutex_.at_home()) return to.tokens.size();
  const std::lock_guard lock(mutex_);
  ++clock_;
  const size_t held = to.tokens.size();
  const Kv type = to.kv.shape().type;
  n = std::min(n, to.kv.shape().positions);

  std::vector<Block*> path;
  uint64_t hash = seed_of(type);
  for (size_t at = 0; at + kBlock <= n; at += kBlock) {
    hash = hash_(hash, tokens + at);
    Block* block = find(path.empty() ? nullptr : path.back(), hash, type, tokens + at);
    if (!block) break;
    block->used = clock_;
    path.push_back(block);
  }
  // The last block may be known, by its beginning, from a text that went on otherwise; those tokens are not worth a search.
  size_t known = std::max(held, path.size() * kBlock);
  for (Sequence* other : known_->living) {
    if (other == &to || other->kv.shape().type != type) continue;
    const std::lock_guard stay(other->mutex);
    const std::vector<int32_t>& theirs = other->tokens;
    const size_t limit = std::min(n, theirs.size());
    const auto common = static_cast<size_t>(std::mismatch(tokens, tokens + limit, theirs.begin()).first - tokens);
    if (common <= known) continue;
    copy_positions(other->kv, to.kv, held, common);
    known = common;
    path.clear();
  }
  for (size_t i = held / kBlock; i < path.size(); ++i) {
    const size_t start = i * kBlock;
    each_run(to.kv, path[i]->data.data(), start, std::max(start, held), start + kBlock,
             [](uint8_t* cache, const std::byte* kept, size_t bytes) { std::memcpy(cache, kept, bytes); });
  }
  if (known > held) to.append(tokens + held, known - held);
  return known;
}

}  // namespace pe
