/* A host in C: loads a model, evaluates a prompt of ids, prints greedy ids, saves and restores. Compiled by
 * tests/api/test_embedding.py against the installed header and library alone.   usage: embed MODEL COUNT ID... */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pyengine.h"

static int fail(const char* what) {
  const pe_error* e = pe_last_error();
  fprintf(stderr, "%s: %d %s %s\n", what, (int)e->status, e->code, e->message);
  return 1;
}

int main(int argc, char** argv) {
  pe_model* model = NULL;
  pe_session* session = NULL;
  pe_session* restored = NULL;
  unsigned char* state;
  uint64_t state_bytes = 0;
  pe_session_options options;
  pe_model_info info;
  int32_t ids[256];
  float *logits, *again;
  int count, i;
  size_t n = 0;

  if (argc < 4) return 2;
  count = atoi(argv[2]);
  for (i = 3; i < argc; ++i) ids[n++] = (int32_t)atoi(argv[i]);

  if (pe_model_open(argv[1], NULL, &model) != PE_OK) return fail("open");
  pe_model_info_init(&info);
  if (pe_model_get_info(model, &info) != PE_OK) return fail("info");
  pe_session_options_init(&options);
  options.n_ctx = 256;
  options.n_threads = 2;
  if (pe_session_create(model, &options, &session) != PE_OK) return fail("session");
  if (pe_session_create(model, &options, &restored) != PE_OK) return fail("second session");
  pe_model_close(model); /* the sessions keep it alive */

  logits = (float*)malloc(info.n_vocab * sizeof *logits);
  if (!logits) return 1;
  for (i = 0; i < count; ++i) {
    uint32_t k, best = 0;
    if (pe_session_eval(session, ids, n, PE_LOGITS_LAST, logits, info.n_vocab) != PE_OK) return fail("eval");
    for (k = 1; k < info.n_vocab; ++k)
      if (logits[k] > logits[best]) best = k;
    printf("%u\n", (unsigned)best);
    ids[0] = (int32_t)best;
    n = 1;
  }

  /* what the session holds, saved and restored, goes on with the same logits */
  if (pe_session_state_bytes(session, pe_session_length(session), &state_bytes) != PE_OK) return fail("state size");
  state = (unsigned char*)malloc((size_t)state_bytes);
  if (!state) return 1;
  if (pe_session_save(session, 0, pe_session_length(session), state, (size_t)state_bytes) != PE_OK) return fail("save");
  state[state_bytes / 2] ^= 1;
  if (pe_session_restore(restored, state, (size_t)state_bytes) != PE_E_FORMAT) return 5;
  state[state_bytes / 2] ^= 1;
  if (pe_session_restore(restored, state, (size_t)state_bytes) != PE_OK) return fail("restore");
  if (pe_session_length(restored) != pe_session_length(session)) return 6;
  if (pe_session_eval(session, ids, 1, PE_LOGITS_LAST, logits, info.n_vocab) != PE_OK) return fail("eval");
  again = (float*)malloc(info.n_vocab * sizeof *again);
  if (!again) return 1;
  if (pe_session_eval(restored, ids, 1, PE_LOGITS_LAST, again, info.n_vocab) != PE_OK) return fail("eval restored");
  if (memcmp(logits, again, info.n_vocab * sizeof *again) != 0) return 7;
  free(state);
  free(again);
  pe_session_free(restored);

  /* failures leave outputs empty and describe themselves */
  if (pe_model_open("no such file", NULL, &model) != PE_E_IO || model != NULL) return 3;
  if (pe_last_error()->status != PE_E_IO || pe_last_error()->message[0] == '\0') return 4;
  free(logits);
  pe_session_free(session);
  pe_session_free(NULL);
  return 0;
}
