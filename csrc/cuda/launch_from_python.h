// A launch as a binding makes it: without the GIL, and an exception where it failed.
// Reads and writes nothing.
#pragma once

#include "common/bindings.h"

namespace fastloss::cuda {

// `run` returns null, or the text of the error that stopped the launch.
template <class Run>
void launch(Run run) {
  const char* error = nullptr;
  {
    const ReleaseGil unlocked(true);
    error = run();
  }
  if (error) throw std::runtime_error(std::string("fastloss CUDA kernel: ") + error);
}

// Pairs, policies and scans are computed in float32 alone.
inline void expect_float32(int code) {
  if (code_of<Dtype>("dtype", code) != kFloat32)
    throw std::invalid_argument("dtype: expected 0 (float32), got " + std::to_string(code) + " (" +
                                kDtypeNames[code] + ")");
}

}  // namespace fastloss::cuda
