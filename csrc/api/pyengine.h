/* pyengine.h - the C interface of the engine: a GGUF file and token ids in, logits out.
 *
 * C99, no dependencies. This header is the manual. Text <-> token ids, chat templates and sampling live in the Python
 * half (or in your program); everything here works on ids.
 *
 * Rules that hold everywhere
 *  - A function that can fail returns a pe_status. On failure every `out` parameter is set to NULL / 0 and
 *    pe_last_error() describes the failure for the calling thread until its next failing call.
 *  - Handles are opaque. Whoever got a handle from *_open / *_create returns it to the matching *_close / *_free;
 *    NULL is accepted there and ignored.
 *  - Every struct passed in starts with `struct_size`: set it with the *_init function, then change what you need.
 *    A library newer than your header reads only the fields your struct has.
 *  - Strings are UTF-8 and NUL-terminated, paths too (on Windows they are converted to wide paths).
 *    A returned pointer is owned by the handle it came from and dies with it.
 *  - Threads: a pe_file and a pe_model are immutable once opened, any number of threads may use them. A pe_session
 *    belongs to one thread at a time, except pe_session_cancel, which any thread may call at any moment. A model may be
 *    closed at any moment, and a session freed while it evaluates (see pe_session_free).
 *  - Fork: the parent goes on undisturbed. The child of a fork may use models and sessions that were idle at that moment,
 *    without helper threads and without sharing between sessions; a session in use at the fork says so ("busy"). It may
 *    free all of them, and open its own.
 *  - A call needs at most 256 KiB of the calling thread's stack.
 *  - The library prints nothing, never exits, and installs no signal handler unless asked (pe_guard_mapped_files).
 *
 * A complete host:
 *
 *    pe_model *m = NULL; pe_session *s = NULL;
 *    pe_model_options mo; pe_model_options_init(&mo);
 *    if (pe_model_open("model.gguf", &mo, &m) != PE_OK) { puts(pe_last_error()->message); return 1; }
 *    pe_session_options so; pe_session_options_init(&so); so.n_ctx = 512;
 *    if (pe_session_create(m, &so, &s) != PE_OK) { puts(pe_last_error()->message); return 1; }
 *    pe_model_info info; pe_model_info_init(&info); pe_model_get_info(m, &info);
 *    float *logits = malloc(info.n_vocab * sizeof *logits);
 *    pe_session_eval(s, prompt, n_prompt, PE_LOGITS_LAST, logits, info.n_vocab);
 *    ... pick an id, pe_session_eval(s, &id, 1, PE_LOGITS_LAST, logits, info.n_vocab), and so on ...
 *    pe_session_free(s); pe_model_close(m);
 */
#ifndef PYENGINE_H
#define PYENGINE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__) && !defined(_WIN32)
#pragma GCC visibility push(default)
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---------------------------------------------------------------- errors */

/* What kind of thing went wrong: decides what a program does next. Values never change meaning. */
typedef enum pe_status {
  PE_OK = 0,
  PE_E_ARGUMENT = 1,     /* the caller passed something impossible (NULL, id out of range, unknown option) */
  PE_E_IO = 2,           /* the operating system refused: missing file, permission, read error */
  PE_E_FORMAT = 3,       /* the file is malformed; the error says where */
  PE_E_UNSUPPORTED = 4,  /* the file is well formed, but this build does not run it (architecture, tensor type) */
  PE_E_MEMORY = 5,       /* an allocation failed */
  PE_E_CANCELLED = 6,    /* pe_session_cancel, or a progress callback, asked to stop */
  PE_E_CONTEXT_FULL = 7, /* the tokens do not fit into the session's context */
  PE_E_NUMERIC = 8,      /* NaN or infinity in the logits: damaged weights */
  PE_E_CPU = 9,          /* the processor lacks a forced instruction-set tier */
  PE_E_INTERNAL = 10     /* a bug in the engine: please report */
} pe_status;

typedef struct pe_error {
  pe_status status;
  const char* code;    /* stable identifier, e.g. "bad_magic", "tensor_past_end" */
  uint64_t offset;     /* byte offset in the file, or UINT64_MAX where none applies */
  const char* field;   /* what was being read, e.g. "llama.block_count"; "" where none applies */
  const char* message; /* one sentence a person can act on; safe to print (no control characters) */
} pe_error;

/* The last failure on this thread. Never NULL; status PE_OK before the first failure.
 * Valid until the next failing call on the same thread. */
const pe_error* pe_last_error(void);

