#include "model/inputs.h"

#include <algorithm>
#include <initializer_list>

namespace pe {

InputSums::InputSums(const Weights& weights) {
  const auto input = [this](std::initializer_list<const Tensor*> readers) {
    index_.emplace(*readers.begin(), sums_.size());
    for (const Tensor* tensor : readers) matrices_.push_back({tensor, sums_.size()});
    sums_.push_back({std::vector<double>((*readers.begin())->cols), 0});
  };
  for (const LayerWeights& w : weights.layers) {
    input({&w.wq, &w.wk, &w.wv});
    input({&w.wo});
    input({&w.gate, &w.up});
    input({&w.down});
  }
  input({&weights.output});
}

void InputSums::add(const Tensor& first, const void* x, size_t stride, size_t tokens) {
  Sums& sums = sums_[index_.find(&first)->second];
  for (size_t t = 0; t < tokens; ++t) {
    const auto* row = reinterpret_cast<const float*>(static_cast<const uint8_t*>(x) + t * stride);
    for (size_t i = 0; i < sums.squares.size(); ++i) {
      const auto value = static_cast<double>(row[i]);
      sums.squares[i] += value * value;  // the product is exact
    }
  }
  sums.tokens += tokens;
}

void InputSums::clear() {
  for (Sums& sums : sums_) {
    std::fill(sums.squares.begin(), sums.squares.end(), 0.0);
    sums.tokens = 0;
  }
}

}  // namespace pe
