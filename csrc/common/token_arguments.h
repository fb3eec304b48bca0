// The arguments of value_loss and kl_estimate (docs/sequences.md, "Single tokens") as plain structs, shared
// by the CPU's and CUDA's kernels. Reads and writes nothing: every pointer is the caller's memory.
#pragma once

#include <cstdint>

#include "common/codes.h"

namespace fastloss {

struct KlEstimate {
  const void *logprobs, *ref;  // acc [n]
  const void* upstream;        // acc [n], or null
  int64_t n;
  policy::KlKind kind;
  void* out;  // acc [n]: the estimate, or upstream times its derivative for logprobs
};

// The sums of one part: kValuePart tokens that follow each other. The mean and the squares of the returns,
// and of what the values miss of them, are counted from a number of the part itself, so that they keep their
// digits.
struct ValuePart {
  double tokens, clipped, loss, values;
  double returns_mean, returns_squares;  // squares: Σ (x - mean)²
  double missed_mean, missed_squares;
};
constexpr int64_t kValuePart = 2048;

struct ValueLoss {
  const void *values, *returns;  // acc [n]
  const void *old, *share;       // acc [n], or null
  const uint8_t* mask;           // [n]
  int64_t n;
  double clip_range;  // with `old`
  const void* scale;  // acc [1]: what Σ share · loss is multiplied by; null: 1 / max(tokens, 1)
  void *grad, *out;   // acc [n], not yet times the scale; acc [kOuts]
  ValuePart* parts;   // [ceil(n / kValuePart)]
  unsigned* ticket;   // a GPU's: 0 before and after a launch

  int64_t count() const { return (n + kValuePart - 1) / kValuePart; }
};

}  // namespace fastloss
