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

// Calls f with a null pointer of the storage type.
template <class F>
const char* with_dtype(int dtype, F f) {
  switch (Dtype(dtype)) {
    case kFloat32:
      return f(static_cast<float*>(nullptr));
    case kBFloat16:
      return f(static_cast<bfloat16*>(nullptr));
    case kFloat16:
      return f(static_cast<float16*>(nullptr));
    case kFloat64:
      return "there is no kernel for float64";
  }
  return "there is no such dtype";
}

}  // namespace fastloss::cuda
