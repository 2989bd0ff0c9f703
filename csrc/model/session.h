// A token sequence with its KV cache, scratch memory and threads.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "base/aligned_buffer.h"
#include "model/forward.h"
#include "model/model.h"
#include "runtime/prefix_cache.h"
#include "runtime/team_size.h"

namespace pe {

struct SessionOptions {
  size_t n_ctx = 0;              // 0: min(the model's context, kDefaultContext)
  size_t n_threads = 0;          // one token, at most; 0: usable physical cores of the fastest kind
  size_t n_threads_prefill = 0;  // several tokens; 0: as n_threads
  size_t n_chunk = 0;            // tokens per prefill step, at most kMaxChunk; 0: kDefaultChunk
  Kv kv = Kv::F16;
};

inline constexpr size_t kDefaultContext = 4096;
inline constexpr size_t kDefaultChunk = 256;
inline constexpr size_t kMaxChunk = 1024;  // a longer step gains nothing and would answer a cancel too late
inline constexpr size_t kMaxThreads = 512;

size_t default_threads();  // usable physical cores, at most kMaxThreads

enum class Want { kNone, kLast, kAll };  // which rows of logits

class Session {
 public:
  struct Bytes {
    size_t kv, scratch;
  };
  // What a session of such a model with these options allocates. Reads the sizes of `config` alone.
  // Throws Error: kArgument (an option out of range), kUnsupported, kMemory.
  static Bytes bytes(const ModelConfig& config, const SessionOptions& options);

  // Throws Error: kArgument (an option out of range), kMemory.
  // `prefixes`: shared by sessions of this very model, so that they take over each other's beginnings; or nullptr.
  Session(std::shared_ptr<const Model> model, const SessionOptions& options,
          std::shared_ptr<PrefixCache> prefixes = nullptr);
  // Cancels and waits for an eval that is still running in another thread.
  ~Session();

  // See pe_session_eval. logits: [1 or n][n_vocab], nullptr with kNone.
  // Throws Error: kArgument (no tokens, id out of range, in use by another thread), kContextFull, kCancelled, kNumeric, kIo.
  void eval(const int32_t* tokens, size_t n, Want want, float* logits);
  void truncate(size_t n);
  size_t reuse(const int32_t* tokens, size_t n);
  // See pe_session_save and pe_session_restore. `size`: what `out` has room for; save throws kArgument when that is not
  // state_bytes(n), or when the session does not hold the positions.
  size_t state_bytes(size_t n) const;
  void save(size_t first, size_t n, uint8_t* out, size_t size);
  void restore(const uint8_t* data, size_t size);
  void cancel() { cancel_.store(true); }
  void clear_cancel() { cancel_.store(false); }
  // Whether evals add up what the matrices read, from zero; see pe_session_observe.
  void observe(bool on);
  const InputSums* inputs() const { return inputs_.get(); }  // nullptr: not observed
  void check_cancel();                                       // throws Error kCancelled, as the next eval would

  const Model& model() const { return *model_; }
  const std::vector<int32_t>& tokens() const { return sequence_.tokens; }
  size_t n_ctx() const { return options_.n_ctx; }
  size_t n_threads() const { return options_.n_threads; }

 private:
  class Use;  // marks the session as in use for the length of a call
  void eval_chunk(const int32_t* tokens, size_t n, size_t first_row, float* logits);
  void forget(size_t n);

  std::shared_ptr<const Model> model_;
  SessionOptions options_;  // without zeros
  Scratch layout_;
  AlignedBuffer scratch_;
  Sequence sequence_;
  ThreadPool pool_;
  TeamSize team_size_;  // when one token is evaluated
  std::shared_ptr<PrefixCache> prefixes_;
  std::unique_ptr<InputSums> inputs_;
  std::atomic<bool> cancel_{false};
  std::atomic<bool> busy_{false};
};

}  // namespace pe
