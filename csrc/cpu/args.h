// The arguments of the three row functions (docs/engine.md) as plain structs, and the table one ISA exports.
// Reads and writes nothing: every pointer is the caller's memory.
// Plain structs, because rows.cpp is compiled once per instruction set and must share no std template with
// the rest.
#pragma once

#include <cstdint>

#include "common/row_arguments.h"

namespace fastloss {

// Elements per block: x, z and exp(z) of a block stay in a 32 KB L1 between the passes over it.
constexpr int64_t kBlock = 2048;

using Logits = LogitsOf<void, double>;
using Stats = StatsOf<void>;
using Coefficients = CoefficientsOf<void>;

struct CrossEntropy {
  const void* w;
  int64_t w_row_stride;
  LossTermsOf<double> terms;
  double grad_scale;
  void* grad;
  int64_t grad_row_stride;
};

// Rows [begin, end) with `scratch` of at least the bytes that `scratch_bytes` says, 64-byte aligned.
struct Kernels {
  int64_t (*scratch_bytes)(const Logits&, bool gradient);
  void (*row_stats)(const Logits&, const Stats&, int64_t begin, int64_t end, void* scratch);
  void (*row_grad)(const Logits&, const Coefficients&, int64_t begin, int64_t end, void* scratch);
  void (*row_cross_entropy)(const Logits&, const CrossEntropy&, const Stats&, int64_t begin, int64_t end,
                            void* scratch);
  void (*convert)(const void* src, int src_dtype, void* dst, int dst_dtype, int64_t begin, int64_t end);
};

inline int dtype_bytes(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

}  // namespace fastloss
