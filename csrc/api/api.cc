// The C interface of libraries, files, models and sessions: argument checks, and one call into the engine each.

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "api/kv_type.h"
#include "api/last_error.h"
#include "api/pyengine.h"
#include "base/cpu_count.h"
#include "base/file_guard.h"
#include "base/text.h"
#include "gguf/limits.h"
#include "gguf/reader.h"
#include "model/model.h"
#include "model/session.h"
#include "runtime/limits.h"

using namespace pe;

// A file opened by the caller, or a view of the one behind a model.
struct pe_file {
  std::shared_ptr<const gguf::File> file;
};

struct pe_model {
  std::shared_ptr<const Model> model;
  pe_file file;
  std::shared_ptr<PrefixCache> prefixes;  // nullptr: its sessions share nothing
};

struct pe_session {
  Session session;
};

namespace {

constexpr uint64_t kDefaultPrefixBytes = uint64_t{256} << 20;

static_assert(static_cast<int>(gguf::Load::kMap) == PE_LOAD_MMAP &&
              static_cast<int>(gguf::Load::kCopy) == PE_LOAD_COPY &&
              static_cast<int>(gguf::Load::kHeader) == PE_LOAD_HEADER);
static_assert(static_cast<int>(gguf::ValueType::kUint8) == PE_UINT8 &&
              static_cast<int>(gguf::ValueType::kArray) == PE_ARRAY &&
              static_cast<int>(gguf::ValueType::kFloat64) == PE_FLOAT64);
static_assert(static_cast<int>(Want::kNone) == PE_LOGITS_NONE && static_cast<int>(Want::kLast) == PE_LOGITS_LAST &&
              static_cast<int>(Want::kAll) == PE_LOGITS_ALL);

// The caller's struct over our defaults: an older caller's is shorter, a newer one's longer.
template <typename Options>
Options read_options(const Options* given, void (*init)(Options*)) {
  Options options;
  init(&options);
  if (!given) return options;
  if (given->struct_size < sizeof given->struct_size || given->struct_size > 4096)
    bad_argument("options.struct_size", "is not set: call the _init function first");
  std::memcpy(&options, given, std::min<size_t>(given->struct_size, sizeof options));
  return options;
}

// The sizes of a model that memory depends on, in the ranges that a file's are checked against.
ModelConfig config_of(const pe_shape& s) {
  const auto in_range = [](const char* name, uint64_t value, uint64_t high) {
    if (value < 1 || value > high)
      throw Error(Status::kArgument, "bad_shape",
                  std::string(name) + " is " + std::to_string(value) + "; expected 1.." + std::to_string(high), name);
    return static_cast<size_t>(value);
  };
  ModelConfig c;
  c.n_ctx_train = in_range("n_ctx_train", s.n_ctx_train, gguf::kMaxContext);
  c.n_layers = in_range("n_layers", s.n_layers, gguf::kMaxLayers);
  c.n_embd = in_range("n_embd", s.n_embd, kMaxWidth);
  c.n_heads = in_range("n_heads", s.n_heads, 65536);
  c.n_kv_heads = in_range("n_kv_heads", s.n_kv_heads, c.n_heads);
  c.head_dim_k = in_range("head_dim_k", s.head_dim_k, kMaxWidth / c.n_heads);
  c.head_dim_v = in_range("head_dim_v", s.head_dim_v, kMaxWidth / c.n_heads);
  c.n_ff = in_range("n_ff", s.n_ff, kMaxWidth);
  c.rope.dims = s.rope_dims ? in_range("rope_dims", s.rope_dims, c.head_dim_k) : c.head_dim_k;
  if (c.n_heads % c.n_kv_heads) bad_argument("n_kv_heads", "must divide n_heads");
  return c;
}

gguf::Load load_of(pe_load load, bool header) {
  if (load != PE_LOAD_MMAP && load != PE_LOAD_COPY && !(header && load == PE_LOAD_HEADER))
    bad_argument("load", "is no known pe_load for this call");
  return static_cast<gguf::Load>(load);
}

pe_value value_of(const gguf::Value& v) {
  return {.key = v.key.c_str(),
          .type = static_cast<pe_value_type>(v.type),
          .element_type = static_cast<pe_value_type>(v.element_type),
          .count = v.count,
          .size = v.size,
          .data = v.data};
}

pe_tensor tensor_of(const gguf::TensorInfo& t) {
  pe_tensor out{.name = t.name.c_str(),
                .type = static_cast<int32_t>(t.type),
                .n_dims = t.n_dims,
                .dims = {},
                .offset = t.offset,
                .size = t.size,
                .part = t.part,
                .data = t.data};
  std::memcpy(out.dims, t.dims, sizeof out.dims);
  return out;
}

SessionOptions session_options(const pe_session_options* given) {
  const pe_session_options o = read_options(given, pe_session_options_init);
  SessionOptions out;
  out.n_ctx = o.n_ctx;
  out.n_threads = o.n_threads;
  out.n_threads_prefill = o.n_threads_prefill;
  out.n_chunk = o.n_chunk;
  out.kv = kv_of(o.kv_type);
  return out;
}

// The size of a struct that the caller's header and ours may disagree on.
template <typename Out>
uint32_t sized(Out* out, const char* init) {
  const uint32_t size = not_null(out, "out").struct_size;
  if (size < sizeof size || size > 4096)
    bad_argument("out.struct_size", (std::string("is not set: call ") + init).c_str());
  return size;
}

// `*out` is zero unless the call succeeds.
template <typename T>
T& cleared(T* out) {
  std::memset(&not_null(out, "out"), 0, sizeof *out);
  return *out;
}

}  // namespace

