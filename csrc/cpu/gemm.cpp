// C[i, j] (+)= Σ_k A[i, k] · B[k, j], A and B bfloat16, C and all sums float32 (vdpbf16ps: two k at a time).
// B is packed once as pairs of rows, 64 columns wide, into a buffer of its own size that all threads share; a
// column-major A is packed 48 rows of C at a time; 6 x 64 of C stay in 24 registers over the whole of K.
// Tasks of 96 (48) rows of C are handed out one by one. Compiled for every ISA, but only the AVX-512 one has
// it.

#ifndef FASTLOSS_ISA
#error "gemm.cpp is compiled once per instruction set, with -DFASTLOSS_ISA=avx512, avx2 or generic"
#endif

#if defined(__AVX512F__)

#include "gemm.h"

#include <immintrin.h>

#define FASTLOSS_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))

namespace fastloss {
namespace {

constexpr int64_t kPanel = 64;    // columns of B packed together
constexpr int kTile = 6;          // rows of C in registers
constexpr int64_t kRows = 96;     // rows of C in a task
constexpr int64_t kColumns = 48;  // of a column-major A, packed together

// Rows k, k + 1 of 64 columns of B, interleaved; zeros past the edges.
FASTLOSS_BF16 void pack_panel(const Gemm& g, int64_t column, uint32_t* out) {
  const int64_t width = g.n - column < kPanel ? g.n - column : kPanel;
  for (int64_t k = 0; k < g.k; k += 2, out += kPanel) {
    const uint16_t* const first = g.b + k * g.b_row + column;
    const uint16_t* const second = k + 1 < g.k ? first + g.b_row : nullptr;
    int64_t j = 0;
    if (second) {
      for (; j < width; ++j) out[j] = uint32_t(first[j]) | uint32_t(second[j]) << 16;
    } else {
      for (; j < width; ++j) out[j] = first[j];
    }
    for (; j < kPanel; ++j) out[j] = 0;
  }
}

// Rows k, k + 1 of `width` <= 48 columns of a column-major A, interleaved.
FASTLOSS_BF16 void pack_columns(const Gemm& g, int64_t column, int64_t width, uint32_t* out) {
  for (int64_t k = 0; k < g.k; k += 2, out += kColumns) {
    const uint16_t* const first = g.a + k * g.a_k + column;
    if (k + 1 < g.k) {
      const uint16_t* const second = first + g.a_k;
      for (int64_t i = 0; i < width; ++i) out[i] = uint32_t(first[i]) | uint32_t(second[i]) << 16;
    } else {
      for (int64_t i = 0; i < width; ++i) out[i] = first[i];
    }
  }
}

// kM rows of C over one panel. The pair (i, k) of A is at a + i * a_row + (k / 2) * a_pair, in bytes; `odd`:
// the last pair of a row-major A has one element.
template <int kM>
FASTLOSS_BF16 void tile(const char* a, int64_t a_row, int64_t a_pair, const uint32_t* b, int64_t pairs,
                        bool odd, float* c, int64_t c_row, int64_t width, bool accumulate) {
  __m512 sum[kM][4];
#pragma GCC unroll 8
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[i][v] = _mm512_setzero_ps();
  }
  const auto step = [&](int64_t pair, auto&& a_at)
                        __attribute__((always_inline, target("avx512f,avx512bf16"))) {
                          __m512bh bv[4];
#pragma GCC unroll 4
                          for (int v = 0; v < 4; ++v)
                            bv[v] = (__m512bh)_mm512_loadu_si512(b + pair * kPanel + v * 16);
#pragma GCC unroll 8
                          for (int i = 0; i < kM; ++i) {
                            const __m512bh av = (__m512bh)_mm512_set1_epi32(int(a_at(i)));
#pragma GCC unroll 4
                            for (int v = 0; v < 4; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], av, bv[v]);
                          }
                        };
  const int64_t whole = pairs - odd;
  for (int64_t pair = 0; pair < whole; ++pair) {
    step(pair, [&](int i) __attribute__((always_inline)) {
      uint32_t value;
      __builtin_memcpy(&value, a + i * a_row + pair * a_pair, 4);
      return value;
    });
  }
  if (odd) {
    step(whole, [&](int i) __attribute__((always_inline)) {
      uint16_t value;
      __builtin_memcpy(&value, a + i * a_row + whole * a_pair, 2);
      return uint32_t(value);
    });
  }
#pragma GCC unroll 8
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const int64_t left = width - v * 16;
      if (left <= 0) continue;
      const __mmask16 mask = left >= 16 ? __mmask16(0xffff) : __mmask16((1u << left) - 1);
      float* const at = c + i * c_row + v * 16;
      __m512 value = sum[i][v];
      if (accumulate) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, at));
      _mm512_mask_storeu_ps(at, mask, value);
    }
  }
}

