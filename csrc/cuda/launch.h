// What the launchers share: an error's text, and the storage type of a dtype code.
// Reads and writes nothing.
// Host code alone.
#pragma once

#include "args.h"
#include "dtype.h"

namespace fastloss::cuda {

inline const char* text_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline const char* unusable_dtype(int dtype) {
  return dtype < kFloat32 || dtype > kFloat16 ? "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)"
                                              : nullptr;
}

// Calls f with a null pointer of the storage type.
template <class F>
const char* with_dtype(int dtype, F f) {
  if (dtype == kFloat32) return f(static_cast<float*>(nullptr));
  if (dtype == kBFloat16) return f(static_cast<bfloat16*>(nullptr));
  return f(static_cast<float16*>(nullptr));
}

}  // namespace fastloss::cuda
