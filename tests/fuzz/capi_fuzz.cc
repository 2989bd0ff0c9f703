// Coverage-guided fuzzing of the C interface ("make fuzz TARGET=capi"): the input is a program of calls in any order, on
// handles in any state that the header allows (NULL, a model closed under its sessions, a session that was cancelled, full,
// or observed), with possible and impossible arguments. Every promise of the header that can be asked, is.
#include <stddef.h>
#include <stdlib.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "../hostile/judge.h"
#include "../hostile/valid.h"
#include "api/pyengine.h"

namespace {

using hostile::require;

constexpr size_t kHandles = 3;

class Input {
 public:
  Input(const uint8_t* data, size_t size) : p_(data), end_(data + size) {}
  bool done() const { return p_ == end_; }
  uint8_t byte() { return p_ == end_ ? 0 : *p_++; }
  // Small numbers mostly, and the ends of every range.
  uint64_t number() {
    static constexpr uint64_t kEdges[] = {0,          1,          UINT32_MAX, UINT64_MAX, 1u << 31, (1u << 31) - 1,
                                          1ull << 32, 1ull << 63, 1u << 24,   4096,       1u << 20, 65536};
    const uint8_t kind = byte();
    if (kind < 12) return kEdges[kind];
    if (kind < 64) return uint64_t{byte()} << (byte() % 64);
    return byte() % 40;
  }
  int32_t token() {
    const uint8_t kind = byte();
    return kind > 250 ? static_cast<int32_t>(number()) : kind % 24;
  }

 private:
  const uint8_t* p_;
  const uint8_t* end_;
};

pe_model* g_model = nullptr;  // open from beginning to end: opening one for each input would be most of the work

struct World {
  pe_file* files[kHandles] = {};
  pe_model* models[kHandles] = {};
  pe_session* sessions[kHandles] = {};
  std::vector<uint8_t> state;  // what was saved last

