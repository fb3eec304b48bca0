// What a reduction needs beside the row kernels: the total of the rows' losses, one over how many count.
// Reads and writes nothing: every pointer is device memory of the caller.
// Free of CUDA's headers, as args.h is.
#pragma once

#include <cstdint>

namespace fastloss::cuda {

// *out = factor * *factor_tensor * the sum of n values; an absent factor_tensor is 1.
struct Total {
  const float* values;
  int64_t n;
  float factor;
  const float* factor_tensor;
  float* out;
};

// *out = 1 / (how many of n targets are not ignore_index).
struct Count {
  const int64_t* target;
  int64_t n, ignore_index;
  float* out;
};

// Each returns null, or the text of the error that stopped the launch.
const char* sum_rows(const Total& a, void* stream);
const char* reciprocal_count(const Count& a, void* stream);

}  // namespace fastloss::cuda
