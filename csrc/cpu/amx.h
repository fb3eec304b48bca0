// The product of tile.h on AMX tiles: C (+)= A · B in blocks of 32 x 32, of which two 16 x 16 tiles each way
// stay in registers over the whole of K; sums are float32. A's rows hold 32 neighbouring bfloat16 of K in a
// line, B is packed in panels of 32 columns of pairs, as for vdpbf16ps. Without AMX the same code runs on
// tiles in memory: for tests.
#pragma once

#include "tile.h"

namespace fastloss {
namespace FASTLOSS_ISA {

// Eight tiles of 16 rows of 64 bytes, in memory.
struct EmulatedTiles {
  uint32_t tile[8][16][16];

  template <int t>
  void zero() {
    memset(tile[t], 0, sizeof tile[t]);
  }
  template <int t>
  void load(const void* from, int64_t stride) {
    for (int i = 0; i < 16; ++i) memcpy(tile[t][i], static_cast<const char*>(from) + i * stride, 64);
  }
  template <int t>
  void store(void* to, int64_t stride) {
    for (int i = 0; i < 16; ++i) memcpy(static_cast<char*>(to) + i * stride, tile[t][i], 64);
  }
  template <int c, int a, int b>
  void multiply_add() {
    float sum[16][16];
    memcpy(sum, tile[c], sizeof sum);
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 16; ++k) {
        const float low = bit_cast<float>(tile[a][i][k] << 16);
        const float high = bit_cast<float>(tile[a][i][k] & 0xffff0000u);
        for (int j = 0; j < 16; ++j) {
          sum[i][j] += low * bit_cast<float>(tile[b][k][j] << 16);
          sum[i][j] += high * bit_cast<float>(tile[b][k][j] & 0xffff0000u);
        }
      }
    }
    memcpy(tile[c], sum, sizeof sum);
  }
};

#if defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
// The processor's, configured while one of these lives; what was configured before is put back (the tiles'
// contents are not: no function keeps them over a call). Assembly, because intrinsics would need AMX in the
// flags of everything that they are inlined into.
class ProcessorTiles {
  struct alignas(64) Configuration {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Configuration) == 64, "as ldtilecfg reads it");
  Configuration before_;

 public:
  ProcessorTiles() {
    __asm__ volatile("sttilecfg %0" : "=m"(before_));
    Configuration mine;
    mine.palette = 1;
    for (int t = 0; t < 8; ++t) mine.row_bytes[t] = 64, mine.rows[t] = 16;
    __asm__ volatile("ldtilecfg %0" : : "m"(mine));
  }
  ProcessorTiles(const ProcessorTiles&) = delete;
  ProcessorTiles& operator=(const ProcessorTiles&) = delete;
  ~ProcessorTiles() {
    if (before_.palette) {
      __asm__ volatile("ldtilecfg %0" : : "m"(before_));
    } else {
      __asm__ volatile("tilerelease");
    }
  }

  template <int t>
  FASTLOSS_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(t));
  }
  template <int t>
  FASTLOSS_INLINE void load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  FASTLOSS_INLINE void store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(t) : "memory");
  }
  template <int c, int a, int b>
  FASTLOSS_INLINE void multiply_add() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }
};
#endif

template <class T>
struct AmxTiles {
  typedef uint32_t Unit;
  typedef T Tiles;
  static constexpr int64_t kElements = 2, kPanel = 32, kStep = 16, kStripe = 64;
};

// A: its rows `row` bytes apart, their 64 bytes of a step of K `step` bytes apart. Whole blocks are read: 16
// rows where no more are asked for, else 32.
struct TileRows {
  const char* at;
  int64_t row, step;
};

