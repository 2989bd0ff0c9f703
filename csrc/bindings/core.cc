// The pybind11 door: a client of pyengine.h and of nothing else. Keeps handles alive, releases the GIL around long
// calls, turns failures into the exceptions of pyengine/errors.py. The friendly half of the interface is in Python.
// Long, because every function of the interface passes through it once, and the module's table wants them in one file.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>  // std::optional

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "pyengine.h"

namespace py = pybind11;

namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;
using IdArray = py::array_t<int32_t, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;
using Row = py::array_t<float, py::array::c_style>;  // noconvert: a caller's buffer, never a copy of it

// Raises the exception for this thread's last error. Needs the GIL.
[[noreturn]] void raise_last() {
  const pe_error* e = pe_last_error();
  py::module_::import("pyengine.errors")
      .attr("raise_error")(static_cast<int>(e->status), e->code, e->offset, py::str(e->field), py::str(e->message));
  throw std::runtime_error("raise_error returned");
}

void check(pe_status status) {
  if (status != PE_OK) raise_last();
}

[[noreturn]] void raise_argument(const char* code, const std::string& message) {
  py::module_::import("pyengine.errors")
      .attr("raise_error")(static_cast<int>(PE_E_ARGUMENT), code, UINT64_MAX, "", message);
  throw std::runtime_error("raise_error returned");
}

[[noreturn]] void raise_closed(const char* what) {
  raise_argument("closed", std::string("this ") + what + " is closed");
}

// ---- the GIL ----

// A thread that asks for the GIL while the interpreter ends is unwound by force, through frames that cannot be: the
// process would abort. So when the interpreter begins to end, threads coming back from the engine stay where they are, until
// the process is gone (Python 3.14 does the same with all of them).
std::atomic<unsigned long> ending_thread{0};  // the one that ends the interpreter; it may go on
std::atomic<int> taking{0};                   // threads about to take the GIL

