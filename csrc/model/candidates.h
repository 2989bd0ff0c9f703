// What a sampler needs of a whole row of logits (n_vocab floats), so that the rest of it works on a few candidates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pe {

struct Candidate {
  int32_t id;
  float logit;
};

// The k largest of n logits (all when k >= n), ids ascending; ties go to the lower id, and -0 ties with 0.
// Throws Error kNumeric when a logit is NaN or +infinity.
std::vector<Candidate> top_candidates(const float* logits, size_t n, size_t k);

// y[i] = e^x[i] for x <= 0, error below 2 units in the last place; below -700 the value at -700. The operations are
// IEEE additions, multiplications and roundings in a fixed order, so every machine gives the same bits. May be in place.
void exp_of_nonpositive(const double* x, size_t n, double* y);

// The sum of e^(logit - peak) over the logits above -infinity, added from the first to the last, in double precision.
// `ids` (ascending) name logits to be replaced by `values` first.
double softmax_sum(const float* logits, size_t n, double peak, const int32_t* ids, const double* values,
                   size_t n_replaced);

}  // namespace pe
