// The launchers of policy.cu, scan.cu and tokens.cu.
// Reads and writes nothing: every pointer is device memory of the caller.
// Free of CUDA's headers, as args.h.
#pragma once

#include "common/policy_arguments.h"
#include "common/scan_arguments.h"
#include "common/token_arguments.h"

namespace fastloss::cuda {

// Each returns null, or the text of the error that stopped the launch.
const char* policy_loss(const policy::Call& call, void* stream);
const char* scan(const Scan& a, void* stream);
const char* value_loss(const ValueLoss& call, void* stream);
const char* kl_estimate(const KlEstimate& call, void* stream);

}  // namespace fastloss::cuda
