// Writes the logits of a prompt, through the C interface alone, for comparison with golden hashes on other processors.
//
//   logits_check MODEL KV_TYPE THREADS CHUNK < IDS > LOGITS
//
// KV_TYPE is a tensor type (0 F32, 1 F16, 8 Q8_0). IDS are decimal; LOGITS are float32 [ids][n_vocab] as they lie in memory.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "api/pyengine.h"

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  std::vector<int32_t> ids;
  for (int id; std::scanf("%d", &id) == 1;) ids.push_back(id);

  pe_model* model = nullptr;
  pe_session* session = nullptr;
  pe_model_info info;
  pe_model_info_init(&info);
  pe_session_options options;
  pe_session_options_init(&options);
  options.n_ctx = static_cast<uint32_t>(ids.size());
  options.kv_type = std::atoi(argv[2]);
  options.n_threads = static_cast<uint32_t>(std::atoi(argv[3]));
  options.n_chunk = static_cast<uint32_t>(std::atoi(argv[4]));
  std::vector<float> logits;
  bool good = pe_model_open(argv[1], nullptr, &model) == PE_OK && pe_model_get_info(model, &info) == PE_OK &&
              pe_session_create(model, &options, &session) == PE_OK;
  if (good) {
    logits.resize(ids.size() * info.n_vocab);
    good = pe_session_eval(session, ids.data(), ids.size(), PE_LOGITS_ALL, logits.data(), logits.size()) == PE_OK;
  }
  if (!good) std::fprintf(stderr, "%s: %s\n", argv[1], pe_last_error()->message);
  pe_session_free(session);
  pe_model_close(model);
  if (!good) return 1;
  return std::fwrite(logits.data(), sizeof(float), logits.size(), stdout) == logits.size() ? 0 : 1;
}
