#include "model/session_state.h"

#include <cstring>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/hash.h"
#include "kernels/kernels.h"
#include "model/numerics_epoch.h"

namespace pe {

namespace {

constexpr char kMagic[8] = {'P', 'E', 'K', 'V', '\r', '\n', 0, 0};
constexpr uint32_t kVersion = 1;
constexpr const char* kTypeNames[kKvs] = {"f16", "f32", "q8_0"};  // by Kv, whose numbers states hold
static_assert(static_cast<int>(Kv::F16) == 0 && static_cast<int>(Kv::F32) == 1 && static_cast<int>(Kv::Q8_0) == 2);

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t epoch;  // of the numerics
  uint32_t kv_type;
  uint32_t first;     // position of the first token
  uint32_t n;         // tokens
  uint32_t zero;      // for later
  uint64_t model;     // Model::fingerprint()
  uint64_t before;    // hash of the tokens before the first
  uint64_t checksum;  // of the header with zero here, and of all that follows
};
static_assert(sizeof(Header) == 56);

// Calls copy(row of the cache, bytes) for the n positions of each plane from `first` on, in the order of a state.
template <typename Copy>
void each_plane(KvCache& kv, size_t first, size_t n, Copy copy) {
  const KvCache::Shape& s = kv.shape();
  const size_t k_bytes = n * kv_row_bytes(s.type, s.head_dim_k);
  const size_t v_bytes = n * kv_row_bytes(s.type, s.head_dim_v);
  for (size_t layer = 0; layer < s.layers; ++layer)
    for (size_t head = 0; head < s.kv_heads; ++head) copy(kv.k(layer, head, first), k_bytes);
  for (size_t layer = 0; layer < s.layers; ++layer)
    for (size_t head = 0; head < s.kv_heads; ++head) copy(kv.v(layer, head, first), v_bytes);
}

uint64_t hash_of_first(const std::vector<int32_t>& tokens, size_t n) {
  return hash_bytes(1, tokens.data(), n * sizeof(int32_t));
}

uint64_t checksum_of(Header header, const uint8_t* rest, size_t n) {
  header.checksum = 0;
  return hash_bytes(hash_bytes(2, &header, sizeof header), rest, n);
}

[[noreturn]] void bad_state(const char* code, const std::string& what, Status status = Status::kFormat) {
  throw Error(status, code, "the saved state " + what, "state");
}

std::string quoted(const uint8_t* data, size_t n) {
  std::string text = "\"";
  for (size_t i = 0; i < n; ++i) text += data[i] >= 0x20 && data[i] < 0x7f ? static_cast<char>(data[i]) : '?';
  return text + "\"";
}

// What says nothing about this model and session: whether these bytes are a state, and whole.
Header checked_header(const KvCache::Shape& shape, const uint8_t* data, size_t size) {
  if (size < sizeof kMagic || std::memcmp(data, kMagic, sizeof kMagic) != 0)
    bad_state("foreign_state",
              size ? "begins with " + quoted(data, size < 8 ? size : 8) + "; expected what pe_session_save writes"
                   : "is empty");
  if (size < sizeof(Header))
    bad_state("cut_state",
              "has " + std::to_string(size) + " bytes; its header alone needs " + std::to_string(sizeof(Header)));
  Header h;
  std::memcpy(&h, data, sizeof h);
  if (h.version != kVersion)
    bad_state("bad_version",
              "has version " + std::to_string(h.version) + "; this build reads version " + std::to_string(kVersion));
  if (checksum_of(h, data + sizeof h, size - sizeof h) != h.checksum) {
    // A state of this very kind that is merely too short is worth its own sentence.
    const bool plausible = h.kv_type == static_cast<uint32_t>(shape.type) && h.n <= shape.positions;
    if (plausible && state_bytes(shape, h.n) > size)
      bad_state("cut_state", "is cut: it has " + std::to_string(size) + " bytes, " + std::to_string(h.n) +
                                 " tokens take " + std::to_string(state_bytes(shape, h.n)));
    bad_state("damaged_state", "is damaged: its checksum is wrong");
  }
  return h;
}

}  // namespace

