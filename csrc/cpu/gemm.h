// C (+)= Aᵀ · B for bfloat16 A and B with C in float32: the product that PyTorch's CPU GEMMs do not have, and
// that a weight's gradient over chunks of rows is. Reads A once for each panel of C's columns, B once
// (packed), C once; writes C once. Pays where the processor has AVX512_BF16 or AMX: elsewhere float32 GEMMs
// over converted operands are as fast.
#pragma once

#include <cstdint>

namespace fastloss {

struct Gemm {
  const uint16_t* a;  // [k, m], rows a_row apart
  int64_t a_row;
  const uint16_t* b;  // [k, n], rows b_row apart
  int64_t b_row;
  float* c;  // [m, n], rows c_row apart
  int64_t c_row;
  int64_t m, n, k;
  bool accumulate;  // false: C = Aᵀ · B
  bool tiles;       // in AMX tiles, or (emulate) in tiles in memory
  bool emulate;
};

struct GemmKernel {
  int64_t (*scratch_bytes)(const Gemm&, int64_t threads);
  void (*run)(const Gemm&, int64_t threads, void* scratch);  // scratch 64-byte aligned
};

}  // namespace fastloss
