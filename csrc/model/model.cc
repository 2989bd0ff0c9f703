#include "model/model.h"

#include "base/error.h"
#include "base/fp_env.h"
#include "base/text.h"

namespace pe {

const KernelTable& active_kernels(Tier* tier) {
  const char* wanted = nullptr;
  const KernelTable* table = kernels_active(tier, &wanted);
  if (table) return *table;
  std::string have;
  for (int i = 0; i < kTiers; ++i)
    if (tier_available(static_cast<Tier>(i)))
      have += std::string(have.empty() ? "" : ", ") + tier_name(static_cast<Tier>(i));
  throw Error(
      Status::kCpu, "tier_unavailable",
      "PYENGINE_ISA asks for \"" + printable(wanted) + "\", which this processor or build lacks; available: " + have,
      "PYENGINE_ISA");
}

std::shared_ptr<const Model> Model::open(const std::string& path, const ModelOptions& options) {
  const FpEnv fp_env;  // rope frequencies are computed here
  const std::shared_ptr<Model> m(new Model);
  Tier tier;
  m->kernels_ = &active_kernels(&tier);
  const auto report = [&options](float fraction) {
    if (options.progress && options.progress(fraction))
      throw Error(Status::kCancelled, "cancelled", "opening the model was cancelled");
  };
  report(0.0f);
  m->file_ = gguf::File::open(path, options.load, options.progress);
  m->config_ = read_config(*m->file_, options.rope_attn_scale);
  m->weights_ = bind_weights(*m->file_, m->config_);
  for (const gguf::TensorInfo& t : m->file_->tensors()) {
    m->n_params_ += t.dims[0] * t.dims[1] * t.dims[2] * t.dims[3];  // the reader has checked the product
    m->weight_bytes_ += t.size;
  }
  report(1.0f);
  return m;
}

}  // namespace pe