  void close(size_t slot) {
    if (models[slot] != g_model) pe_model_close(models[slot]);
    models[slot] = nullptr;
  }
  ~World() {
    for (pe_session* session : sessions) pe_session_free(session);
    for (size_t slot = 0; slot < kHandles; ++slot) close(slot);
    for (pe_file* file : files) pe_file_close(file);
  }
};

std::string g_folder, g_path;

void remove_folder() { std::filesystem::remove_all(g_folder); }

const char* any_path(Input& in) {
  static std::string other;
  switch (in.byte() % 8) {
    case 0: return nullptr;
    case 1: return "";
    case 2: other = g_folder; return other.c_str();
    case 3: other = g_folder + "/nothing"; return other.c_str();
    default: return g_path.c_str();
  }
}

// What holds after every call.
pe_status checked(pe_status status) {
  require(status >= PE_OK && status <= PE_E_INTERNAL, "a status is one of the list");
  require(status != PE_E_INTERNAL, "no internal error", pe_last_error()->message);
  const pe_error* error = pe_last_error();
  require(error != nullptr && error->code && error->field && error->message, "the last error is whole");
  if (status != PE_OK) {
    require(error->status == status, "the last error is this one");
    require(*error->code && *error->message, "an error has a code and a message");
    require(pe::printable(error->message, SIZE_MAX) == error->message, "a message is safe to print");
  }
  return status;
}

// In a block of exactly their size, so that a sanitizer sees the first one read or written past it.
template <class T>
struct Exact {
  explicit Exact(size_t n) : data(new T[n]()), size(n) {}
  std::unique_ptr<T[]> data;
  size_t size;
};

size_t vocabulary(pe_session*) { return hostile::small_file(1).tensors[0].dims[1]; }

void session_call(Input& in, pe_session* session, std::vector<uint8_t>& state) {
  switch (in.byte() % 15) {
    case 0:
    case 1:
    case 2: {
      const size_t n = in.byte() % 12;
      Exact<int32_t> tokens(n);
      for (size_t i = 0; i < n; ++i) tokens.data[i] = in.token();
      const auto want = static_cast<pe_logits>(in.byte() % 16 == 15 ? 7 : in.byte() % 3);
      const size_t rows = want == PE_LOGITS_ALL ? n : want == PE_LOGITS_LAST ? 1 : 0;
      const uint8_t lie = in.byte();
      Exact<float> logits(rows * vocabulary(session));
      const size_t before = pe_session_length(session);
      const size_t room = lie == 1 && logits.size ? logits.size - 1 : logits.size;
      const pe_status status = checked(pe_session_eval(session, lie == 2 ? nullptr : tokens.data.get(), n, want,
                                                       lie == 3 ? nullptr : logits.data.get(), room));
      const size_t after = pe_session_length(session);
      if (status == PE_OK) require(after == before + n, "all tokens are in the session");
      if (status != PE_OK && status != PE_E_CANCELLED)
        require(after == before, "a failure leaves the session as it was");
      if (status == PE_OK)
        for (size_t i = 0; i < logits.size; ++i) require(std::isfinite(logits.data[i]), "logits are finite");
      break;
    }
    case 3: {
      const size_t n = static_cast<size_t>(in.number());
      const pe_status status = checked(pe_session_truncate(session, n));
      if (status == PE_OK) require(pe_session_length(session) == n, "truncated");
      break;
    }
    case 4: {
      const size_t n = in.byte() % 20;
      Exact<int32_t> tokens(n);
      for (size_t i = 0; i < n; ++i) tokens.data[i] = in.token();
      size_t kept = 77;
      const pe_status status =
          checked(pe_session_reuse(session, tokens.data.get(), n, in.byte() == 1 ? nullptr : &kept));
      if (status == PE_OK) {
        require(kept < n && kept == pe_session_length(session), "what is reused is in the session");
        require(kept == 0 || !std::memcmp(pe_session_tokens(session), tokens.data.get(), kept * sizeof(int32_t)),
                "and is a beginning");
      }
      break;
    }
    case 5: checked(pe_session_observe(session, static_cast<int32_t>(in.number()))); break;
    case 6: {
      pe_input out;
      pe_input_init(&out);
      if (in.byte() == 1) out.struct_size = static_cast<uint32_t>(in.number());
      if (checked(pe_session_input_at(session, static_cast<size_t>(in.number()), &out)) == PE_OK &&
          out.struct_size >= sizeof out)
        for (uint64_t i = 0; i < out.n_cols; ++i) require(out.squares[i] >= 0, "squares are not negative");
      break;
    }
    case 11:
    case 12: {  // save, here
      const size_t n = in.byte() % 26, first = in.byte() % 4 ? 0 : in.byte() % 26;
      uint64_t bytes = 0;
      if (checked(pe_session_state_bytes(session, n, &bytes)) != PE_OK) break;
      Exact<uint8_t> data(static_cast<size_t>(bytes));
      if (checked(pe_session_save(session, first, n, data.data.get(), data.size)) == PE_OK)
        state.assign(data.data.get(), data.data.get() + data.size);
      break;
    }
    case 13: {  // and restore, there
      Exact<uint8_t> data(state.size());
      if (!state.empty()) std::memcpy(data.data.get(), state.data(), state.size());
      const size_t before = pe_session_length(session);
      if (in.byte() % 4 == 0 && data.size) data.data[in.number() % data.size] ^= in.byte();
      const pe_status status =
          checked(pe_session_restore(session, in.byte() == 1 ? nullptr : data.data.get(), data.size));
      if (status != PE_OK) require(pe_session_length(session) == before, "a failure leaves the session as it was");
      break;
    }
    case 7: pe_session_cancel(session); break;
    case 8: pe_session_clear_cancel(session); break;
    case 9: checked(pe_session_check_cancel(session)); break;
    case 10: {
      const size_t n = pe_session_length(session);
      const int32_t* tokens = pe_session_tokens(session);
      for (size_t i = 0; i < n; ++i) require(tokens[i] >= 0, "tokens are ids");
      break;
    }
    default: pe_session_context(session); pe_session_threads(session);
  }
}

void file_call(Input& in, const pe_file* file) {
  pe_value value;
  pe_tensor tensor;
  static const char* const kNames[] = {"general.architecture", "token_embd.weight", "", "x", "tokenizer.ggml.tokens"};
  const char* name = in.byte() % 16 == 0 ? nullptr : kNames[in.byte() % 5];
  pe_status status = PE_E_ARGUMENT;
  switch (in.byte() % 5) {
    case 0: status = checked(pe_file_value_at(file, in.number(), &value)); break;
    case 1: status = checked(pe_file_value(file, name, &value)); break;
    case 2:
      if (checked(pe_file_tensor_at(file, in.number(), &tensor)) == PE_OK)
        require(tensor.size > 0, "no tensor is empty");
      break;
    case 3: checked(pe_file_tensor(file, name, &tensor)); break;
    default:
      pe_file_version(file);
      require(pe_file_value_count(file) < 100 && pe_file_tensor_count(file) < 100, "counts are the file's");
  }
  if (status == PE_OK) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < value.size; ++i) sum += static_cast<const uint8_t*>(value.data)[i];
    hostile::sink = sum;
  }
}

