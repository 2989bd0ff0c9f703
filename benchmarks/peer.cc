// One measuring program for llama.cpp and for ik_llama.cpp (-DPEER_IK): the same calls, the same clock, the same token
// ids for both, and as benchmarks/ours.py makes them. benchmarks/peers.py compiles it against a peer's llama.h and
// shared libraries and talks to it; the protocol is described there.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

[[noreturn]] void fail(const std::string& why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::exit(1);
}

void silent(ggml_log_level level, const char* text, void*) {
  if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

class Peer {
 public:
  Peer(const std::string& path, std::map<std::string, std::string> option)
      : flash_(option["flash"] == "1"),
        repack_(option["repack"] == "1"),
        threads_(std::stoi(option["threads"])),
        context_(std::stoi(option["context"])),
        kv_(option["kv"] == "q8_0"  ? GGML_TYPE_Q8_0
            : option["kv"] == "f32" ? GGML_TYPE_F32
                                    : GGML_TYPE_F16) {
    llama_log_set(silent, nullptr);
    llama_backend_init();
    llama_model_params mp = llama_model_default_params();
#ifdef PEER_IK
    mp.repack_tensors = repack_;
    mp.flash_attn = flash_;
    mp.type_k = mp.type_v = kv_;
#else
    mp.use_extra_bufts = repack_;
#endif
    model_ = llama_model_load_from_file(path.c_str(), mp);
    if (!model_) fail("the peer cannot load " + path);
#ifdef PEER_IK
    vocab_ = llama_n_vocab(model_);
#else
    vocab_ = llama_vocab_n_tokens(llama_model_get_vocab(model_));
#endif
    llama_context_params cp = llama_context_default_params();
    cp.n_ctx = static_cast<uint32_t>(context_);
    cp.n_batch = 2048;
    cp.n_ubatch = 512;
    cp.n_threads = cp.n_threads_batch = threads_;
    cp.type_k = cp.type_v = kv_;
#ifdef PEER_IK
    cp.flash_attn = flash_;
#else
    cp.flash_attn_type = flash_ ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    cp.n_outputs_max_per_seq = 0;
    cp.swa_full = false;
#endif
    ctx_ = llama_init_from_model(model_, cp);
    if (!ctx_) fail("the peer cannot make a context of " + std::to_string(context_));
  }

  int vocab() const { return vocab_; }

  // Token i of every measurement.
  llama_token id(int i) const { return static_cast<llama_token>((static_cast<int64_t>(i) * 7919 + 13) % vocab_); }

  // Evaluates ids[0..n) after the tokens held; logits of the last one, or of all.
  void eval(const llama_token* ids, int n, bool all = false) {
    for (int done = 0; done < n;) {
      const int step = std::min(n - done, 2048);
      llama_batch batch = llama_batch_init(step, 0, 1);
      batch.n_tokens = step;
      for (int i = 0; i < step; ++i) {
        batch.token[i] = ids[done + i];
        batch.pos[i] = held_ + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = all || done + i == n - 1;
      }
      if (llama_decode(ctx_, batch) != 0) fail("the peer cannot evaluate a batch");
      llama_synchronize(ctx_);
      llama_batch_free(batch);
      done += step;
      held_ += step;
    }
  }

  void eval_range(int first, int n) {
    std::vector<llama_token> ids(static_cast<size_t>(n));
    for (int i = 0; i < n; ++i) ids[static_cast<size_t>(i)] = id(first + i);
    eval(ids.data(), n);
  }

  const float* logits(int i) { return llama_get_logits_ith(ctx_, i); }

  void truncate(int n) {
#ifdef PEER_IK
    n == 0 ? llama_kv_cache_clear(ctx_) : void(llama_kv_cache_seq_rm(ctx_, 0, n, -1));
#else
    n == 0 ? llama_memory_clear(llama_get_memory(ctx_), false)
           : void(llama_memory_seq_rm(llama_get_memory(ctx_), 0, n, -1));
#endif
    held_ = std::min(held_, n);
  }

  // Brings the context to exactly `depth` tokens: from the state file if there is one, else by prefill (then saved).
  void fill(int depth, const std::string& state) {
    truncate(depth);
    if (held_ == depth) return;
    truncate(0);
    std::vector<llama_token> tokens(static_cast<size_t>(depth) + 1);
    size_t count = 0;
    const auto load = [&] {
      return llama_state_seq_load_file(ctx_, state.c_str(), 0, tokens.data(), tokens.size(), &count);
    };
    const auto save = [&] {
      return llama_state_seq_save_file(ctx_, state.c_str(), 0, tokens.data(), static_cast<size_t>(depth));
    };
    if (!state.empty() && std::ifstream(state).good()) {
      if (load() == 0 || count != static_cast<size_t>(depth)) fail("the peer cannot read the state " + state);
      held_ = depth;
      return;
    }
    eval_range(0, depth);
    for (int i = 0; i < depth; ++i) tokens[static_cast<size_t>(i)] = id(i);
    if (!state.empty() && save() == 0) fail("the peer cannot write the state " + state);
  }

 private:
  bool flash_, repack_;
  int threads_, context_;
  ggml_type kv_;
  llama_model* model_ = nullptr;
  llama_context* ctx_ = nullptr;
  int vocab_ = 0, held_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  const auto start = Clock::now();
  if (argc < 2) fail("usage: peer MODEL flash=0|1 repack=0|1 threads=N context=N kv=f16|q8_0|f32");
  std::map<std::string, std::string> options;
  for (int i = 2; i < argc; ++i) {
    const std::string arg = argv[i];
    const size_t eq = arg.find('=');
    options[arg.substr(0, eq)] = arg.substr(eq + 1);
  }
  Peer peer(argv[1], options);
  const double opened = seconds_since(start);
  peer.eval_range(0, 1);
  const double first = seconds_since(start);
  const float* row = peer.logits(-1);
  const bool finite = std::all_of(row, row + peer.vocab(), [](float x) { return std::isfinite(x); });
  std::printf("{\"open\": %.4f, \"first\": %.4f, \"finite\": %s}\n", opened, first, finite ? "true" : "false");
  std::fflush(stdout);

  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream in(line);
    std::string command, file;
    int n = 0, depth = 0;
    in >> command >> n;
    if (command == "prefill") {
      peer.truncate(0);
      const auto t = Clock::now();
      peer.eval_range(0, n);
      std::printf("{\"seconds\": [%.6f]}\n", seconds_since(t));
    } else if (command == "decode") {
      in >> depth >> file;
      peer.fill(depth, file);
      peer.eval_range(depth, 1);  // wakes the threads; not timed
      peer.truncate(depth);
      std::printf("{\"seconds\": [");
      for (int i = 0; i < n; ++i) {
        const auto t = Clock::now();
        peer.eval_range(depth + i, 1);
        std::printf("%s%.6f", i ? ", " : "", seconds_since(t));
      }
      std::printf("]}\n");
    } else if (command == "logits") {  // n ids as int32 in the named file; float32 [n, vocab] appended to the other
      std::string out;
      in >> file >> out;
      std::vector<llama_token> ids(static_cast<size_t>(n));
      std::ifstream(file, std::ios::binary).read(reinterpret_cast<char*>(ids.data()), n * 4);
      peer.truncate(0);
      peer.eval(ids.data(), n, true);
      std::ofstream rows(out, std::ios::binary | std::ios::app);
      for (int i = 0; i < n; ++i) rows.write(reinterpret_cast<const char*>(peer.logits(i)), peer.vocab() * 4);
      std::printf("{\"rows\": %d, \"vocab\": %d}\n", n, peer.vocab());
    } else {
      fail("unknown command " + line);
    }
    std::fflush(stdout);
  }
  return 0;
}