// One block of C at `c`, rows `stride` bytes apart: 32 columns, and as many rows as A is read, 32 or 16.
template <class Tiles>
__attribute__((noinline)) void tile_block(Tiles& t, const char* a, int64_t a_row, int64_t a_step,
                                          const uint32_t* b, int64_t steps, float* c, int64_t stride,
                                          int64_t rows, bool accumulate) {
  float* const c1 = c + 16 * stride / int64_t(sizeof(float));
  if (rows > 16) {
    if (accumulate) {
      t.template load<0>(c, stride), t.template load<1>(c + 16, stride);
      t.template load<2>(c1, stride), t.template load<3>(c1 + 16, stride);
    } else {
      t.template zero<0>(), t.template zero<1>(), t.template zero<2>(), t.template zero<3>();
    }
    const char* a1 = a + 16 * a_row;
    for (int64_t k = 0; k < steps; ++k, a += a_step, a1 += a_step, b += 16 * 32) {
      t.template load<6>(b, 128), t.template load<4>(a, a_row);
      t.template multiply_add<0, 4, 6>();
      t.template load<7>(b + 16, 128);
      t.template multiply_add<1, 4, 7>();
      t.template load<5>(a1, a_row);
      t.template multiply_add<2, 5, 6>();
      t.template multiply_add<3, 5, 7>();
    }
    t.template store<2>(c1, stride), t.template store<3>(c1 + 16, stride);
  } else {
    if (accumulate) {
      t.template load<0>(c, stride), t.template load<1>(c + 16, stride);
    } else {
      t.template zero<0>(), t.template zero<1>();
    }
    for (int64_t k = 0; k < steps; ++k, a += a_step, b += 16 * 32) {
      t.template load<6>(b, 128), t.template load<4>(a, a_row);
      t.template multiply_add<0, 4, 6>();
      t.template load<7>(b + 16, 128);
      t.template multiply_add<1, 4, 7>();
    }
  }
  t.template store<0>(c, stride), t.template store<1>(c + 16, stride);
}

// Steps of K between two visits of a block: that much of A's rows stays in L1 (Xeon with AMX, 2 MB of L2, K
// 1024: 1.18 times the speed of one visit; two blocks of rows for each panel).
constexpr int64_t kTileSteps = 16;

// C[m, n] (+)= A · B over `steps` of K: `c(i)` are C's rows, B's panels are `panel` units apart. `even`: C's
// rows are as far apart everywhere.
template <class Tiles, class C>
FASTLOSS_INLINE void multiply_tiles(Tiles& t, int64_t m, int64_t n, int64_t steps, TileRows a,
                                    const uint32_t* b, int64_t panel, C&& c, bool even, bool accumulate) {
  for (int64_t k = 0; k < steps; k += kTileSteps, accumulate = true) {
    const int64_t deep = steps - k < kTileSteps ? steps - k : kTileSteps;
    const uint32_t* packed = b + k * 16 * 32;
    for (int64_t j = 0; j < n; j += 32, packed += panel) {
      const int64_t width = n - j < 32 ? n - j : 32;
      const char* from = a.at + k * a.step;
      for (int64_t i = 0; i < m; i += 32, from += 32 * a.row) {
        const int64_t rows = m - i < 32 ? m - i : 32;
        if (even && width == 32 && rows == 32) {
          float* const to = c(i) + j;
          tile_block(t, from, a.row, a.step, packed, deep, to, (c(i + 1) - c(i)) * int64_t(sizeof(float)), 32,
                     accumulate);
          continue;
        }
        float part[32][32];
        if (accumulate) {
          memset(part, 0, sizeof part);
          for (int64_t r = 0; r < rows; ++r) memcpy(part[r], c(i + r) + j, width * sizeof(float));
        }
        tile_block(t, from, a.row, a.step, packed, deep, part[0], sizeof part[0], rows, accumulate);
        for (int64_t r = 0; r < rows; ++r) memcpy(c(i + r) + j, part[r], width * sizeof(float));
      }
    }
  }
}

// A of a product that sums over rows, a step of K: the first n columns of 32 rows x(0), x(1) … become lines
// of 64 bytes, one after the other (16 at a time are written). Rows from k on are zeros.
template <class X>
FASTLOSS_INLINE void pack_lines(X&& x, int64_t n, int64_t k, uint16_t* out) {
  const BF16 zeros[16] = {};
  for (int64_t j = 0; j < n; j += 16, out += 16 * 32) {
    const int64_t left = n - j;
    BF16 some[32][16];
    const BF16* row[32];
    for (int64_t i = 0; i < 32; ++i) {
      row[i] = i < k ? x(i) + j : zeros;
      if (left < 16 && i < k) {
        memset(some[i], 0, sizeof some[i]);
        memcpy(some[i], row[i], left * sizeof(BF16));
        row[i] = some[i];
      }
    }
#if defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
    F32V r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = interleave<BFloat16Pairs>(row[2 * i], row[2 * i + 1]);
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) memcpy(out + i * 32, &r[i], sizeof r[i]);
#else
    for (int i = 0; i < 32; ++i) {
      for (int column = 0; column < 16; ++column) out[column * 32 + i] = row[i][column].bits;
    }
#endif
  }
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
