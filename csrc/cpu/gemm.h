// C += A · B for bfloat16 A and B with C in float32: the product that PyTorch's CPU GEMMs do not have.
// Reads A once for each 64 columns of C, B once (packed), C once; writes C once.
// Only where the processor has AVX512_BF16: elsewhere float32 GEMMs over converted operands are as fast.
#pragma once

#include <cstdint>

namespace fastloss {

struct Gemm {
  const uint16_t* a;  // element (i, k) at a[i * a_row + k * a_k]; one of the two strides is 1
  int64_t a_row, a_k;
  const uint16_t* b;  // [k, n], rows b_row apart
  int64_t b_row;
  float* c;  // [m, n], rows c_row apart
  int64_t c_row;
  int64_t m, n, k;
  bool accumulate;  // false: C = A · B
};

// Of the packed operands. static: a copy compiled with AVX-512 must not be the one that the linker keeps.
static inline int64_t gemm_bf16_scratch_bytes(const Gemm& g, int64_t threads) {
  const int64_t pairs = (g.k + 1) / 2, columns = (g.n + 63) / 64 * 64;
  return (columns + (g.a_k == 1 ? 0 : threads * 48)) * pairs * 4;
}

bool gemm_bf16_supported();
// a_row or a_k must be 1, threads at least 1; scratch 64-byte aligned. Only where gemm_bf16_supported().
void gemm_bf16(const Gemm& gemm, int64_t threads, void* scratch);

}  // namespace fastloss