/* ---------------------------------------------------------------- the library */

/* Version of the library, e.g. "0.1.0". */
const char* pe_version(void);

/* Bits of the logits can change between releases only when this number does (docs/numerics.md). */
uint32_t pe_numerics_epoch(void);

/* Instruction-set tiers compiled into this library, from "scalar" (index 0) upwards. NULL past the end. */
const char* pe_tier_name(size_t index);
/* 1 when this processor and operating system can run the tier, 0 when not or when the index is past the end. */
int pe_tier_available(size_t index);
/* The tier in use: the best available one, or the one named by the environment variable PYENGINE_ISA.
 * PE_E_CPU when that variable names a tier that is unknown or absent. `out` receives a static string. */
pe_status pe_tier_active(const char** out);

/* ---------------------------------------------------------------- the machine */

/* What this process may run on here and now: affinity mask and control groups included. */
typedef struct pe_cpus {
  uint32_t struct_size;
  uint32_t n_threads;     /* hardware threads */
  uint32_t n_cores;       /* physical cores */
  uint32_t n_performance; /* of those, cores of the fastest kind; all, where they are alike */
  double quota;           /* CPUs' worth of time that control groups grant; 0: no limit */
} pe_cpus;

void pe_cpus_init(pe_cpus* cpus);
pe_status pe_get_cpus(pe_cpus* out);

/* What n_threads threads of this machine can do at most, measured now: what every speed is to be compared with. */
typedef struct pe_limits {
  uint32_t struct_size;
  uint32_t n_threads;
  double clock_hz;    /* of a core: dependent additions a second */
  double read_bytes;  /* a second, all threads together, from memory: median of five rounds */
  double read_lowest; /* and their range */
  double read_highest;
  double
      int8_macs; /* multiplications a cycle and core by the best instructions that the tier in use has; 0: not known */
  double float_macs;
  double barrier_seconds; /* of one meeting of the threads */
} pe_limits;

void pe_limits_init(pe_limits* limits);
/* In one or two seconds, reading `bytes` of memory (1 MiB .. 64 GiB; far more than any cache holds) that are given back at
 * the end. PE_E_ARGUMENT (n_threads 1..512), PE_E_MEMORY, PE_E_CPU. */
pe_status pe_measure_limits(uint32_t n_threads, uint64_t bytes, pe_limits* out);

/* ---------------------------------------------------------------- tensor formats */

typedef struct pe_format {
  int32_t type;         /* the GGUF tensor type id */
  const char* name;     /* "F32", "Q4_K", ... */
  uint32_t block_size;  /* weights in a block; a row holds whole blocks */
  uint32_t block_bytes; /* bytes of a block */
  int32_t can_quantise; /* 1 when pe_quantise_rows writes this format */
} pe_format;

/* The formats this build reads, in the order of their type ids. PE_E_ARGUMENT past the end. */
pe_status pe_format_at(size_t index, pe_format* out);

/* rows x cols values: `src` packed blocks -> `dst` float32 [rows][cols]. cols: a multiple of the block size.
 * src_size and dst_count (floats) are checked against the shape. PE_E_ARGUMENT, PE_E_UNSUPPORTED. */
pe_status pe_dequantise_rows(int32_t type, const void* src, size_t src_size, size_t rows, size_t cols, float* dst,
                             size_t dst_count);

/* The reverse: the scales that store the weights with the least squared error, but for Q4_0, Q4_1, Q5_0, Q5_1 without
 * importance and Q8_0, whose bytes the format's reference defines. `importance` is NULL or [cols], finite and >= 0: what
 * the squared error of each column counts (an importance matrix's mean square of the activation). The bytes depend on
 * neither n_threads (0 means 1) nor the machine. PE_E_ARGUMENT, PE_E_UNSUPPORTED. */
pe_status pe_quantise_rows(int32_t type, const float* src, size_t src_count, size_t rows, size_t cols,
                           const float* importance, void* dst, size_t dst_size, uint32_t n_threads);

/* From one format to another: as pe_dequantise_rows of `src` and pe_quantise_rows of that, without the float32 matrix between
 * them. `lost` is NULL or [2] and receives sums over all values: of the squared errors of what `dst` holds, and of the squares
 * of the values. PE_E_ARGUMENT, PE_E_UNSUPPORTED. */
pe_status pe_convert_rows(int32_t src_type, const void* src, size_t src_size, int32_t type, size_t rows, size_t cols,
                          const float* importance, void* dst, size_t dst_size, double* lost, uint32_t n_threads);