FASTLOSS_BF16 void rows_of_panel(const char* a, int64_t a_row, int64_t a_pair, const uint32_t* b,
                                 int64_t pairs, bool odd, float* c, int64_t c_row, int64_t rows,
                                 int64_t width, bool accumulate) {
  for (int64_t i = 0; i < rows; i += kTile) {
    const char* const at = a + i * a_row;
    float* const out = c + i * c_row;
    switch (rows - i) {
      case 1:
        tile<1>(at, a_row, a_pair, b, pairs, odd, out, c_row, width, accumulate);
        break;
      case 2:
        tile<2>(at, a_row, a_pair, b, pairs, odd, out, c_row, width, accumulate);
        break;
      case 3:
        tile<3>(at, a_row, a_pair, b, pairs, odd, out, c_row, width, accumulate);
        break;
      case 4:
        tile<4>(at, a_row, a_pair, b, pairs, odd, out, c_row, width, accumulate);
        break;
      case 5:
        tile<5>(at, a_row, a_pair, b, pairs, odd, out, c_row, width, accumulate);
        break;
      default:
        tile<kTile>(at, a_row, a_pair, b, pairs, odd, out, c_row, width, accumulate);
    }
  }
}

}  // namespace

bool gemm_bf16_supported() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
}

void gemm_bf16(const Gemm& g, int64_t threads, void* scratch) {
  const int64_t panels = (g.n + kPanel - 1) / kPanel, pairs = (g.k + 1) / 2;
  const bool row_major = g.a_k == 1;
  const int64_t step = row_major ? kRows : kColumns, blocks = (g.m + step - 1) / step;
  const int64_t panel_size = pairs * kPanel, a_size = row_major ? 0 : pairs * kColumns;
  uint32_t* const memory = static_cast<uint32_t*>(scratch);
  int64_t next = 0,
          slot = 0;  // builtins in place of std::atomic: no template is shared with the plain objects
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels; ++panel) {
      pack_panel(g, panel * kPanel, memory + panel * panel_size);
    }
    uint32_t* const packed_a =
        memory + panels * panel_size + __atomic_fetch_add(&slot, 1, __ATOMIC_RELAXED) * a_size;
    for (;;) {
      const int64_t block = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (block >= blocks) break;
      const int64_t row = block * step, rows = g.m - row < step ? g.m - row : step;
      const char* a = reinterpret_cast<const char*>(g.a + row * g.a_row);
      int64_t a_row = g.a_row * 2, a_pair = 4;
      if (!row_major) {
        pack_columns(g, row, rows, packed_a);
        a = reinterpret_cast<const char*>(packed_a), a_row = 4, a_pair = kColumns * 4;
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t column = panel * kPanel, width = g.n - column < kPanel ? g.n - column : kPanel;
        rows_of_panel(a, a_row, a_pair, memory + panel * panel_size, pairs, row_major && g.k % 2,
                      g.c + row * g.c_row + column, g.c_row, rows, width, g.accumulate);
      }
    }
  }
}

}  // namespace fastloss

#endif  // __AVX512F__
