// row_divergence on the CPU: its arguments, and what one ISA exports.
// Reads and writes nothing: every pointer is the caller's memory.
// Plain structs, because divergences.cpp is compiled once per instruction set.
#pragma once

#include "common/divergence_arguments.h"

namespace fastloss {

using RowDivergence = RowDivergenceOf<void, double>;

// Rows [begin, end) with `scratch` of at least scratch_bytes(), 64-byte aligned.
struct DivergenceKernels {
  int64_t (*scratch_bytes)();
  void (*row_divergence)(const RowDivergence&, int64_t begin, int64_t end, void* scratch);
};

void row_divergence(const RowDivergence&, int64_t threads);

}  // namespace fastloss
