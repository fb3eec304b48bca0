// value_loss and kl_estimate as the bindings see them, and the table that one ISA exports.
// Reads and writes what docs/sequences.md says.
// Apart from policy.h: here no token belongs to a sequence.
#pragma once

#include "common/token_arguments.h"

namespace fastloss {

struct TokenKernels {
  // Parts [begin, end): their gradients and their sums.
  void (*value_loss)(const ValueLoss&, int dtype, int64_t begin, int64_t end);
  void (*finish_value)(const ValueLoss&, int dtype);
  // Tokens [begin, end).
  void (*kl_estimate)(const KlEstimate&, int dtype, int64_t begin, int64_t end);
};

void value_loss(const ValueLoss& call, int dtype, int64_t threads);
void kl_estimate(const KlEstimate& call, int dtype, int64_t threads);

}  // namespace fastloss
