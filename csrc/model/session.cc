#include "model/session.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>

#include "base/cpu_count.h"
#include "base/error.h"
#include "base/fp_env.h"
#include "gguf/limits.h"
#include "model/session_state.h"

namespace pe {

namespace {

constexpr size_t kFewTokens = 64;  // are computed sooner than their weights come from a disk

using Clock = std::chrono::steady_clock;
int64_t ns(Clock::duration d) { return std::chrono::duration_cast<std::chrono::nanoseconds>(d).count(); }

size_t in_range(const char* name, size_t value, size_t low, size_t high) {
  if (value < low || value > high)
    throw Error(Status::kArgument, "bad_option",
                std::string(name) + " is " + std::to_string(value) + "; expected " + std::to_string(low) + ".." +
                    std::to_string(high),
                name);
  return value;
}

// Zeros replaced by defaults, everything in range.
SessionOptions resolve(const ModelConfig& config, SessionOptions o) {
  if (!o.n_ctx) o.n_ctx = std::min(config.n_ctx_train, kDefaultContext);
  in_range("n_ctx", o.n_ctx, 1, gguf::kMaxContext);
  if (!o.n_threads) o.n_threads = default_threads();
  if (!o.n_threads_prefill) o.n_threads_prefill = o.n_threads;
  in_range("n_threads", o.n_threads, 1, kMaxThreads);
  in_range("n_threads_prefill", o.n_threads_prefill, 1, kMaxThreads);
  if (!o.n_chunk) o.n_chunk = kDefaultChunk;
  o.n_chunk = std::min(in_range("n_chunk", o.n_chunk, 1, kMaxChunk), o.n_ctx);
  return o;
}

[[noreturn]] void throw_cancelled() { throw Error(Status::kCancelled, "cancelled", "the evaluation was cancelled"); }

size_t pool_size(const SessionOptions& o) { return std::max(o.n_threads, o.n_threads_prefill); }

KvCache::Shape kv_shape(const ModelConfig& c, const SessionOptions& o) {
  return {c.n_layers, c.n_kv_heads, o.n_ctx, c.head_dim_k, c.head_dim_v, o.kv};
}

Scratch layout_of(const ModelConfig& c, const SessionOptions& o) {
  return scratch_layout(c, o.n_ctx, o.n_chunk, pool_size(o));
}

}  // namespace

size_t default_threads() { return std::min(static_cast<size_t>(usable_cores()), kMaxThreads); }

// One thread at a time: a second one gets an error instead of a corrupted cache.
class Session::Use {
 public:
  explicit Use(Session& s) : busy_(s.busy_) {
    if (busy_.exchange(true, std::memory_order_acquire))
      throw Error(Status::kArgument, "busy",
                  s.pool_.abandoned() ? "the session was in use when this process was forked: create another one"
                                      : "the session is in use by another thread");
  }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;
  // The last touch of the session: a destructor that waits for it may go on at once.
  ~Use() { busy_.store(false, std::memory_order_release); }

