// The C interface of what samplers need of a row of logits.

#include "api/last_error.h"
#include "api/pyengine.h"
#include "base/fp_env.h"
#include "model/candidates.h"

using namespace pe;

pe_status pe_top_k(const float* logits, size_t n, size_t k, int32_t* ids, float* values, size_t* found) {
  return guarded([&] {
    not_null(found, "found") = 0;
    not_null(logits, "logits");
    if (k) {
      not_null(ids, "ids");
      not_null(values, "values");
    }
    if (n == 0 || n > INT32_MAX) bad_argument("n", "must be 1 .. 2^31 - 1");
    const FpEnv fp_env;
    for (const Candidate& c : top_candidates(logits, n, k)) {
      ids[*found] = c.id;
      values[(*found)++] = c.logit;
    }
  });
}

pe_status pe_exp(const double* x, size_t n, double* y) {
  return guarded([&] {
    if (n == 0) return;
    const FpEnv fp_env;
    exp_of_nonpositive(&not_null(x, "x"), n, &not_null(y, "y"));
  });
}

pe_status pe_softmax_sum(const float* logits, size_t n, double peak, const int32_t* ids, const double* values,
                         size_t n_replaced, double* sum) {
  return guarded([&] {
    not_null(sum, "sum") = 0.0;
    if (n) not_null(logits, "logits");
    if (n_replaced) {
      not_null(ids, "ids");
      not_null(values, "values");
    }
    for (size_t i = 0; i < n_replaced; ++i)
      if (ids[i] < 0 || static_cast<size_t>(ids[i]) >= n || (i && ids[i] <= ids[i - 1]))
        bad_argument("ids", "must ascend and lie within the logits");
    const FpEnv fp_env;
    *sum = softmax_sum(logits, n, peak, ids, values, n_replaced);
  });
}
