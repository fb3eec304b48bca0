// The launcher in exponentials.cu and its arguments: row_exponentials of docs/engine.md.
// Reads and writes nothing: every pointer is device memory of the caller.
// Free of CUDA's headers, as args.h is.
#pragma once

#include <cstdint>

#include "args.h"

namespace fastloss::cuda {

// What is made of each row beside its logits, which are overwritten.
struct Exponentials {
  void* out;       // the logits themselves, writable
  const float* w;  // class weights [vocab] or null
  LossTermsOf<float> terms;
  float factor;
  const float* factor_tensor;
  float *loss, *lse_parts, *multiplier, *residue;  // [rows], [rows, 2], [rows], [rows]
  uint8_t* rough;                                  // [rows]
};

// Returns null, or the text of the error that stopped the launch.
const char* row_exponentials(const Logits& in, const Exponentials& a, void* stream);

}  // namespace fastloss::cuda
