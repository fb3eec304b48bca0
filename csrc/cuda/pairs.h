// The launchers in pairs.cu; their arguments are those of csrc/common/pair_arguments.h.
// Reads and writes nothing: every pointer is device memory of the caller.
// Free of CUDA's headers, so that pair_bindings.cpp is plain C++.
#pragma once

#include "common/pair_arguments.h"

namespace fastloss::cuda {

// Each returns null, or the text of the error that stopped the launch.
const char* segment_sum(const SegmentSum<float>& a, void* stream);
const char* segment_expand(const SegmentExpand<float>& a, void* stream);
const char* pair_loss(const PairLoss<float, float>& a, void* stream);
const char* unpaired_loss(const UnpairedLoss<float, float>& a, void* stream);

}  // namespace fastloss::cuda
