// The arguments of the three row functions (docs/engine.md) as plain structs, and the table one ISA exports.
// Reads and writes nothing: every pointer is the caller's memory.
// Plain structs, because rows.cpp is compiled once per instruction set and must share no std template with
// the rest.
#pragma once

#include <cstdint>

#include "common/codes.h"

namespace fastloss {

// Elements per block: x, z and exp(z) of a block stay in a 32 KB L1 between the passes over it.
constexpr int64_t kBlock = 2048;

struct Logits {
  const void* x;
  int dtype;
  int64_t rows, vocab, row_stride;
  const int64_t* target;  // [rows] or null
  int64_t ignore_index;
  const void* bias;  // acc [vocab] or null
  double scale, softcap;
};

struct Stats {  // each [rows] or null
  void *loss, *logsumexp, *logprob, *entropy, *log_sum_sq_probs, *mean_logit;
  uint8_t* is_top1;
};

struct CrossEntropy {
  const void* w;
  int64_t w_row_stride;
  double label_smoothing, z_loss, grad_scale;
  void* grad;
  int64_t grad_row_stride;
};

struct Coefficients {
  const void *lse, *a, *b, *c, *d;
  const void* w;
  int64_t w_row_stride;
  void* out;
  int64_t out_row_stride;
};

// Rows [begin, end) with `scratch` of at least the bytes that `scratch_bytes` says, 64-byte aligned.
struct Kernels {
  const char* name;
  int64_t (*scratch_bytes)(const Logits&, bool gradient);
  void (*row_stats)(const Logits&, const Stats&, int64_t begin, int64_t end, void* scratch);
  void (*row_grad)(const Logits&, const Coefficients&, int64_t begin, int64_t end, void* scratch);
  void (*row_cross_entropy)(const Logits&, const CrossEntropy&, const Stats&, int64_t begin, int64_t end,
                            void* scratch);
  void (*convert)(const void* src, int src_dtype, void* dst, int dst_dtype, int64_t begin, int64_t end);
};

inline int dtype_bytes(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

}  // namespace fastloss