/* y [n_tokens][rows] = x [n_tokens][cols] * W^T with one tier's kernels: the engine's own linear operation, for tests
 * and benchmarks. W is rows x cols in format `type`. PE_E_ARGUMENT, PE_E_UNSUPPORTED, PE_E_CPU, PE_E_MEMORY. */
pe_status pe_linear(const char* tier, int32_t type, const void* w, size_t w_size, size_t rows, size_t cols,
                    const float* x, size_t n_tokens, float* y);

/* y [n_heads][head_dim]: what the queries q [n_heads][head_dim] of one token, which share a KV head, get from n_keys keys and
 * values as a cache of kv_type (see pe_session_options) stores them, `size` bytes each; scores / sqrt(head_dim). The engine's
 * own attention on one thread, for tests and benchmarks. head_dim: a multiple of 32.
 * PE_E_ARGUMENT, PE_E_UNSUPPORTED, PE_E_CPU, PE_E_MEMORY. */
pe_status pe_attend(const char* tier, int32_t kv_type, const void* keys, const void* values, size_t size, size_t n_keys,
                    size_t head_dim, const float* q, size_t n_heads, float* y);

/* ---------------------------------------------------------------- choosing tokens */

/* What a sampler needs of a whole row of logits; the rest of it works on a few candidates. Same bits everywhere. */

/* The k largest of n logits, fewer when n < k: `ids` and `values` [k] receive them by ascending id, `found` how many.
 * Ties go to the lower id. k = 1 is greedy decoding. PE_E_NUMERIC when a logit is NaN or +infinity. */
pe_status pe_top_k(const float* logits, size_t n, size_t k, int32_t* ids, float* values, size_t* found);

/* y[i] = e^x[i] for x <= 0, less than 2 units in the last place off; below -700 the value at -700. `y` may be `x`. */
pe_status pe_exp(const double* x, size_t n, double* y);

/* The sum of e^(logit - peak), added from the first logit to the last; -infinity counts nothing. `ids` (ascending,
 * [n_replaced]) name logits to be replaced by `values` before; both may be NULL when n_replaced is 0.
 * PE_E_ARGUMENT when the ids are not ascending or reach n. */
pe_status pe_softmax_sum(const float* logits, size_t n, double peak, const int32_t* ids, const double* values,
                         size_t n_replaced, double* sum);

/* ---------------------------------------------------------------- GGUF files */

typedef struct pe_file pe_file;

/* Types of metadata values: the numbers of the GGUF format. */
typedef enum pe_value_type {
  PE_UINT8 = 0,
  PE_INT8 = 1,
  PE_UINT16 = 2,
  PE_INT16 = 3,
  PE_UINT32 = 4,
  PE_INT32 = 5,
  PE_FLOAT32 = 6,
  PE_BOOL = 7,
  PE_STRING = 8,
  PE_ARRAY = 9,
  PE_UINT64 = 10,
  PE_INT64 = 11,
  PE_FLOAT64 = 12
} pe_value_type;

/* One metadata entry. `data` is not aligned: copy before use. Little-endian, as in the file.
 *   scalar: the value, `size` bytes, count 1
 *   string: UTF-8 without a terminator, `size` bytes, count 1
 *   array of scalars: `count` packed elements of element_type
 *   array of strings: `count` times (uint64 length, bytes), `size` bytes together; already checked */
typedef struct pe_value {
  const char* key;
  pe_value_type type;
  pe_value_type element_type; /* of an array; equals `type` otherwise */
  uint64_t count;
  uint64_t size;
  const void* data;
} pe_value;

/* One tensor. dims[0] is the length of a row (fastest-moving), as GGUF counts. */
typedef struct pe_tensor {
  const char* name;
  int32_t type;
  uint32_t n_dims;
  uint64_t dims[4]; /* 1 past n_dims */
  uint64_t offset;  /* of the data, from the start of its file */
  uint64_t size;    /* bytes */
  uint32_t part;    /* which file of a split model, from 0 */
  const void* data; /* the mapped (or copied) bytes; NULL when the file was opened with PE_LOAD_HEADER */
} pe_tensor;

typedef enum pe_load {
  PE_LOAD_MMAP = 0, /* map the file: instant, shared between processes. If something else truncates the file while it is
                        in use, the process gets SIGBUS, as with any mapping, unless pe_guard_mapped_files was called */
  PE_LOAD_COPY = 1, /* read everything into private memory: immune to changes of the file */
  PE_LOAD_HEADER = 2 /* metadata and tensor table only, no tensor data */
} pe_load;