void free_call(Input& in) {  // functions without handles
  const size_t n = in.byte() % 70;
  Exact<float> floats(n);
  for (size_t i = 0; i < n; ++i) {
    const uint8_t b = in.byte();
    floats.data[i] = b == 255   ? std::nanf("")
                     : b == 254 ? INFINITY
                     : b == 253 ? -INFINITY
                                : static_cast<float>(b) - 100;
  }
  switch (in.byte() % 8) {
    case 0: {
      const size_t k = in.byte() % 90;
      Exact<int32_t> ids(k);
      Exact<float> values(k);
      size_t found = 0;
      if (checked(pe_top_k(floats.data.get(), n, k, ids.data.get(), values.data.get(), &found)) == PE_OK) {
        require(found <= std::min(n, k), "no more than asked for");
        for (size_t i = 1; i < found; ++i) require(ids.data[i - 1] < ids.data[i], "ids ascend");
      }
      break;
    }
    case 1: {
      const size_t m = in.byte() % 8;
      Exact<int32_t> ids(m);
      Exact<double> values(m);
      for (size_t i = 0; i < m; ++i) ids.data[i] = static_cast<int32_t>(in.number());
      double sum = 0;
      checked(pe_softmax_sum(floats.data.get(), n, 200, m ? ids.data.get() : nullptr, m ? values.data.get() : nullptr,
                             m, &sum));
      break;
    }
    case 2: {
      Exact<double> x(n);
      for (size_t i = 0; i < n; ++i) x.data[i] = -std::fabs(static_cast<double>(floats.data[i]));
      checked(pe_exp(x.data.get(), n, x.data.get()));
      break;
    }
    case 3:
    case 4: {
      const int32_t type = in.byte() % 45;
      const size_t rows = in.byte() % 4, cols = in.byte() % 4 * 256, bytes = static_cast<size_t>(in.byte()) * 8;
      Exact<uint8_t> packed(bytes);
      for (size_t i = 0; i < bytes; ++i) packed.data[i] = static_cast<uint8_t>(i * 37 + n);
      Exact<float> out(rows * cols);
      checked(pe_dequantise_rows(type, packed.data.get(), bytes, rows, cols, out.data.get(), out.size));
      break;
    }
    case 5: {
      const int32_t type = in.byte() % 45;
      const size_t cols = in.byte() % 3 * 256, rows = cols ? 1 : 0;
      Exact<float> source(rows * cols);
      for (size_t i = 0; i < source.size && n; ++i) source.data[i] = floats.data[i % n];
      pe_format format;
      size_t bytes = 0;  // of a type that is none
      for (size_t i = 0; pe_format_at(i, &format) == PE_OK; ++i)
        if (format.type == type) bytes = cols / format.block_size * format.block_bytes;
      Exact<uint8_t> packed(bytes);
      checked(pe_quantise_rows(type, source.data.get(), source.size, rows, cols, nullptr, packed.data.get(),
                               packed.size, 1));
      break;
    }
    case 6: {
      pe_shape shape;
      pe_shape_init(&shape);
      uint32_t* fields = &shape.n_ctx_train;
      for (int i = 0; i < 9; ++i) fields[i] = static_cast<uint32_t>(in.number());
      pe_session_options options;
      pe_session_options_init(&options);
      options.n_ctx = static_cast<uint32_t>(in.number());
      options.n_chunk = static_cast<uint32_t>(in.number());
      options.kv_type = in.byte() % 10;
      uint64_t kv = 1, scratch = 1;
      if (checked(pe_shape_bytes(&shape, &options, &kv, &scratch)) != PE_OK)
        require(kv == 0 && scratch == 0, "nothing is said");
      break;
    }
    default: {
      pe_tier_available(in.number());
      pe_tier_name(in.number());
    }
  }
}