// ---- the machine ----

void pe_cpus_init(pe_cpus* cpus) {
  if (!cpus) return;
  *cpus = {};
  cpus->struct_size = sizeof *cpus;
}

pe_status pe_get_cpus(pe_cpus* out) {
  return guarded([&] {
    const uint32_t size = sized(out, "pe_cpus_init");
    const Cpus c = find_cpus("");
    const pe_cpus cpus{.struct_size = size,
                       .n_threads = static_cast<uint32_t>(c.threads),
                       .n_cores = static_cast<uint32_t>(c.cores),
                       .n_performance = static_cast<uint32_t>(c.performance),
                       .quota = c.quota};
    std::memcpy(out, &cpus, std::min<size_t>(size, sizeof cpus));
  });
}

void pe_limits_init(pe_limits* limits) {
  if (!limits) return;
  *limits = {};
  limits->struct_size = sizeof *limits;
}

pe_status pe_measure_limits(uint32_t n_threads, uint64_t bytes, pe_limits* out) {
  return guarded([&] {
    const uint32_t size = sized(out, "pe_limits_init");
    if (n_threads < 1 || n_threads > kMaxThreads) bad_argument("n_threads", "is outside 1..512");
    if (bytes < uint64_t{1} << 20 || bytes > uint64_t{64} << 30) bad_argument("bytes", "is outside 1 MiB..64 GiB");
    Tier tier;
    active_kernels(&tier);
    const Limits l = measure_limits(n_threads, static_cast<size_t>(bytes), tier);
    const pe_limits limits{.struct_size = size,
                           .n_threads = n_threads,
                           .clock_hz = l.clock_hz,
                           .read_bytes = l.read.median,
                           .read_lowest = l.read.low,
                           .read_highest = l.read.high,
                           .int8_macs = l.macs.int8,
                           .float_macs = l.macs.fp32,
                           .barrier_seconds = l.barrier};
    std::memcpy(out, &limits, std::min<size_t>(size, sizeof limits));
  });
}

// ---- files ----

pe_status pe_file_open(const char* path, pe_load load, pe_file** out) {
  return guarded([&] {
    not_null(out, "out") = nullptr;
    not_null(path, "path");
    *out = new pe_file{gguf::File::open(path, load_of(load, true))};
  });
}

void pe_file_close(pe_file* file) { delete file; }

pe_status pe_guard_mapped_files(void) {
  return guarded([] { guard_mapped_files(); });
}

pe_status pe_file_check(const pe_file* file) {
  return guarded([&] { not_null(file, "file").file->check_unchanged(); });
}

uint32_t pe_file_version(const pe_file* file) { return file ? file->file->version() : 0; }
uint64_t pe_file_value_count(const pe_file* file) { return file ? file->file->values().size() : 0; }
uint64_t pe_file_tensor_count(const pe_file* file) { return file ? file->file->tensors().size() : 0; }

pe_status pe_file_value_at(const pe_file* file, uint64_t index, pe_value* out) {
  return guarded([&] {
    cleared(out);
    const auto values = not_null(file, "file").file->values();
    if (index >= values.size()) bad_argument("index", "is past the last value");
    *out = value_of(values[index]);
  });
}

pe_status pe_file_tensor_at(const pe_file* file, uint64_t index, pe_tensor* out) {
  return guarded([&] {
    cleared(out);
    const auto tensors = not_null(file, "file").file->tensors();
    if (index >= tensors.size()) bad_argument("index", "is past the last tensor");
    *out = tensor_of(tensors[index]);
  });
}

pe_status pe_file_value(const pe_file* file, const char* key, pe_value* out) {
  return guarded([&] {
    cleared(out);
    const gguf::Value* value = not_null(file, "file").file->find(&not_null(key, "key"));
    if (!value) throw Error(Status::kArgument, "not_found", "the file has no key " + printable(key), printable(key));
    *out = value_of(*value);
  });
}