/* Opens and checks a whole GGUF file (v2 or v3, little-endian); for the first part of a split model
 * (-00001-of-0000N) all parts. PE_E_IO, PE_E_FORMAT, PE_E_UNSUPPORTED, PE_E_MEMORY. */
pe_status pe_file_open(const char* path, pe_load load, pe_file** out);
void pe_file_close(pe_file* file);

/* Guards the files that are mapped from now on against what others do to them meanwhile. A file that is cut, overwritten
 * in place or unreadable then is PE_E_IO "file_changed" from the next pe_session_eval that reads it (nothing of it counts,
 * and no eval of that model succeeds any more) instead of SIGBUS or garbage; replacing a file by rename, or deleting
 * it, harms nobody in any case. To that end every guarded file stays open, and a handler for SIGBUS is installed, once
 * and for the life of the process: it puts zeros in the place of a guarded mapping whose pages are gone, and passes every
 * other SIGBUS to the handler that was there before. A handler installed later must do the same with ours. Any thread
 * may call it, any number of times. On Windows, where nobody can change a mapped file, it does nothing. */
pe_status pe_guard_mapped_files(void);
/* Whether a guarded file is still what was opened: to be asked after reading `data` of its tensors, which are zeros once
 * it is not. Always PE_OK for files opened before pe_guard_mapped_files or otherwise than by mapping. PE_E_IO. */
pe_status pe_file_check(const pe_file* file);

uint32_t pe_file_version(const pe_file* file);
uint64_t pe_file_value_count(const pe_file* file);
uint64_t pe_file_tensor_count(const pe_file* file);
/* By position; PE_E_ARGUMENT past the end. */
pe_status pe_file_value_at(const pe_file* file, uint64_t index, pe_value* out);
pe_status pe_file_tensor_at(const pe_file* file, uint64_t index, pe_tensor* out);
/* By name; PE_E_ARGUMENT with code "not_found" when absent. */
pe_status pe_file_value(const pe_file* file, const char* key, pe_value* out);
pe_status pe_file_tensor(const pe_file* file, const char* name, pe_tensor* out);

/* ---------------------------------------------------------------- models */

typedef struct pe_model pe_model;

typedef struct pe_model_options {
  uint32_t struct_size;
  pe_load load;          /* PE_LOAD_MMAP (default) or PE_LOAD_COPY */
  float rope_attn_scale; /* > 0 overrides the attention scale of YaRN; 0 (default): from the file */
  /* Called on the opening thread with 0..1; a non-zero return stops with PE_E_CANCELLED. NULL (default): none. */
  int32_t (*progress)(void* user, float fraction);
  void* user;
  /* At most so many bytes of keys and values are kept of what the model's sessions let go, for later sessions whose texts
   * begin alike; see pe_session_reuse. Default 256 MiB; 0: nothing is kept, and sessions share nothing. */
  uint64_t prefix_bytes;
} pe_model_options;

typedef struct pe_model_info {
  uint32_t struct_size;
  const char* architecture; /* "llama", "qwen2", "qwen3" */
  uint32_t n_vocab;         /* columns of the logits */
  uint32_t n_ctx_train;     /* context the model was made for */
  uint32_t n_layers;
  uint32_t n_embd;
  uint32_t n_heads;
  uint32_t n_kv_heads;
  uint32_t head_dim_k;
  uint32_t head_dim_v;
  uint32_t n_ff;
  uint64_t n_params;
  uint64_t weight_bytes;
  const char* notes; /* lines a careful user should know (e.g. an assumed rope scale); "" when there are none */
} pe_model_info;

void pe_model_options_init(pe_model_options* options);
void pe_model_info_init(pe_model_info* info);

/* Opens a model for running: the file's checks, then the architecture's schema (every key, every tensor's shape and
 * type). `options` may be NULL. PE_E_IO, PE_E_FORMAT, PE_E_UNSUPPORTED, PE_E_MEMORY, PE_E_CANCELLED, PE_E_CPU.
 * On Linux, of a mapped model of 64 MiB or more, a thread maps the pages from then on, and has them read, before they are
 * needed; it ends when all are, or with the model. A model that memory cannot hold is left alone. */