void one_call(Input& in, World& w) {
  const uint8_t what = in.byte() % 24;
  const size_t at = in.byte() % (kHandles + 1);  // one past the handles: NULL
  const size_t slot = at % kHandles;
  if (what == 0) {
    pe_file_close(w.files[slot]);
    w.files[slot] = nullptr;
    const pe_status status = checked(pe_file_open(any_path(in), static_cast<pe_load>(in.byte() % 4), &w.files[slot]));
    require((status == PE_OK) == (w.files[slot] != nullptr), "a handle or an error");
  } else if (what == 1) {
    w.close(slot);
    pe_model_options options;
    pe_model_options_init(&options);
    const uint8_t kind = in.byte();
    if (kind == 1) options.struct_size = static_cast<uint32_t>(in.number());
    if (kind == 2) options.load = static_cast<pe_load>(in.number());
    if (kind == 3) options.rope_attn_scale = std::nanf("");
    if (kind == 4) options.progress = [](void*, float) -> int32_t { return 1; };
    if (kind % 2) options.load = PE_LOAD_COPY;
    options.prefix_bytes = kind & 4 ? in.number() % 65536 : 1 << 20;
    const pe_status status = checked(pe_model_open(any_path(in), kind == 5 ? nullptr : &options, &w.models[slot]));
    require((status == PE_OK) == (w.models[slot] != nullptr), "a handle or an error");
  } else if (what == 2) {
    pe_session_free(w.sessions[slot]);
    w.sessions[slot] = nullptr;
    pe_session_options options;
    pe_session_options_init(&options);
    options.n_ctx = in.byte() % 40;
    options.n_threads = options.n_threads_prefill = 1;
    options.n_chunk = in.byte() % 8;
    static constexpr int32_t kKv[] = {0, 1, 8, 2, -1};
    options.kv_type = kKv[in.byte() % 5];
    if (in.byte() == 1) options.struct_size = static_cast<uint32_t>(in.number());
    if (in.byte() == 1) options.n_threads_prefill = static_cast<uint32_t>(in.number());
    pe_model* model = w.models[in.byte() % kHandles];
    uint64_t kv = 1, scratch = 1;
    const pe_status planned = checked(pe_session_bytes(model, &options, &kv, &scratch));
    if (planned == PE_OK && kv + scratch > (64u << 20)) return;  // a test's memory
    // Impossible numbers of threads are refused. Possible ones, and the default of a struct that ends before them, have
    // tests of their own and would make a fuzzer wait at barriers.
    if (options.n_threads_prefill > 1 && options.n_threads_prefill <= 512) return;
    if (planned == PE_OK && options.struct_size < offsetof(pe_session_options, n_threads) + sizeof(uint32_t)) return;
    const pe_status status = checked(pe_session_create(model, &options, &w.sessions[slot]));
    require((status == PE_OK) == (w.sessions[slot] != nullptr), "a handle or an error");
  } else if (what == 3) {  // its sessions live on
    w.close(slot);
  } else if (what == 4) {
    pe_session_free(w.sessions[slot]);
    w.sessions[slot] = nullptr;
  } else if (what == 5) {
    pe_model_info info;
    pe_model_info_init(&info);
    if (in.byte() == 1) info.struct_size = static_cast<uint32_t>(in.number() % (sizeof info + 1));
    checked(pe_model_get_info(at == kHandles ? nullptr : w.models[slot], &info));
  } else if (what < 8) {
    file_call(in, what == 6 ? (at == kHandles ? nullptr : w.files[slot]) : pe_model_file(w.models[slot]));
  } else if (what < 11) {
    free_call(in);
  } else {
    session_call(in, at == kHandles ? nullptr : w.sessions[slot], w.state);
  }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  std::string name = (std::filesystem::temp_directory_path() / "pe-fuzz-XXXXXX").string();
  require(mkdtemp(name.data()) != nullptr, "a folder can be made");
  g_folder = name;
  g_path = name + "/m.gguf";
  const std::string bytes = hostile::small_file(1).build();
  std::ofstream(g_path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  std::atexit(remove_folder);
  pe_model_options options;
  pe_model_options_init(&options);
  options.prefix_bytes = 0;  // so that one input does not depend on the one before
  require(pe_model_open(g_path.c_str(), &options, &g_model) == PE_OK, "the model opens", pe_last_error()->message);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  World world;
  // Something to work with from the first byte on.
  world.models[0] = g_model;
  pe_session_options options;
  pe_session_options_init(&options);
  options.n_ctx = 24;
  options.n_threads = options.n_threads_prefill = 1;
  require(pe_session_create(g_model, &options, &world.sessions[0]) == PE_OK, "a session is made");
  for (int calls = 0; calls < 64 && !in.done(); ++calls) one_call(in, world);
  return 0;
}
