// A model ready to run: the checked file, its numbers, its weights. Immutable, shared by any number of sessions.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>

#include "gguf/reader.h"
#include "kernels/kernels.h"
#include "model/weights.h"
#include "runtime/map_ahead.h"

namespace pe {

struct ModelOptions {
  gguf::Load load = gguf::Load::kMap;
  float rope_attn_scale = 0;            // > 0 overrides the file
  std::function<bool(float)> progress;  // 0..1; true stops with Error kCancelled
};

// The kernels in use, and their tier. Throws Error kCpu when PYENGINE_ISA names a tier that is unknown or absent.
const KernelTable& active_kernels(Tier* tier);

class Model {
 public:
  // Throws Error: kIo, kFormat, kUnsupported, kMemory, kCancelled, kCpu.
  static std::shared_ptr<const Model> open(const std::string& path, const ModelOptions& options);
  // Of a file that is open already, with its tensors' data. Throws Error: kFormat, kUnsupported, kMemory, kCpu.
  static std::shared_ptr<const Model> of(std::shared_ptr<const gguf::File> file, float rope_attn_scale = 0);

  const std::shared_ptr<const gguf::File>& file() const { return file_; }
  const ModelConfig& config() const { return config_; }
  const Weights& weights() const { return weights_; }
  const KernelTable& kernels() const { return *kernels_; }
  uint64_t n_params() const { return n_params_; }
  uint64_t weight_bytes() const { return weight_bytes_; }
  // Of what keys and values depend on: the numbers of the configuration, and of each tensor its name, type, shape and a
  // sample of its bytes. The first call reads those samples, a few pages a tensor.
  uint64_t fingerprint() const;
  // Maps the weights meanwhile; to be helped by whoever is about to read them.
  const MapAhead& mapper() const { return *mapper_; }

 private:
  Model() = default;
  std::shared_ptr<const gguf::File> file_;
  ModelConfig config_;
  Weights weights_;
  const KernelTable* kernels_ = nullptr;
  uint64_t n_params_ = 0;
  uint64_t weight_bytes_ = 0;
  mutable std::atomic<uint64_t> fingerprint_{0};  // 0: not yet known
  std::unique_ptr<const MapAhead> mapper_;        // ends before the file does
};

}  // namespace pe