class TakingGil {
 public:
  TakingGil() {
    ++taking;
    const unsigned long ending = ending_thread;
    if (ending == 0 || ending == PyThread_get_thread_ident()) return;
    --taking;
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
  ~TakingGil() { --taking; }
  TakingGil(const TakingGil&) = delete;
  TakingGil& operator=(const TakingGil&) = delete;
};

// Called by atexit, while the other threads still run: lets those have the GIL that are waiting for it already. At most a
// second: in the child of a fork they may not exist.
void end_threads() {
  ending_thread = PyThread_get_thread_ident();
  for (int i = 0; taking > 0 && i < 1000; ++i) {
    py::gil_scoped_release unlocked;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

// Runs `call`, which must not throw, without the GIL.
template <typename Call>
auto without_gil(Call call) {
  PyThreadState* const state = PyEval_SaveThread();
  const auto result = call();
  const TakingGil now;
  PyEval_RestoreThread(state);
  return result;
}

template <typename T, void (*Free)(T*)>
struct Handle {
  explicit Handle(T* raw) : raw(raw) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() { Free(raw); }
  T* raw;
};
// Empties `handle`, and closes what it named, if nobody else has it, without the GIL.
template <typename T>
void let_go(std::shared_ptr<T>& handle) {
  std::shared_ptr<T> last = std::move(handle);
  handle.reset();
  without_gil([&] {
    last.reset();
    return 0;
  });
}
using FileHandle = Handle<pe_file, pe_file_close>;
using ModelHandle = Handle<pe_model, pe_model_close>;
using SessionHandle = Handle<pe_session, pe_session_free>;

// ---- metadata ----

template <typename T>
T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
py::object numbers(const pe_value& v, bool array) {
  if (!array) return py::cast(load<T>(v.data));
  py::array_t<T> out(static_cast<py::ssize_t>(v.count));
  if (v.count) std::memcpy(out.mutable_data(), v.data, v.count * sizeof(T));
  return out;
}

py::object string_array(const pe_value& v) {
  py::list out(static_cast<py::ssize_t>(v.count));
  const char* p = static_cast<const char*>(v.data);
  for (uint64_t i = 0; i < v.count; ++i) {
    const auto n = load<uint64_t>(p);
    PyObject* s = PyUnicode_DecodeUTF8(p + 8, static_cast<py::ssize_t>(n), "strict");
    if (!s) throw py::error_already_set();
    PyList_SET_ITEM(out.ptr(), static_cast<py::ssize_t>(i), s);
    p += 8 + n;
  }
  return out;
}

py::object value_object(const pe_value& v) {
  const bool array = v.type == PE_ARRAY;
  switch (array ? v.element_type : v.type) {
    case PE_UINT8: return numbers<uint8_t>(v, array);
    case PE_INT8: return numbers<int8_t>(v, array);
    case PE_UINT16: return numbers<uint16_t>(v, array);
    case PE_INT16: return numbers<int16_t>(v, array);
    case PE_UINT32: return numbers<uint32_t>(v, array);
    case PE_INT32: return numbers<int32_t>(v, array);
    case PE_UINT64: return numbers<uint64_t>(v, array);
    case PE_INT64: return numbers<int64_t>(v, array);
    case PE_FLOAT32: return numbers<float>(v, array);
    case PE_FLOAT64: return numbers<double>(v, array);
    case PE_BOOL: return numbers<bool>(v, array);
    case PE_STRING:
      if (array) return string_array(v);
      return py::str(static_cast<const char*>(v.data), v.size);
    default: throw std::runtime_error("unknown metadata type");
  }
}

// A GGUF file, its own or the one behind a model (then `owner` keeps the model alive).
class File {
 public:
  static File open(const std::string& path, int load) {
    pe_file* raw = nullptr;
    const pe_status status = without_gil([&] { return pe_file_open(path.c_str(), static_cast<pe_load>(load), &raw); });
    check(status);
    auto handle = std::make_shared<FileHandle>(raw);
    return File(handle, raw);
  }
  File(std::shared_ptr<void> owner, const pe_file* raw) : owner_(std::move(owner)), raw_(raw) {}

  void close() { owner_.reset(), raw_ = nullptr; }
  void check_unchanged() const { check(pe_file_check(raw())); }
  uint32_t version() const { return pe_file_version(raw()); }

  py::list keys() const {
    py::list out;
    for (uint64_t i = 0, n = pe_file_value_count(raw()); i < n; ++i) {
      pe_value v;
      check(pe_file_value_at(raw(), i, &v));
      out.append(py::str(v.key));
    }
    return out;
  }
  // (type, element type) as GGUF numbers them.
  std::pair<int, int> value_type(const std::string& key) const {
    pe_value v;
    check(pe_file_value(raw(), key.c_str(), &v));
    return {v.type, v.element_type};
  }

  py::object value(const std::string& key) const {
    pe_value v;
    check(pe_file_value(raw(), key.c_str(), &v));
    return value_object(v);
  }
  py::list tensors() const {
    py::list out;
    for (uint64_t i = 0, n = pe_file_tensor_count(raw()); i < n; ++i) {
      pe_tensor t;
      check(pe_file_tensor_at(raw(), i, &t));
      py::tuple dims(t.n_dims);
      for (uint32_t d = 0; d < t.n_dims; ++d) dims[d] = t.dims[d];
      out.append(py::make_tuple(py::str(t.name), t.type, dims, t.offset, t.size, t.part));
    }
    return out;
  }
  // The packed bytes as a read-only uint8 array that keeps the file open.
  py::object data(const std::string& name) const {
    pe_tensor t;
    check(pe_file_tensor(raw(), name.c_str(), &t));
    if (!t.data) return py::none();
    auto* keep = new std::shared_ptr<void>(owner_);
    py::capsule base(keep, [](void* p) { delete static_cast<std::shared_ptr<void>*>(p); });
    py::array_t<uint8_t> view(static_cast<py::ssize_t>(t.size), static_cast<const uint8_t*>(t.data), base);
    view.attr("setflags")(py::arg("write") = false);
    return view;
  }

 private:
  const pe_file* raw() const {
    if (!raw_) raise_closed("file");
    return raw_;
  }
  std::shared_ptr<void> owner_;
  const pe_file* raw_;
};

// ---- model and session ----

// Carries a Python progress callable through the C callback; the first exception cancels and is raised afterwards.
struct Progress {
  py::object call;
  std::optional<py::error_already_set> error;

  static int32_t hook(void* self, float fraction) {
    auto* p = static_cast<Progress*>(self);
    std::optional<py::gil_scoped_acquire> locked;
    {
      const TakingGil now;
      locked.emplace();
    }
    try {
      return p->call(fraction).is(py::bool_(false)) ? 1 : 0;  // False cancels, None goes on
    } catch (py::error_already_set& e) {
      p->error.emplace(std::move(e));
      return 1;
    }
  }
};

class Session;

class Model {
 public:
  static Model open(const std::string& path, int load, float rope_attn_scale, const py::object& progress,
                    uint64_t prefix_bytes) {
    pe_model_options options;
    pe_model_options_init(&options);
    options.load = static_cast<pe_load>(load);
    options.rope_attn_scale = rope_attn_scale;
    options.prefix_bytes = prefix_bytes;
    Progress carrier{progress, {}};
    if (!progress.is_none()) {
      options.progress = Progress::hook;
      options.user = &carrier;
    }
    pe_model* raw = nullptr;
    const pe_status status = without_gil([&] { return pe_model_open(path.c_str(), &options, &raw); });
    if (carrier.error) {
      pe_model_close(raw);
      throw std::move(*carrier.error);
    }
    check(status);
    Model m;
    m.handle_ = std::make_shared<ModelHandle>(raw);
    return m;
  }
  void close() {
    let_go(handle_);  // may wait for a piece of the file that is being read ahead
  }
  const std::shared_ptr<ModelHandle>& handle() const {
    if (!handle_) raise_closed("model");
    return handle_;
  }
  File file() const { return File(handle(), pe_model_file(handle()->raw)); }
  uint64_t fingerprint() const {
    const std::shared_ptr<ModelHandle> keep = handle();
    uint64_t out = 0;
    const pe_status status = without_gil([&] { return pe_model_fingerprint(keep->raw, &out); });
    check(status);
    return out;
  }
  py::dict info() const {
    pe_model_info i;
    pe_model_info_init(&i);
    check(pe_model_get_info(handle()->raw, &i));
    py::dict d;
    d["architecture"] = i.architecture;
    d["n_vocab"] = i.n_vocab;
    d["n_ctx_train"] = i.n_ctx_train;
    d["n_layers"] = i.n_layers;
    d["n_embd"] = i.n_embd;
    d["n_heads"] = i.n_heads;
    d["n_kv_heads"] = i.n_kv_heads;
    d["head_dim_k"] = i.head_dim_k;
    d["head_dim_v"] = i.head_dim_v;
    d["n_ff"] = i.n_ff;
    d["n_params"] = i.n_params;
    d["weight_bytes"] = i.weight_bytes;
    d["notes"] = i.notes;
    return d;
  }

 private:
  std::shared_ptr<ModelHandle> handle_;
};

pe_session_options session_options(uint32_t n_ctx, uint32_t threads, uint32_t prefill, int kv, uint32_t chunk) {
  pe_session_options o;
  pe_session_options_init(&o);
  o.n_ctx = n_ctx;
  o.n_threads = threads;
  o.n_threads_prefill = prefill;
  o.kv_type = kv;
  o.n_chunk = chunk;
  return o;
}

class Session {
 public:
  // The engine's session keeps the weights alive, and nothing here does after close().
  Session(const Model& model, uint32_t n_ctx, uint32_t threads, uint32_t prefill, int kv, uint32_t chunk) {
    const std::shared_ptr<ModelHandle> keep = model.handle();
    pe_model_info info;
    pe_model_info_init(&info);
    check(pe_model_get_info(keep->raw, &info));
    n_vocab_ = info.n_vocab;
    const pe_session_options o = session_options(n_ctx, threads, prefill, kv, chunk);
    pe_session* raw = nullptr;
    const pe_status status = without_gil([&] { return pe_session_create(keep->raw, &o, &raw); });
    check(status);
    handle_ = std::make_shared<SessionHandle>(raw);
  }
  // A running eval keeps its own reference: it is cancelled, and the memory goes when it returns.
  void close() {
    if (handle_) pe_session_cancel(handle_->raw);
    let_go(handle_);
  }
  // Into `given` [>= rows][n_vocab], or a new array [rows][n_vocab].
  py::array_t<float> eval(const IdArray& tokens, int want, std::optional<Row> given) {
    const std::shared_ptr<SessionHandle> keep = handle();
    const auto n = static_cast<size_t>(tokens.size());
    const size_t rows = want == PE_LOGITS_NONE ? 0 : want == PE_LOGITS_ALL ? n : 1;
    Row out = given ? *given : Row({static_cast<py::ssize_t>(rows), static_cast<py::ssize_t>(n_vocab_)});
    if (out.ndim() != 2 || static_cast<size_t>(out.shape(0)) < rows || static_cast<size_t>(out.shape(1)) != n_vocab_)
      raise_shape(out, rows);
    // A private copy: another Python thread could resize or write the caller's array while the GIL is released.
    const std::vector<int32_t> ids(tokens.data(), tokens.data() + n);
    float* logits = rows ? out.mutable_data() : nullptr;
    const pe_status status = without_gil([&] {
      return pe_session_eval(keep->raw, ids.data(), n, static_cast<pe_logits>(want), logits, rows * n_vocab_);
    });
    check(status);
    return out;
  }
  void check_cancel() { check(pe_session_check_cancel(handle()->raw)); }
  void observe(bool on) { check(pe_session_observe(handle()->raw, on)); }
  // (tensor, tokens, squares float64) of every matrix
  py::list inputs() const {
    py::list out;
    pe_input input;
    pe_input_init(&input);
    check(pe_session_input_at(handle()->raw, 0, &input));
    for (size_t i = 0; pe_session_input_at(handle()->raw, i, &input) == PE_OK; ++i)
      out.append(py::make_tuple(py::str(input.tensor), input.n_tokens,
                                Doubles(static_cast<py::ssize_t>(input.n_cols), input.squares)));
    return out;
  }
  size_t length() const { return pe_session_length(handle()->raw); }
  uint32_t context() const { return pe_session_context(handle()->raw); }
  uint32_t threads() const { return pe_session_threads(handle()->raw); }
  py::array_t<int32_t> tokens() const {
    return py::array_t<int32_t>(static_cast<py::ssize_t>(length()), pe_session_tokens(handle()->raw));
  }
  void truncate(size_t n) { check(pe_session_truncate(handle()->raw, n)); }
  size_t reuse(const IdArray& tokens) {
    const std::shared_ptr<SessionHandle> keep = handle();
    const std::vector<int32_t> ids(tokens.data(), tokens.data() + tokens.size());
    size_t kept = 0;
    const pe_status status = without_gil([&] { return pe_session_reuse(keep->raw, ids.data(), ids.size(), &kept); });
    check(status);
    return kept;
  }
  uint64_t state_bytes(size_t n) const {
    uint64_t bytes = 0;
    check(pe_session_state_bytes(handle()->raw, n, &bytes));
    return bytes;
  }
  // Of positions [first, first + n): uint8 [state_bytes(n)].
  py::array_t<uint8_t> save(size_t first, size_t n) {
    const std::shared_ptr<SessionHandle> keep = handle();
    const uint64_t size = state_bytes(n);
    py::array_t<uint8_t> out(static_cast<py::ssize_t>(size));
    uint8_t* data = out.mutable_data();
    const pe_status status = without_gil([&] { return pe_session_save(keep->raw, first, n, data, size); });
    check(status);
    return out;
  }
  // What a state is checked for must not change while it is used: the caller's buffer is read under the GIL.
  void restore(const py::buffer& state) {
    const py::buffer_info info = state.request();
    if (info.ndim != 1 || info.itemsize != 1 || (info.size && info.strides[0] != 1))
      raise_argument("bad_buffer", "a state is bytes, one behind the other");
    check(pe_session_restore(handle()->raw, info.ptr, static_cast<size_t>(info.size)));
  }
  void cancel() {
    if (handle_) pe_session_cancel(handle_->raw);
  }
  void clear_cancel() {
    if (handle_) pe_session_clear_cancel(handle_->raw);
  }

 private:
  const std::shared_ptr<SessionHandle>& handle() const {
    if (!handle_) raise_closed("session");
    return handle_;
  }
  [[noreturn]] void raise_shape(const Row& out, size_t rows) const {
    raise_argument("bad_buffer", "the buffer for logits has shape " + py::str(out.attr("shape")).cast<std::string>() +
                                     "; expected at least " + std::to_string(rows) + " rows of " +
                                     std::to_string(n_vocab_));
  }
  std::shared_ptr<SessionHandle> handle_;
  size_t n_vocab_ = 0;
};

py::tuple session_bytes(const Model& model, uint32_t n_ctx, uint32_t threads, uint32_t prefill, int kv,
                        uint32_t chunk) {
  const pe_session_options o = session_options(n_ctx, threads, prefill, kv, chunk);
  uint64_t kv_bytes = 0;
  uint64_t scratch = 0;
  check(pe_session_bytes(model.handle()->raw, &o, &kv_bytes, &scratch));
  return py::make_tuple(kv_bytes, scratch);
}

py::tuple shape_bytes(uint32_t n_ctx_train, uint32_t n_layers, uint32_t n_embd, uint32_t n_heads, uint32_t n_kv_heads,
                      uint32_t head_dim, uint32_t n_ff, uint32_t n_ctx, uint32_t threads, uint32_t prefill, int kv,
                      uint32_t chunk) {
  pe_shape shape;
  pe_shape_init(&shape);
  shape.n_ctx_train = n_ctx_train;
  shape.n_layers = n_layers;
  shape.n_embd = n_embd;
  shape.n_heads = n_heads;
  shape.n_kv_heads = n_kv_heads;
  shape.head_dim_k = shape.head_dim_v = head_dim;
  shape.n_ff = n_ff;
  const pe_session_options o = session_options(n_ctx, threads, prefill, kv, chunk);
  uint64_t kv_bytes = 0;
  uint64_t scratch = 0;
  check(pe_shape_bytes(&shape, &o, &kv_bytes, &scratch));
  return py::make_tuple(kv_bytes, scratch);
}

// ---- choosing tokens ----

using Longs = py::array_t<int64_t, py::array::c_style>;

// The k largest logits as (ids int64, logits float64), ids ascending.
py::tuple top_k(const Row& logits, size_t k) {
  const auto n = static_cast<size_t>(logits.size());
  const size_t room = std::min(k, n);
  std::vector<int32_t> ids(room);
  std::vector<float> values(room);
  size_t found = 0;
  const pe_status status =
      without_gil([&] { return pe_top_k(logits.data(), n, room, ids.data(), values.data(), &found); });
  check(status);
  Longs out_ids(static_cast<py::ssize_t>(found));
  Doubles out_values(static_cast<py::ssize_t>(found));
  std::copy_n(ids.begin(), found, out_ids.mutable_data());
  std::copy_n(values.begin(), found, out_values.mutable_data());
  return py::make_tuple(out_ids, out_values);
}

Doubles exp_nonpositive(const Doubles& x) {
  Doubles y(x.size());
  check(pe_exp(x.data(), static_cast<size_t>(x.size()), y.mutable_data()));
  return y;
}

double softmax_sum(const Row& logits, double peak, const IdArray& ids, const Doubles& values) {
  if (ids.size() != values.size()) throw py::value_error("one value for each id");
  double sum = 0.0;
  const pe_status status = without_gil([&] {
    return pe_softmax_sum(logits.data(), static_cast<size_t>(logits.size()), peak, ids.data(), values.data(),
                          static_cast<size_t>(ids.size()), &sum);
  });
  check(status);
  return sum;
}

// ---- tensor formats ----

py::list formats() {
  py::list out;
  pe_format f;
  for (size_t i = 0; pe_format_at(i, &f) == PE_OK; ++i)
    out.append(py::make_tuple(f.type, f.name, f.block_size, f.block_bytes, f.can_quantise != 0));
  return out;
}

using Bytes = py::array_t<uint8_t, py::array::c_style>;

FloatArray dequantise(int type, const Bytes& src, size_t rows, size_t cols) {
  FloatArray out({rows, cols});
  float* dst = out.mutable_data();
  const pe_status status = without_gil([&] {
    return pe_dequantise_rows(type, src.data(), static_cast<size_t>(src.size()), rows, cols, dst, rows * cols);
  });
  check(status);
  return out;
}

Bytes quantise(int type, const FloatArray& src, size_t row_bytes, uint32_t threads,
               const std::optional<FloatArray>& importance) {
  const auto rows = static_cast<size_t>(src.shape(0));
  const auto cols = static_cast<size_t>(src.shape(1));
  if (importance && static_cast<size_t>(importance->size()) != cols) throw py::value_error("importance");
  const float* weights = importance ? importance->data() : nullptr;
  Bytes out({rows, row_bytes});
  uint8_t* dst = out.mutable_data();
  const pe_status status = without_gil([&] {
    return pe_quantise_rows(type, src.data(), rows * cols, rows, cols, weights, dst, rows * row_bytes, threads);
  });
  check(status);
  return out;
}

// (packed, squared error, energy)
py::tuple convert(int src_type, const Bytes& src, int type, size_t rows, size_t cols, size_t row_bytes,
                  const std::optional<FloatArray>& importance) {
  if (importance && static_cast<size_t>(importance->size()) != cols) throw py::value_error("importance");
  const float* weights = importance ? importance->data() : nullptr;
  Bytes out({rows, row_bytes});
  uint8_t* dst = out.mutable_data();
  double lost[2];
  pe_status status;
  {
    py::gil_scoped_release unlocked;
    status = pe_convert_rows(src_type, src.data(), static_cast<size_t>(src.size()), type, rows, cols, weights, dst,
                             rows * row_bytes, lost, 1);
  }
  check(status);
  return py::make_tuple(out, lost[0], lost[1]);
}

FloatArray linear(const std::string& tier, int type, const Bytes& w, size_t rows, size_t cols, const FloatArray& x) {
  const auto tokens = static_cast<size_t>(x.shape(0));
  FloatArray out({tokens, rows});
  float* y = out.mutable_data();
  const pe_status status = without_gil([&] {
    return pe_linear(tier.c_str(), type, w.data(), static_cast<size_t>(w.size()), rows, cols, x.data(), tokens, y);
  });
  check(status);
  return out;
}

// y [heads][head_dim]
FloatArray attend(const std::string& tier, int kv, const Bytes& keys, const Bytes& values, size_t n_keys,
                  const FloatArray& q) {
  FloatArray out({q.shape(0), q.shape(1)});
  const auto heads = static_cast<size_t>(q.shape(0));
  const auto dim = static_cast<size_t>(q.shape(1));
  if (keys.size() != values.size()) throw py::value_error("as many bytes of values as of keys");
  float* y = out.mutable_data();
  const pe_status status = without_gil([&] {
    return pe_attend(tier.c_str(), kv, keys.data(), values.data(), static_cast<size_t>(keys.size()), n_keys, dim,
                     q.data(), heads, y);
  });
  check(status);
  return out;
}

py::list tiers() {
  py::list out;
  for (size_t i = 0; const char* name = pe_tier_name(i); ++i)
    if (pe_tier_available(i)) out.append(py::str(name));
  return out;
}

py::dict cpus() {
  pe_cpus c;
  pe_cpus_init(&c);
  check(pe_get_cpus(&c));
  py::dict d;
  d["threads"] = c.n_threads;
  d["cores"] = c.n_cores;
  d["performance"] = c.n_performance;
  d["quota"] = c.quota;
  return d;
}

py::dict measure_limits(uint32_t threads, uint64_t bytes) {
  pe_limits l;
  pe_limits_init(&l);
  const pe_status status = without_gil([&] { return pe_measure_limits(threads, bytes, &l); });
  check(status);
  py::dict d;
  d["threads"] = l.n_threads;
  d["clock_hz"] = l.clock_hz;
  d["read_bytes"] = l.read_bytes;
  d["read_lowest"] = l.read_lowest;
  d["read_highest"] = l.read_highest;
  d["int8_macs"] = l.int8_macs;
  d["float_macs"] = l.float_macs;
  d["barrier_seconds"] = l.barrier_seconds;
  return d;
}

std::string tier_active() {
  const char* name = nullptr;
  check(pe_tier_active(&name));
  return name;
}

PyObject *locked_name, *release_name;

// run_task(work, begun, ended): what a new thread of Python's is to run. Calls work and then releases those of the two
// locks that are held. It needs no frame of Python's and no memory, so it gets there also when the thread is refused
// memory for its first frame; whoever waits for the locks then sees that work did not begin.
PyObject* run_task(PyObject*, PyObject* args) {
  PyObject *work, *begun, *ended;
  if (!PyArg_UnpackTuple(args, "run_task", 3, 3, &work, &begun, &ended)) return nullptr;
  const auto call = [](PyObject* object, PyObject* name) {
    PyObject* result = name ? PyObject_CallMethodNoArgs(object, name) : PyObject_CallNoArgs(object);
    if (!result) PyErr_Clear();
    Py_XDECREF(result);
    return result == Py_True;  // which lives on
  };
  const char* tier;  // any function of the interface will do: the first one of a thread prepares it for exceptions
  if (pe_tier_active(&tier) != PE_E_MEMORY) call(work, nullptr);
  for (PyObject* lock : {begun, ended})
    if (call(lock, locked_name)) call(lock, release_name);
  Py_RETURN_NONE;
}

PyMethodDef plain_functions[] = {{"run_task", run_task, METH_VARARGS, nullptr}, {}};

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The native engine; see pyengine.h. Use the pyengine package, not this module.";
  m.def("version", &pe_version);
  m.def("numerics_epoch", &pe_numerics_epoch);
  m.def("tiers", &tiers);
  m.def("tier_active", &tier_active);
  m.def("formats", &formats);
  m.def("dequantise", &dequantise, py::arg("type"), py::arg("src"), py::arg("rows"), py::arg("cols"));
  m.def("convert", &convert, py::arg("src_type"), py::arg("src"), py::arg("type"), py::arg("rows"), py::arg("cols"),
        py::arg("row_bytes"), py::arg("importance") = py::none());
  m.def("quantise", &quantise, py::arg("type"), py::arg("src"), py::arg("row_bytes"), py::arg("threads"),
        py::arg("importance"));
  m.def("linear", &linear, py::arg("tier"), py::arg("type"), py::arg("w"), py::arg("rows"), py::arg("cols"),
        py::arg("x"));
  m.def("attend", &attend, py::arg("tier"), py::arg("kv_type"), py::arg("keys").noconvert(),
        py::arg("values").noconvert(), py::arg("n_keys"), py::arg("q"));
  m.def("default_threads", &pe_default_threads);
  m.def("cpus", &cpus);
  m.def("measure_limits", &measure_limits, py::arg("threads"), py::arg("bytes"));
  m.def("guard_mapped_files", [] { check(pe_guard_mapped_files()); });
  locked_name = PyUnicode_InternFromString("locked");
  release_name = PyUnicode_InternFromString("release");
  if (!locked_name || !release_name || PyModule_AddFunctions(m.ptr(), plain_functions) < 0)
    throw py::error_already_set();
  py::module_::import("atexit").attr("register")(py::cpp_function(&end_threads));
  m.def("top_k", &top_k, py::arg("logits").noconvert(), py::arg("k"));
  m.def("exp", &exp_nonpositive, py::arg("x").noconvert());
  m.def("softmax_sum", &softmax_sum, py::arg("logits").noconvert(), py::arg("peak"), py::arg("ids").noconvert(),
        py::arg("values").noconvert());
  m.def("session_bytes", &session_bytes, py::arg("model"), py::arg("n_ctx"), py::arg("threads"),
        py::arg("threads_prefill"), py::arg("kv_type"), py::arg("chunk"));
  m.def("shape_bytes", &shape_bytes, py::arg("n_ctx_train"), py::arg("n_layers"), py::arg("n_embd"), py::arg("n_heads"),
        py::arg("n_kv_heads"), py::arg("head_dim"), py::arg("n_ff"), py::arg("n_ctx"), py::arg("threads"),
        py::arg("threads_prefill"), py::arg("kv_type"), py::arg("chunk"));

  py::class_<File>(m, "File")
      .def_static("open", &File::open, py::arg("path"), py::arg("load"))
      .def("close", &File::close)
      .def("check_unchanged", &File::check_unchanged)
      .def("version", &File::version)
      .def("keys", &File::keys)
      .def("value_type", &File::value_type, py::arg("key"))
      .def("value", &File::value, py::arg("key"))
      .def("tensors", &File::tensors)
      .def("data", &File::data, py::arg("name"));

  py::class_<Model>(m, "Model")
      .def_static("open", &Model::open, py::arg("path"), py::arg("load"), py::arg("rope_attn_scale"),
                  py::arg("progress"), py::arg("prefix_bytes"))
      .def("close", &Model::close)
      .def("file", &Model::file)
      .def("fingerprint", &Model::fingerprint)
      .def("info", &Model::info);

  py::class_<Session>(m, "Session")
      .def(py::init<const Model&, uint32_t, uint32_t, uint32_t, int, uint32_t>(), py::arg("model"), py::arg("n_ctx"),
           py::arg("threads"), py::arg("threads_prefill"), py::arg("kv_type"), py::arg("chunk"))
      .def("close", &Session::close)
      .def("eval", &Session::eval, py::arg("tokens"), py::arg("want"), py::arg("out").noconvert() = py::none())
      .def("check_cancel", &Session::check_cancel)
      .def("observe", &Session::observe, py::arg("on"))
      .def("inputs", &Session::inputs)
      .def("length", &Session::length)
      .def("context", &Session::context)
      .def("threads", &Session::threads)
      .def("tokens", &Session::tokens)
      .def("truncate", &Session::truncate, py::arg("n"))
      .def("reuse", &Session::reuse, py::arg("tokens"))
      .def("state_bytes", &Session::state_bytes, py::arg("n"))
      .def("save", &Session::save, py::arg("first"), py::arg("n"))
      .def("restore", &Session::restore, py::arg("state"))
      .def("cancel", &Session::cancel)
      .def("clear_cancel", &Session::clear_cancel);
}