 private:
  std::atomic<bool>& busy_;
};

Session::Bytes Session::bytes(const ModelConfig& config, const SessionOptions& options) {
  const SessionOptions o = resolve(config, options);
  return {KvCache::bytes(kv_shape(config, o)), layout_of(config, o).bytes};
}

Session::Session(std::shared_ptr<const Model> model, const SessionOptions& options,
                 std::shared_ptr<PrefixCache> prefixes)
    : model_(std::move(model)),
      options_(resolve(model_->config(), options)),
      layout_(layout_of(model_->config(), options_)),
      scratch_(layout_.bytes),
      sequence_(kv_shape(model_->config(), options_)),
      pool_(static_cast<int>(pool_size(options_))),
      team_size_(static_cast<int>(options_.n_threads)),
      prefixes_(std::move(prefixes)) {
  if (prefixes_) prefixes_->add(sequence_);
}

// Polls: a notification would touch busy_ after it said that the session may go. In the child of a fork nobody is left
// to wait for.
Session::~Session() {
  while (busy_.load(std::memory_order_acquire) && !pool_.abandoned()) {
    cancel();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  if (!prefixes_) return;
  if (prefixes_.use_count() > 1 && !pool_.abandoned()) prefixes_->keep(sequence_);  // somebody may want it
  prefixes_->remove(sequence_);
}

void Session::eval(const int32_t* tokens, size_t n, Want want, float* logits) {
  const Use use(*this);
  const FpEnv fp_env;
  const size_t n_vocab = model_->config().n_vocab;
  if (n == 0) throw Error(Status::kArgument, "no_tokens", "there is nothing to evaluate: the prompt is empty");
  for (size_t i = 0; i < n; ++i)
    if (tokens[i] < 0 || static_cast<size_t>(tokens[i]) >= n_vocab)
      throw Error(Status::kArgument, "bad_token",
                  "token id " + std::to_string(tokens[i]) + " at position " + std::to_string(i) + " is outside 0.." +
                      std::to_string(n_vocab - 1));
  if (n > options_.n_ctx - sequence_.tokens.size())
    throw Error(Status::kContextFull, "context_full",
                "the context of " + std::to_string(options_.n_ctx) + " tokens is full: it holds " +
                    std::to_string(sequence_.tokens.size()) + ", and " + std::to_string(n) + " more were given");
  const size_t before = sequence_.tokens.size();
  for (size_t done = 0; done < n;) {
    const size_t m = std::min(options_.n_chunk, n - done);
    const bool last = done + m == n;
    const size_t first_row = want == Want::kAll ? 0 : m - 1;
    const bool wanted = want == Want::kAll || (want == Want::kLast && last);
    float* rows = wanted ? logits + (want == Want::kAll ? done * n_vocab : 0) : nullptr;
    eval_chunk(tokens + done, m, first_row, rows);
    try {
      model_->file()->check_unchanged();
    } catch (...) {
      forget(before);
      throw;
    }
    if (rows && !model_->kernels().all_finite(rows, (m - first_row) * n_vocab)) {
      forget(before);
      throw Error(
          Status::kNumeric, "not_finite",
          "the logits contain NaN or infinity: the weights in this file are damaged (download it again), or its keys "
          "overflow a 16-bit cache (try an F32 one)");
    }
    done += m;
  }
}

void Session::eval_chunk(const int32_t* tokens, size_t n, size_t first_row, float* logits) {
  Batch batch{.config = model_->config(),
              .weights = model_->weights(),
              .kernels = model_->kernels(),
              .layout = layout_,
              .memory = scratch_.as<uint8_t>(),
              .kv = sequence_.kv,
              .tokens = tokens,
              .n = n,
              .pos = sequence_.tokens.size(),
              .first_row = first_row,
              .logits = logits,
              .inputs = inputs_.get(),
              .cancel = cancel_};
  // Faults would make these threads wait for each other at every barrier: first all pages, by all of them.
  if (const MapAhead& mapper = model_->mapper(); mapper.unfinished())
    pool_.run(pool_.size(), [&](Team&) { mapper.help(n <= kFewTokens, cancel_); });
  const auto start = Clock::now();
  const int size = n == 1 ? team_size_.next() : static_cast<int>(options_.n_threads_prefill);
  const int64_t waited = pool_.run(size, [&](Team& team) { forward(team, batch); });
  if (n == 1 && !batch.spoilt.load()) {
    const auto end = Clock::now();
    team_size_.record(ns(end.time_since_epoch()), ns(end - start), waited);
  }
  if (batch.spoilt.load()) {
    if (inputs_) inputs_->clear();
    cancel_.store(false);
    throw_cancelled();
  }
  sequence_.append(tokens, n);
}

// After an evaluation of which nothing counts.
void Session::forget(size_t n) {
  sequence_.resize(n);
  if (inputs_) inputs_->clear();
}

void Session::observe(bool on) {
  const Use use(*this);
  inputs_ = on ? std::make_unique<InputSums>(model_->weights()) : nullptr;
}

void Session::check_cancel() {
  if (cancel_.exchange(false)) throw_cancelled();
}

void Session::truncate(size_t n) {
  const Use use(*this);
  if (n > sequence_.tokens.size())
    throw Error(
        Status::kArgument, "bad_length",
        "cannot keep " + std::to_string(n) + " tokens: the session holds " + std::to_string(sequence_.tokens.size()));
  sequence_.resize(n);
}

size_t Session::reuse(const int32_t* tokens, size_t n) {
  const Use use(*this);
  if (n == 0) throw Error(Status::kArgument, "no_tokens", "there is nothing to evaluate: the prompt is empty");
  const std::vector<int32_t>& held = sequence_.tokens;
  const size_t limit = std::min(n - 1, held.size());
  const size_t kept = static_cast<size_t>(std::mismatch(tokens, tokens + limit, held.begin()).first - tokens);
  if (prefixes_ && held.size() >= kept + PrefixCache::kBlock) prefixes_->keep(sequence_);
  sequence_.resize(kept);
  return prefixes_ ? prefixes_->extend(sequence_, tokens, n - 1) : kept;
}

size_t Session::state_bytes(size_t n) const {
  if (n == 0 || n > options_.n_ctx)
    throw Error(Status::kArgument, "bad_length",
                "a state holds 1.." + std::to_string(options_.n_ctx) + " tokens here; asked were " + std::to_string(n));
  return pe::state_bytes(sequence_.kv.shape(), n);
}

void Session::save(size_t first, size_t n, uint8_t* out, size_t size) {
  const Use use(*this);
  const size_t needed = state_bytes(n);
  const size_t held = sequence_.tokens.size();
  if (first > held || n > held - first)
    throw Error(Status::kArgument, "bad_length",
                "cannot save " + std::to_string(n) + " tokens from position " + std::to_string(first) +
                    ": the session holds " + std::to_string(held));
  if (size != needed)
    throw Error(Status::kArgument, "bad_buffer",
                "the state of " + std::to_string(n) + " tokens takes " + std::to_string(needed) +
                    " bytes; the buffer has " + std::to_string(size));
  write_state(*model_, sequence_, first, n, out);
}

void Session::restore(const uint8_t* data, size_t size) {
  const Use use(*this);
  read_state(*model_, sequence_, data, size);
}

}  // namespace pe