pe_status pe_model_open(const char* path, const pe_model_options* options, pe_model** out);
/* Sessions keep the model alive: closing first is safe, the memory goes with the last session. */
void pe_model_close(pe_model* model);
pe_status pe_model_get_info(const pe_model* model, pe_model_info* out);
/* Tells models apart by what keys and values depend on: the numbers of the configuration (with rope_attn_scale), and of each
 * tensor its name, type, shape and a sample of its bytes. Not by names or templates. The first call reads a few pages of each
 * tensor. It finds the wrong file; it proves nothing against one made to deceive. PE_E_ARGUMENT, PE_E_IO
 * (a guarded file has changed). */
pe_status pe_model_fingerprint(const pe_model* model, uint64_t* out);
/* The file behind the model, for its metadata. Dies with the model: do not close it. */
const pe_file* pe_model_file(const pe_model* model);

/* ---------------------------------------------------------------- sessions */

typedef struct pe_session pe_session;

typedef struct pe_session_options {
  uint32_t struct_size;
  uint32_t n_ctx;     /* positions of the KV cache; 0 (default): min(the model's context, 4096) */
  uint32_t n_threads; /* threads when one token is evaluated, at most 512; 0 (default): one per usable physical core
                                 of the fastest kind. Fewer take part where that is quicker: where a model is tiny, or other
                                 programs hold the cores. No effect on any logit */
  uint32_t n_threads_prefill; /* threads when several are; 0 (default): as n_threads */
  int32_t kv_type;            /* tensor type of the cache: 1 = F16 (default), 0 = F32, 8 = Q8_0: about half of F16's
                                 memory, slightly different logits; head dimensions must be multiples of 32 */
  uint32_t n_chunk;           /* tokens per prefill step, at most 1024; 0 (default): 256. No effect on any logit */
} pe_session_options;

typedef enum pe_logits {
  PE_LOGITS_NONE = 0, /* only fill the cache */
  PE_LOGITS_LAST = 1, /* one row: the last token's */
  PE_LOGITS_ALL = 2   /* one row per token */
} pe_logits;

void pe_session_options_init(pe_session_options* options);
/* What n_threads 0 stands for here and now: affinity mask and control groups included. */
uint32_t pe_default_threads(void);

/* Memory a session with these options will allocate, in bytes: exact, computed by the code that allocates.
 * PE_E_ARGUMENT, PE_E_UNSUPPORTED (cache type), PE_E_MEMORY. */
pe_status pe_session_bytes(const pe_model* model, const pe_session_options* options, uint64_t* kv_bytes,
                           uint64_t* scratch_bytes);

/* The sizes of a model that its sessions' memory depends on, for planning without a file. */
typedef struct pe_shape {
  uint32_t struct_size;
  uint32_t n_ctx_train; /* what n_ctx 0 of the options refers to */
  uint32_t n_layers;
  uint32_t n_embd;
  uint32_t n_heads;
  uint32_t n_kv_heads; /* divides n_heads */
  uint32_t head_dim_k;
  uint32_t head_dim_v;
  uint32_t n_ff;
  uint32_t rope_dims; /* 0 (default): head_dim_k */
} pe_shape;

void pe_shape_init(pe_shape* shape);
/* As pe_session_bytes, for a model of this shape. PE_E_ARGUMENT, PE_E_UNSUPPORTED, PE_E_MEMORY. */
pe_status pe_shape_bytes(const pe_shape* shape, const pe_session_options* options, uint64_t* kv_bytes,
                         uint64_t* scratch_bytes);

/* `options` may be NULL. PE_E_ARGUMENT, PE_E_UNSUPPORTED (cache type, or head dimensions that do not fit it), PE_E_MEMORY. */
pe_status pe_session_create(pe_model* model, const pe_session_options* options, pe_session** out);
/* May be called while another thread is inside a call on the session: that call is cancelled (PE_E_CANCELLED, unless it was
 * about to succeed) and waited for. No call on the session may begin once this one has. */
void pe_session_free(pe_session* session);

/* Evaluates n tokens after those already in the session and writes the asked rows, n_vocab floats each, to `logits`
 * (NULL with PE_LOGITS_NONE). `logits_count` is the number of floats there is room for.
 * The logits depend on the file and the ids alone: not on threads, chunks, earlier truncations or the processor.
 * Failure keeps the session usable: pe_session_length says how many tokens it holds (a cancelled eval keeps the whole
 * chunks that were finished, any other failure none of its tokens).
 * PE_E_ARGUMENT, PE_E_CONTEXT_FULL (nothing evaluated), PE_E_CANCELLED, PE_E_NUMERIC, PE_E_IO (see
 * pe_guard_mapped_files). */
