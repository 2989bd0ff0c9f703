// What a model's matrices are multiplied with, added up: the stuff of importance matrices.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "model/weights.h"

namespace pe {

class InputSums {
 public:
  struct Sums {
    std::vector<double> squares;  // [cols], sum of x[col]^2, tokens ascending: threads and chunks do not matter
    uint64_t tokens = 0;
  };

  explicit InputSums(const Weights& weights);

  // Tokens' inputs of `first` and of the matrices that read the same ones. x: [tokens] rows, `stride` bytes apart.
  // Called by one thread at a time; allocates nothing.
  void add(const Tensor& first, const void* x, size_t stride, size_t tokens);
  void clear();

  // The matrices in the order of the forward pass.
  size_t size() const { return matrices_.size(); }
  const Tensor& matrix(size_t i) const { return *matrices_[i].tensor; }
  const Sums& of(size_t i) const { return sums_[matrices_[i].sums]; }

 private:
  struct Matrix {
    const Tensor* tensor;
    size_t sums;
  };
  std::vector<Matrix> matrices_;
  std::vector<Sums> sums_;                           // one for each different input
  std::unordered_map<const Tensor*, size_t> index_;  // of the first matrix that reads it
};

}  // namespace pe
