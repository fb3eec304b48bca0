// The product of gemm.h, in tiles of tile.h over pairs of k, or of amx.h. B is packed once into a buffer that
// all threads share, A some columns at a time; those tasks are handed out one by one.

#ifndef FASTLOSS_ISA
#error "gemm.cpp is compiled once per instruction set, with -DFASTLOSS_ISA=avx512, avx2 or generic"
#endif

#include "gemm.h"

#include "amx.h"

namespace fastloss {
namespace FASTLOSS_ISA {
namespace {

// Of A in a task: whole tiles, whole vectors.
template <class Op>
constexpr int64_t kColumns = Op::kStep > 1 ? 64 : 48;

template <class Op>
struct TilesOf {
  typedef int type;  // none
};
template <class T>
struct TilesOf<AmxTiles<T>> {
  typedef T type;
};

template <class Op>
int64_t scratch_bytes_of(const Gemm& g, int64_t threads) {
  return (round_up(g.n, Op::kPanel) + threads * kColumns<Op>)*units_of<Op>(g.k) * 4;
}

template <class Op>
void run_as(const Gemm& g, int64_t threads, void* scratch) {
  constexpr int64_t P = Op::kPanel, columns = kColumns<Op>;
  const BF16* const a = reinterpret_cast<const BF16*>(g.a);
  const BF16* const b = reinterpret_cast<const BF16*>(g.b);
  const int64_t units = units_of<Op>(g.k), panel = units * P;
  uint32_t* const packed_b = static_cast<uint32_t*>(scratch);
  uint32_t* const packed_a = packed_b + round_up(g.n, P) * units;
  int64_t next = 0,
          slot = 0;  // builtins in place of std::atomic: no template is shared with the plain objects
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    typename TilesOf<Op>::type tiles;
#pragma omp for schedule(static)
    for (int64_t j = 0; j < g.n; j += P) {
      pack_rows<Op, BF16>([&](int64_t k) { return b + k * g.b_row + j; }, g.n - j < P ? g.n - j : P, g.k,
                          packed_b + j * units, P);
    }
    uint32_t* const mine = packed_a + __atomic_fetch_add(&slot, 1, __ATOMIC_RELAXED) * columns * units;
    for (int64_t row; (row = __atomic_fetch_add(&next, columns, __ATOMIC_RELAXED)) < g.m;) {
      const int64_t rows = g.m - row < columns ? g.m - row : columns;
      const auto c = [&](int64_t i) { return g.c + (row + i) * g.c_row; };
      if constexpr (Op::kStep > 1) {
        uint16_t* const lines = reinterpret_cast<uint16_t*>(mine);
        for (int64_t k = 0; k < g.k; k += 32) {
          pack_lines([&](int64_t i) { return a + (k + i) * g.a_row + row; }, rows, g.k - k,
                     lines + k * columns);
        }
        const TileRows from{reinterpret_cast<const char*>(lines), 64, columns * 64};
        multiply_tiles(tiles, rows, g.n, units / Op::kStep, from, packed_b, panel, c, true, g.accumulate);
      } else {
        (void)tiles;
        pack_rows<Op, BF16>([&](int64_t k) { return a + k * g.a_row + row; }, rows, g.k, mine, columns);
        multiply<Op, true>(
            rows, g.n, units, [&](int64_t i) { return mine + i; }, columns, packed_b, panel, c, g.accumulate);
      }
    }
  }
}

template <class F>
auto with_operation(const Gemm& g, F&& f) {
#if defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
  if (g.tiles && !g.emulate) return f(AmxTiles<ProcessorTiles>{});
#endif
  if (g.tiles) return f(AmxTiles<EmulatedTiles>{});
  return f(BFloat16Pairs{});
}

int64_t scratch_bytes(const Gemm& g, int64_t threads) {
  return with_operation(g, [&](auto op) { return scratch_bytes_of<decltype(op)>(g, threads); });
}
void run(const Gemm& g, int64_t threads, void* scratch) {
  with_operation(g, [&](auto op) {
    run_as<decltype(op)>(g, threads, scratch);
    return int64_t(0);
  });
}

}  // namespace

extern const GemmKernel gemm_bf16;
const GemmKernel gemm_bf16 = {scratch_bytes, run};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
