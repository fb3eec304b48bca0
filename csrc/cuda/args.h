// The arguments of the functions of docs/engine.md as plain structs; the launchers are in rows.cu, scale.cu.
// Reads and writes nothing: every pointer is device memory of the caller.
// Free of CUDA's headers, so that bindings.cpp is plain C++ and the emulated build shares it unchanged.
#pragma once

#include <cstdint>

#include "common/row_arguments.h"

namespace fastloss::cuda {

using Logits = LogitsOf<float, float>;
using Stats = StatsOf<float>;
using Coefficients = CoefficientsOf<float>;

struct CrossEntropy {
  const float* w;
  int64_t w_row_stride;
  LossTermsOf<float> terms;
  float grad_scale;
  const float* grad_scale_ptr;
  void* grad;
  int64_t grad_row_stride;
};

struct Scaling {
  void* x;
  int dtype;
  int64_t rows, width, row_stride;
  const float* scale;  // one number
};

// Each returns null, or the text of the error that stopped the launch.
const char* row_cross_entropy(const Logits& in, const CrossEntropy& ce, const Stats& out, void* stream);
const char* row_stats(const Logits& in, const Stats& out, void* stream);
const char* row_grad(const Logits& in, const Coefficients& k, void* stream);
const char* scale_in_place(const Scaling& a, void* stream);
// Why no kernel can run on the current device: an architecture that was not compiled, a driver older than the
// runtime.
const char* why_not();

}  // namespace fastloss::cuda