pe_status pe_file_tensor(const pe_file* file, const char* name, pe_tensor* out) {
  return guarded([&] {
    cleared(out);
    const gguf::TensorInfo* tensor = not_null(file, "file").file->find_tensor(&not_null(name, "name"));
    if (!tensor)
      throw Error(Status::kArgument, "not_found", "the file has no tensor " + printable(name), printable(name));
    *out = tensor_of(*tensor);
  });
}

// ---- models ----

void pe_model_options_init(pe_model_options* options) {
  if (options) *options = {sizeof *options, PE_LOAD_MMAP, 0.0f, nullptr, nullptr, kDefaultPrefixBytes};
}

void pe_model_info_init(pe_model_info* info) {
  if (!info) return;
  *info = {};
  info->struct_size = sizeof *info;
}

pe_status pe_model_open(const char* path, const pe_model_options* options, pe_model** out) {
  return guarded([&] {
    not_null(out, "out") = nullptr;
    not_null(path, "path");
    const pe_model_options o = read_options(options, pe_model_options_init);
    if (!(o.rope_attn_scale >= 0 && o.rope_attn_scale <= 1e3f))
      bad_argument("rope_attn_scale", "must be 0 (from the file) or at most 1000");
    ModelOptions mo;
    mo.load = load_of(o.load, false);
    mo.rope_attn_scale = o.rope_attn_scale;
    if (o.progress) mo.progress = [&o](float fraction) { return o.progress(o.user, fraction) != 0; };
    auto model = Model::open(path, mo);
    const auto bytes = static_cast<size_t>(std::min<uint64_t>(o.prefix_bytes, SIZE_MAX));
    *out = new pe_model{model, {model->file()}, bytes ? std::make_shared<PrefixCache>(bytes) : nullptr};
  });
}

void pe_model_close(pe_model* model) { delete model; }

pe_status pe_model_get_info(const pe_model* model, pe_model_info* out) {
  return guarded([&] {
    const uint32_t size = sized(out, "pe_model_info_init");
    const Model& m = *not_null(model, "model").model;
    const ModelConfig& c = m.config();
    pe_model_info info{.struct_size = size,
                       .architecture = c.arch->name,
                       .n_vocab = static_cast<uint32_t>(c.n_vocab),
                       .n_ctx_train = static_cast<uint32_t>(c.n_ctx_train),
                       .n_layers = static_cast<uint32_t>(c.n_layers),
                       .n_embd = static_cast<uint32_t>(c.n_embd),
                       .n_heads = static_cast<uint32_t>(c.n_heads),
                       .n_kv_heads = static_cast<uint32_t>(c.n_kv_heads),
                       .head_dim_k = static_cast<uint32_t>(c.head_dim_k),
                       .head_dim_v = static_cast<uint32_t>(c.head_dim_v),
                       .n_ff = static_cast<uint32_t>(c.n_ff),
                       .n_params = m.n_params(),
                       .weight_bytes = m.weight_bytes(),
                       .notes = c.notes.c_str()};
    std::memcpy(out, &info, std::min<size_t>(size, sizeof info));
  });
}

pe_status pe_model_fingerprint(const pe_model* model, uint64_t* out) {
  return guarded([&] {
    not_null(out, "out") = 0;
    *out = not_null(model, "model").model->fingerprint();
  });
}

const pe_file* pe_model_file(const pe_model* model) { return model ? &model->file : nullptr; }

// ---- sessions ----

void pe_session_options_init(pe_session_options* options) {
  if (options) *options = {sizeof *options, 0, 0, 0, 1, 0};
}

uint32_t pe_default_threads(void) { return static_cast<uint32_t>(default_threads()); }

pe_status pe_session_bytes(const pe_model* model, const pe_session_options* options, uint64_t* kv_bytes,
                           uint64_t* scratch_bytes) {
  return guarded([&] {
    not_null(kv_bytes, "kv_bytes") = 0;
    not_null(scratch_bytes, "scratch_bytes") = 0;
    const Session::Bytes bytes = Session::bytes(not_null(model, "model").model->config(), session_options(options));
    *kv_bytes = bytes.kv;
    *scratch_bytes = bytes.scratch;
  });
}

void pe_shape_init(pe_shape* shape) {
  if (!shape) return;
  *shape = {};
  shape->struct_size = sizeof *shape;
}

pe_status pe_shape_bytes(const pe_shape* shape, const pe_session_options* options, uint64_t* kv_bytes,
                         uint64_t* scratch_bytes) {
  return guarded([&] {
    not_null(kv_bytes, "kv_bytes") = 0;
    not_null(scratch_bytes, "scratch_bytes") = 0;
    not_null(shape, "shape");
    const Session::Bytes bytes =
        Session::bytes(config_of(read_options(shape, pe_shape_init)), session_options(options));
    *kv_bytes = bytes.kv;
    *scratch_bytes = bytes.scratch;
  });
}

