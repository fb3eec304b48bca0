// The launcher in divergences.cu; its arguments are those of csrc/common/divergence_arguments.h.
// Reads and writes nothing: every pointer is device memory of the caller.
// Free of CUDA's headers, so that divergence_bindings.cpp is plain C++.
#pragma once

#include "common/divergence_arguments.h"

namespace fastloss::cuda {

using RowDivergence = RowDivergenceOf<float, float>;

// Returns null, or the text of the error that stopped the launch.
const char* row_divergence(const RowDivergence& a, void* stream);

}  // namespace fastloss::cuda
