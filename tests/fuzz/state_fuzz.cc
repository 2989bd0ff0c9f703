// Coverage-guided fuzzing of restoring a session ("make fuzz TARGET=state"): damaged and forged states into a session, which
// must refuse them and stay as it was, or go on to finite logits or the error for others. The mutator mends the checksum
// half of the time: a forger would.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "../hostile/judge.h"
#include "../hostile/valid.h"
#include "base/hash.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace {

using hostile::require;

constexpr size_t kHeader = 56, kChecksum = 48;  // model/session_state.cc
constexpr int32_t kPrompt[] = {1, 2, 3, 4, 5};

const std::string& model_bytes() {
  static const std::string bytes = hostile::small_file(1).build();
  return bytes;
}

const std::shared_ptr<const pe::Model>& model() {
  static const auto made = pe::Model::of(pe::gguf::File::from_memory(std::as_bytes(std::span(model_bytes()))));
  return made;
}

pe::SessionOptions options() {
  pe::SessionOptions out;
  out.n_ctx = 16;
  out.n_threads = 1;
  return out;
}

const std::vector<uint8_t>& valid_state() {
  static const auto made = [] {
    pe::Session session(model(), options());
    session.eval(kPrompt, std::size(kPrompt), pe::Want::kNone, nullptr);
    std::vector<uint8_t> out(session.state_bytes(std::size(kPrompt)));
    session.save(0, std::size(kPrompt), out.data(), out.size());
    return out;
  }();
  return made;
}

void mend(uint8_t* data, size_t size) {
  if (size < kHeader) return;
  uint8_t header[kHeader];
  std::memcpy(header, data, kHeader);
  std::memset(header + kChecksum, 0, 8);
  const uint64_t checksum = pe::hash_bytes(pe::hash_bytes(2, header, kHeader), data + kHeader, size - kHeader);
  std::memcpy(data + kChecksum, &checksum, 8);
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  if (size < kHeader || seed % 16 == 0) {
    const std::vector<uint8_t>& valid = valid_state();
    if (valid.size() <= max_size) {
      std::memcpy(data, valid.data(), valid.size());
      size = valid.size();
    }
  }
  size = LLVMFuzzerMutate(data, size, max_size);
  if (seed % 2) mend(data, size);
  return size;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  pe::Session session(model(), options());
  std::vector<float> logits(model()->config().n_vocab);
  try {
    session.restore(data, size);
  } catch (const pe::Error& error) {
    require(session.tokens().empty(), "a failure leaves the session as it was");
    require(error.status != pe::Status::kInternal, "no internal error", error.message);
    hostile::check_error(pe::Error(pe::Status::kArgument, error.code, error.message, error.field, error.offset), size);
    return 0;
  }
  require(!session.tokens().empty(), "something was restored");
  if (session.tokens().size() == 16) return 0;
  try {
    session.eval(kPrompt, 1, pe::Want::kLast, logits.data());
    for (const float logit : logits) require(std::isfinite(logit), "logits are finite");
  } catch (const pe::Error& error) {
    require(std::string_view(error.code) == "not_finite", "nothing else can fail", error.message);
  }
  return 0;
}