pe_status pe_session_create(pe_model* model, const pe_session_options* options, pe_session** out) {
  return guarded([&] {
    not_null(out, "out") = nullptr;
    const pe_model& m = not_null(model, "model");
    *out = new pe_session{Session(m.model, session_options(options), m.prefixes)};
  });
}

void pe_session_free(pe_session* session) { delete session; }

pe_status pe_session_eval(pe_session* session, const int32_t* tokens, size_t n, pe_logits want, float* logits,
                          size_t logits_count) {
  return guarded([&] {
    Session& s = not_null(session, "session").session;
    if (n) not_null(tokens, "tokens");
    if (want != PE_LOGITS_NONE && want != PE_LOGITS_LAST && want != PE_LOGITS_ALL)
      bad_argument("want", "is no known pe_logits");
    if (want != PE_LOGITS_NONE && n) {  // without tokens eval says so
      not_null(logits, "logits");
      const size_t rows = want == PE_LOGITS_ALL ? n : 1;
      if (logits_count / s.model().config().n_vocab < rows)
        bad_argument("logits_count", "is too small for the asked rows");
    }
    s.eval(tokens, n, static_cast<Want>(want), logits);
  });
}

size_t pe_session_length(const pe_session* session) { return session ? session->session.tokens().size() : 0; }
const int32_t* pe_session_tokens(const pe_session* session) {
  return session ? session->session.tokens().data() : nullptr;
}
uint32_t pe_session_context(const pe_session* session) {
  return session ? static_cast<uint32_t>(session->session.n_ctx()) : 0;
}
uint32_t pe_session_threads(const pe_session* session) {
  return session ? static_cast<uint32_t>(session->session.n_threads()) : 0;
}

pe_status pe_session_truncate(pe_session* session, size_t n) {
  return guarded([&] { not_null(session, "session").session.truncate(n); });
}

pe_status pe_session_reuse(pe_session* session, const int32_t* tokens, size_t n, size_t* kept) {
  return guarded([&] {
    not_null(kept, "kept") = 0;
    if (n) not_null(tokens, "tokens");
    *kept = not_null(session, "session").session.reuse(tokens, n);
  });
}

pe_status pe_session_state_bytes(const pe_session* session, size_t n, uint64_t* bytes) {
  return guarded([&] {
    not_null(bytes, "bytes") = 0;
    *bytes = not_null(session, "session").session.state_bytes(n);
  });
}

pe_status pe_session_save(pe_session* session, size_t first, size_t n, void* data, size_t size) {
  return guarded([&] {
    Session& s = not_null(session, "session").session;
    not_null(static_cast<char*>(data), "data");
    s.save(first, n, static_cast<uint8_t*>(data), size);
  });
}

pe_status pe_session_restore(pe_session* session, const void* data, size_t size) {
  return guarded([&] {
    Session& s = not_null(session, "session").session;
    if (size) not_null(static_cast<const char*>(data), "data");
    s.restore(static_cast<const uint8_t*>(data), size);
  });
}

void pe_input_init(pe_input* input) {
  if (!input) return;
  *input = {};
  input->struct_size = sizeof *input;
}

pe_status pe_session_observe(pe_session* session, int32_t on) {
  return guarded([&] {
    if (on != 0 && on != 1) bad_argument("on", "must be 0 or 1");
    not_null(session, "session").session.observe(on == 1);
  });
}

pe_status pe_session_input_at(const pe_session* session, size_t index, pe_input* out) {
  return guarded([&] {
    const uint32_t size = sized(out, "pe_input_init");
    const InputSums* inputs = not_null(session, "session").session.inputs();
    if (!inputs) bad_argument("session", "is not observed: call pe_session_observe first");
    if (index >= inputs->size()) bad_argument("index", "is past the last matrix");
    const InputSums::Sums& sums = inputs->of(index);
    const pe_input input{.struct_size = size,
                         .tensor = inputs->matrix(index).name,
                         .n_tokens = sums.tokens,
                         .n_cols = sums.squares.size(),
                         .squares = sums.squares.data()};
    std::memcpy(out, &input, std::min<size_t>(size, sizeof input));
  });
}

void pe_session_cancel(pe_session* session) {
  if (session) session->session.cancel();
}

void pe_session_clear_cancel(pe_session* session) {
  if (session) session->session.clear_cancel();
}

pe_status pe_session_check_cancel(pe_session* session) {
  return guarded([&] { not_null(session, "session").session.check_cancel(); });
}
