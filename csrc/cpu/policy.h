// policy_loss as the bindings see it, and the table that one ISA exports.
// Reads and writes what docs/sequences.md says.
// Apart from the kernels' args.h: nothing here concerns rows of logits.
#pragma once

#include "common/policy_arguments.h"

namespace fastloss {

// Sequences [begin, end): their gradients, and their rows of call.sums.
struct PolicyKernels {
  int64_t (*count_tokens)(const uint8_t* mask, int64_t n);
  void (*policy_loss)(const policy::Call&, int dtype, int64_t begin, int64_t end);
};

void policy_loss(const policy::Call& call, int dtype, int64_t threads);

}  // namespace fastloss
