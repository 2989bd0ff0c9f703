// The operations of a decoder block, spread over a team: what forward.cc is written in. Each ends in a barrier, but that
// norm and quantise of a single token are done by every thread for itself and end at once.
#pragma once

#include <array>

#include "model/forward.h"

namespace pe {

// One matrix of a linear operation: y[t] = W h[t] (+ bias), and with `residual` also x[t] += y[t].
struct Job {
  const Tensor* w;
  const Vector* bias;  // nullptr or empty: none
  Scratch::Rows y;
  bool residual = false;
};

// The activation forms that a set of tensors reads: bit i stands for Act i.
template <typename... T>
unsigned acts_of(const T&... tensors) {
  return ((1u << static_cast<int>(tensors.act)) | ...);
}

// Whether the batch is cancelled. A task that meets it does nothing: the result is going to be thrown away, also when
// the request is taken back meanwhile.
inline bool cancelled(Batch& b) {
  if (b.spoilt.load(std::memory_order_relaxed)) return true;
  if (!b.cancel.load(std::memory_order_relaxed)) return false;
  b.spoilt.store(true, std::memory_order_relaxed);
  return true;
}

void embed(Team& team, Batch& b);  // x = embeddings, angles
void norm(Team& team, Batch& b, const Vector& w, unsigned acts,
          size_t first);                                           // h = rms_norm(x), quantised; tokens first ..
void quantise(Team& team, Batch& b, size_t n, unsigned acts);      // activation forms of h[:, :n]
void linear(Team& team, Batch& b, const Job* jobs, size_t count);  // from h, one row space for all jobs
void rotate_and_store(Team& team, Batch& b, size_t layer);         // q/k norm, rope, KV cache write
void attend(Team& team, Batch& b, size_t layer);                   // h = attention(q, cache)
void gate_up(Team& team, Batch& b, const Tensor& gate, const Tensor& up,
             Act act);                             // gate = silu(gate h) * (up h), and its form `act`
void down(Team& team, Batch& b, const Tensor& w);  // x += w gate
void logits(Team& team, Batch& b);                 // from h of tokens first_row ..

template <size_t N>
void linear(Team& team, Batch& b, const std::array<Job, N>& jobs) {
  linear(team, b, jobs.data(), N);
}

}  // namespace pe