size_t state_bytes(const KvCache::Shape& s, size_t n) {
  const size_t rows = kv_row_bytes(s.type, s.head_dim_k) + kv_row_bytes(s.type, s.head_dim_v);
  return sizeof(Header) + n * (sizeof(int32_t) + s.layers * s.kv_heads * rows);
}

void write_state(const Model& model, Sequence& sequence, size_t first, size_t n, uint8_t* out) {
  const KvCache::Shape& shape = sequence.kv.shape();
  Header h{};
  std::memcpy(h.magic, kMagic, sizeof kMagic);
  h.version = kVersion;
  h.epoch = kNumericsEpoch;
  h.kv_type = static_cast<uint32_t>(shape.type);
  h.first = static_cast<uint32_t>(first);
  h.n = static_cast<uint32_t>(n);
  h.model = model.fingerprint();
  h.before = hash_of_first(sequence.tokens, first);
  uint8_t* at = out + sizeof h;
  std::memcpy(at, sequence.tokens.data() + first, n * sizeof(int32_t));
  at += n * sizeof(int32_t);
  each_plane(sequence.kv, first, n, [&](const uint8_t* row, size_t bytes) {
    std::memcpy(at, row, bytes);
    at += bytes;
  });
  h.checksum = checksum_of(h, out + sizeof h, state_bytes(shape, n) - sizeof h);
  std::memcpy(out, &h, sizeof h);
}

void read_state(const Model& model, Sequence& sequence, const uint8_t* data, size_t size) {
  const KvCache::Shape& shape = sequence.kv.shape();
  const Header h = checked_header(shape, data, size);
  const size_t held = sequence.tokens.size();
  if (h.epoch != kNumericsEpoch)
    bad_state("other_epoch",
              "has keys of numerics epoch " + std::to_string(h.epoch) + "; this build computes those of epoch " +
                  std::to_string(kNumericsEpoch),
              Status::kUnsupported);
  if (h.kv_type >= kKvs) bad_state("damaged_state", "has keys of an unknown type " + std::to_string(h.kv_type));
  if (h.model != model.fingerprint())
    bad_state("other_model", "is of another model, or of this one with other weights", Status::kArgument);
  if (h.kv_type != static_cast<uint32_t>(shape.type))
    bad_state("other_kv_type",
              std::string("has keys of type ") + kTypeNames[h.kv_type] + "; the session's are " +
                  kTypeNames[static_cast<int>(shape.type)],
              Status::kArgument);
  if (h.first != held || h.before != hash_of_first(sequence.tokens, held))
    bad_state("other_text",
              "follows " + std::to_string(h.first) + " tokens of its text; the session holds " + std::to_string(held) +
                  (h.first == held ? " others" : ""),
              Status::kArgument);
  if (h.n > shape.positions - held)
    bad_state(
        "context_full",
        "has " + std::to_string(h.n) + " tokens; the session has room for " + std::to_string(shape.positions - held),
        Status::kContextFull);
  if (h.n == 0 || h.zero != 0 || size != state_bytes(shape, h.n))
    bad_state("damaged_state", "has " + std::to_string(size) + " bytes; " + std::to_string(h.n) + " tokens take " +
                                   std::to_string(state_bytes(shape, h.n)));
  std::vector<int32_t> tokens(h.n);
  const uint8_t* at = data + sizeof h;
  std::memcpy(tokens.data(), at, h.n * sizeof(int32_t));
  at += h.n * sizeof(int32_t);
  for (const int32_t token : tokens)
    if (token < 0 || static_cast<size_t>(token) >= model.config().n_vocab)
      bad_state("damaged_state", "has the token id " + std::to_string(token) + "; expected 0.." +
                                     std::to_string(model.config().n_vocab - 1));
  each_plane(sequence.kv, held, h.n, [&](uint8_t* row, size_t bytes) {
    std::memcpy(row, at, bytes);
    at += bytes;
  });
  sequence.append(tokens.data(), tokens.size());
}

}  // namespace pe