pe_status pe_session_eval(pe_session* session, const int32_t* tokens, size_t n, pe_logits want, float* logits,
                          size_t logits_count);

/* Tokens in the session, and their ids (valid until the next call that changes the session). */
size_t pe_session_length(const pe_session* session);
const int32_t* pe_session_tokens(const pe_session* session);
uint32_t pe_session_context(const pe_session* session);
uint32_t pe_session_threads(const pe_session* session);

/* Forgets everything after the first n tokens. PE_E_ARGUMENT when the session holds fewer. */
pe_status pe_session_truncate(pe_session* session, size_t n);

/* Prepares for a prompt: makes the session hold the longest known beginning of `tokens` (at most n - 1, so that
 * evaluating the rest gives logits) and nothing else, and reports its length. Known is what the session itself holds, what
 * other sessions of the same model with the same cache type hold (they may be in use), and what such sessions let go, as
 * far as the model's prefix_bytes allow. No effect on any logit. PE_E_ARGUMENT for n = 0. */
pe_status pe_session_reuse(pe_session* session, const int32_t* tokens, size_t n, size_t* kept);

/* Saving what a session holds, so that another one - tomorrow, in another process - goes on without reading the text again,
 * with the same bits as if it had never stopped.
 *
 * A state is the tokens of some consecutive positions with their keys and values, and says of itself which model, cache type
 * and numerics epoch they are of, which tokens come before them, and whether it is whole. A long text may be saved in pieces
 * and restored piece by piece, in order; what is in memory at once is then one piece. */

/* Bytes of a state of n tokens of this session, 1 <= n <= its context. PE_E_ARGUMENT. */
pe_status pe_session_state_bytes(const pe_session* session, size_t n, uint64_t* bytes);
/* Writes the state of positions first .. first + n - 1, which the session holds, to `data`; `size` is what
 * pe_session_state_bytes says. PE_E_ARGUMENT. */
pe_status pe_session_save(pe_session* session, size_t first, size_t n, void* data, size_t size);
/* Appends the tokens of a state, with their keys and values, to the session, which holds exactly the tokens that came before
 * them (none, for a state from position 0). Everything is checked first; on failure the session is as it was:
 * PE_E_FORMAT when it is no state, cut, damaged or of another version; PE_E_ARGUMENT when it is of another model, another
 * cache type, or follows other tokens; PE_E_UNSUPPORTED when it is of another numerics epoch; PE_E_CONTEXT_FULL.
 * The keys are believed as the weights of a model are: a state made to deceive gives other logits, never a crash. */
pe_status pe_session_restore(pe_session* session, const void* data, size_t size);

/* What one matrix of the model was multiplied with, added up. */
typedef struct pe_input {
  uint32_t struct_size;
  const char* tensor;    /* the matrix: "blk.0.attn_q.weight" ... "output.weight" (its name in the file) */
  uint64_t n_tokens;     /* how many rows of activations were added */
  uint64_t n_cols;       /* columns of the matrix */
  const double* squares; /* [n_cols] sum over the tokens of x[col]^2: what an importance matrix holds */
} pe_input;

void pe_input_init(pe_input* input);

/* on = 1: from now on every eval adds up the squares of what each matrix reads, starting at zero; 0: no longer (the
 * default), and the sums are gone. No effect on any logit; the sums are the same bits for any number of threads and any
 * chunk. The matrix of the logits sees those tokens whose logits are asked for. An eval that fails after it began sets
 * all sums to zero. PE_E_ARGUMENT, PE_E_MEMORY. */
pe_status pe_session_observe(pe_session* session, int32_t on);
/* By position, in the order of the forward pass; the pointers are valid until the next call that changes the session.
 * PE_E_ARGUMENT past the end, and when the session is not observed. */
pe_status pe_session_input_at(const pe_session* session, size_t index, pe_input* out);

/* Any thread: makes the running eval, or when none runs the next one, return PE_E_CANCELLED within 250 ms. That return
 * consumes the request; pe_session_clear_cancel takes back one that no eval has met. NULL is ignored. */
void pe_session_cancel(pe_session* session);
void pe_session_clear_cancel(pe_session* session);
/* PE_E_CANCELLED, consuming the request, when a cancel is waiting for the next eval: for programs that work between
 * evals (a sampler, tokens already verified) and want to stop as promptly. */
pe_status pe_session_check_cancel(pe_session* session);

#ifdef __cplusplus
}
#endif

#if defined(__GNUC__) && !defined(_WIN32)
#pragma GCC visibility pop
#endif

#endif /* PYENGINE_H */
