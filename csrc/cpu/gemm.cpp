// The product of gemm.h, in tiles of tile.h over pairs of k. B is packed once into a buffer that all threads
// share, A 48 columns at a time; those tasks are handed out one by one.

#ifndef FASTLOSS_ISA
#error "gemm.cpp is compiled once per instruction set, with -DFASTLOSS_ISA=avx512, avx2 or generic"
#endif

#include "gemm.h"

#include "tile.h"

namespace fastloss {
namespace FASTLOSS_ISA {
namespace {

constexpr int64_t kColumns = 48;  // of A in a task: whole tiles, whole vectors

int64_t scratch_bytes(const Gemm& g, int64_t threads) {
  return (round_up(g.n, kPanel) + threads * kColumns) * ((g.k + 1) / 2) * 4;
}

void run(const Gemm& g, int64_t threads, void* scratch) {
  const BF16* const a = reinterpret_cast<const BF16*>(g.a);
  const BF16* const b = reinterpret_cast<const BF16*>(g.b);
  const int64_t units = (g.k + 1) / 2, panel = units * kPanel;
  uint32_t* const packed_b = static_cast<uint32_t*>(scratch);
  uint32_t* const packed_a = packed_b + round_up(g.n, kPanel) * units;
  int64_t next = 0,
          slot = 0;  // builtins in place of std::atomic: no template is shared with the plain objects
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
#pragma omp for schedule(static)
    for (int64_t j = 0; j < g.n; j += kPanel) {
      pack_rows<BFloat16Pairs, BF16>([&](int64_t k) { return b + k * g.b_row + j; },
                                     g.n - j < kPanel ? g.n - j : kPanel, g.k, packed_b + j * units, kPanel);
    }
    uint32_t* const mine = packed_a + __atomic_fetch_add(&slot, 1, __ATOMIC_RELAXED) * kColumns * units;
    for (int64_t row; (row = __atomic_fetch_add(&next, kColumns, __ATOMIC_RELAXED)) < g.m;) {
      const int64_t rows = g.m - row < kColumns ? g.m - row : kColumns;
      pack_rows<BFloat16Pairs, BF16>([&](int64_t k) { return a + k * g.a_row + row; }, rows, g.k, mine,
                                     kColumns);
      multiply<BFloat16Pairs, true>(
          rows, g.n, units, [&](int64_t i) { return mine + i; }, kColumns, packed_b, panel,
          [&](int64_t i) { return g.c + (row + i) * g.c_row; }, g.accumulate);
    }
  }
}

}  // namespace

extern const GemmKernel gemm_bf16;
const GemmKernel gemm_bf16 = {scratch_bytes, run};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
