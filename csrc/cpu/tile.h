// The matrix product inside the linear head: C (+)= A · B, C and all sums float32. A tile of C stays in
// registers over the whole of K; B is packed into panels as wide as the tile, A is read where it lies. K goes
// in units of 32 bits: one float, or two neighbouring bfloat16 (vdpbf16ps, bfmmla, and the tiles of amx.h).
// Whatever is not a multiple of the tile is computed in full and stored in part: a packed panel is padded
// with zeros.
#pragma once

#include "vec.h"

namespace fastloss {
namespace FASTLOSS_ISA {

// C in registers: 12 of 16, or 24 of the 32 of AVX-512 and NEON; the others hold a row of B and a number of
// A.
#if defined(FASTLOSS_NEON) || FASTLOSS_VECTOR_BYTES == 64
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
constexpr int kTileRows = 6;
constexpr int64_t kPanel = kTileVectors * W;  // columns of a tile
// Units of K between two visits of a tile: that much of a panel stays in L1, and a sum's roundings do not
// pile up (with 512 the error of a logit was above that of PyTorch's GEMM).
constexpr int64_t kDepth = 128;

// kElements: of a unit. kPanel: columns of a packed panel. kStep: units by which K grows; a panel is padded
// with zeros to a multiple. kStripe: rows of the head that are taken together, so that they and what becomes
// of them stay in L2.
struct FloatUnits {
  typedef float Unit;
  static constexpr int64_t kElements = 1, kPanel = FASTLOSS_ISA::kPanel, kStep = 1, kStripe = 96;
  // x - 0 is x for every x: a broadcast alone
  static FASTLOSS_INLINE F32V broadcast(Unit a) { return a - F32V{}; }
  static FASTLOSS_INLINE void multiply_add(F32V& sum, F32V a, F32V b) { sum += a * b; }
};

struct BFloat16Pairs {
  typedef uint32_t Unit;
  static constexpr int64_t kElements = 2, kPanel = FASTLOSS_ISA::kPanel, kStep = 1, kStripe = 96;
  static FASTLOSS_INLINE F32V broadcast(Unit a) {
#if defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
    return F32V(_mm512_castsi512_ps(_mm512_set1_epi32(int(a))));
#else
    return bit_cast<F32V>(a - U32V{});
#endif
  }
  static FASTLOSS_INLINE void multiply_add(F32V& sum, F32V a, F32V b) {
#if defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
    // An intrinsic would need AVX512_BF16 in the flags of everything that it is inlined into.
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else  // the same product in two steps: tests the pairs' paths on any processor
    const U32V left = bit_cast<U32V>(a), right = bit_cast<U32V>(b);
    sum += bit_cast<F32V>(left << 16) * bit_cast<F32V>(right << 16);
    sum += bit_cast<F32V>(left & 0xffff0000u) * bit_cast<F32V>(right & 0xffff0000u);
#endif
  }
};

#if defined(FASTLOSS_NEON_BF16)
#define FASTLOSS_QUADS
FASTLOSS_INLINE void multiply_add_quads(F32V& sum, F32V a, F32V b) {
  sum = F32V(vbfmmlaq_f32(float32x4_t(sum), bit_cast<bfloat16x8_t>(a), bit_cast<bfloat16x8_t>(b)));
}
#elif defined(FASTLOSS_EMULATE_QUADS)  // the same product in steps: tests the path on any processor
#define FASTLOSS_QUADS
FASTLOSS_INLINE void multiply_add_quads(F32V& sum, F32V a, F32V b) {
  const U32V x = bit_cast<U32V>(a), y = bit_cast<U32V>(b);
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      for (int k = 0; k < 2; ++k) {
        const uint32_t p = x[2 * i + k], q = y[2 * j + k];
        sum[2 * i + j] += bit_cast<float>(p << 16) * bit_cast<float>(q << 16);
        sum[2 * i + j] += bit_cast<float>(p & 0xffff0000u) * bit_cast<float>(q & 0xffff0000u);
      }
    }
  }
}
#endif

#if FASTLOSS_VECTOR_BYTES == 16
FASTLOSS_INLINE F32V zip_low(F32V a, F32V b) { return F32V{a[0], b[0], a[1], b[1]}; }
FASTLOSS_INLINE F32V zip_high(F32V a, F32V b) { return F32V{a[2], b[2], a[3], b[3]}; }
FASTLOSS_INLINE F32V low_halves(F32V a, F32V b) { return F32V{a[0], a[1], b[0], b[1]}; }
FASTLOSS_INLINE F32V high_halves(F32V a, F32V b) { return F32V{a[2], a[3], b[2], b[3]}; }
// The first two of a vector; the others are anything.
FASTLOSS_INLINE F32V two_units(const uint32_t* p) {
  const uint64_t both = load_raw<uint64_t>(p);
  return bit_cast<F32V>(U64V{both, 0});
}
#endif

FASTLOSS_INLINE void prefetch_tile(float* const* c) {
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
    for (int64_t line = 0; line < kPanel; line += 16) __builtin_prefetch(c[i] + line, 1);
  }
}

// `rows` and `width` of the tile.
FASTLOSS_INLINE void store_tile(const F32V (&sum)[kTileRows][kTileVectors], float* const* c, int64_t rows,
                                int64_t width, bool accumulate) {
  if (rows == kTileRows && width == kPanel) {
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        float* const out = c[i] + v * W;
        store(out, accumulate ? load(out) + sum[i][v] : sum[i][v]);
      }
    }
    return;
  }
  float part[kTileRows][kPanel];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) store(part[i] + v * W, sum[i][v]);
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; ++j) c[i][j] = accumulate ? c[i][j] + part[i][j] : part[i][j];
  }
}

// Row i of A is at a[i], its units a_step apart; kTileRows pointers each. `rows` and `width` of the tile are
// stored.
template <class Op>
FASTLOSS_INLINE void tile(const typename Op::Unit* const* a, int64_t a_step, const typename Op::Unit* b,
                          int64_t units, float* const* c, int64_t rows, int64_t width, bool accumulate) {
  F32V sum[kTileRows][kTileVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) sum[i][v] = F32V{};
  }
  const typename Op::Unit* at[kTileRows];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) at[i] = a[i];
  prefetch_tile(c);
  for (int64_t k = 0; k < units; ++k, b += kPanel) {
#if defined(FASTLOSS_NEON)
    // GCC 12 would load the whole row and take the broadcasts apart again, and spill sums for it.
    F32V left[kTileRows];
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      left[i] = Op::broadcast(at[i][k * a_step]);
      __asm__ volatile("" : "+w"(left[i]));
    }
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      __asm__ volatile("" : : : "memory");
      const F32V row = load_raw<F32V>(b + v * W);
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; ++i) Op::multiply_add(sum[i][v], left[i], row);
    }
#else
    F32V row[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) row[v] = load_raw<F32V>(b + v * W);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v)
        Op::multiply_add(sum[i][v], Op::broadcast(at[i][k * a_step]), row[v]);
    }
#endif
  }
  store_tile(sum, c, rows, width, accumulate);
}

#if defined(FASTLOSS_QUADS)
// The tile over pairs with bfmmla: two pairs of K at a time, of two rows of A and two columns of B, whose
// four sums are one vector. Pairs lie in memory as for every other tile, and are put in fours here.
template <bool kColumns>
FASTLOSS_INLINE void tile_of_quads(const uint32_t* const* a, int64_t a_step, const uint32_t* b, int64_t units,
                                   float* const* c, int64_t rows, int64_t width, bool accumulate) {
  static_assert(W == 4 && kTileRows % 2 == 0, "two rows of two columns are a vector");
  F32V sum[kTileRows / 2][2 * kTileVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows / 2; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < 2 * kTileVectors; ++v) sum[i][v] = F32V{};
  }
  const uint32_t* at[kTileRows];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) at[i] = a[i];
  prefetch_tile(c);
  const auto two_pairs = [&](int64_t k, bool is_last) __attribute__((always_inline)) {
    F32V left[kTileRows / 2];
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows / 2; ++i) {
      // [rows 2i and 2i + 1][pairs k and k + 1]
      const uint32_t *const x = at[2 * i] + k * a_step, *const y = at[2 * i + 1] + k * a_step;
      if (is_last) {
        left[i] = bit_cast<F32V>(U32V{*x, 0, *y, 0});
      } else if (kColumns) {  // y = x + 1
        left[i] = zip_low(two_units(x), two_units(x + a_step));
      } else {
        left[i] = low_halves(two_units(x), two_units(y));
      }
    }
    const uint32_t* const from = b + k * kPanel;
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      __asm__ volatile("" : : : "memory");  // GCC 12 loads all of them first, and spills sums for it
      const F32V first = load_raw<F32V>(from + v * W);
      const F32V second = is_last ? F32V{} : load_raw<F32V>(from + kPanel + v * W);
      const F32V low = zip_low(first, second), high = zip_high(first, second);
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows / 2; ++i) {
        multiply_add_quads(sum[i][2 * v], left[i], low);
        multiply_add_quads(sum[i][2 * v + 1], left[i], high);
      }
    }
  };
  int64_t k = 0;
  for (; k + 2 <= units; k += 2) two_pairs(k, false);
  if (k < units) two_pairs(k, true);
  F32V out[kTileRows][kTileVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows / 2; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      out[2 * i][v] = low_halves(sum[i][2 * v], sum[i][2 * v + 1]);
      out[2 * i + 1][v] = high_halves(sum[i][2 * v], sum[i][2 * v + 1]);
    }
  }
  store_tile(out, c, rows, width, accumulate);
}
#endif

// A's rows with their units side by side, or (kColumns) side by side themselves: row i + 1 one unit after row
// i.
template <class Op, bool kColumns>
__attribute__((noinline)) void tile_at(const typename Op::Unit* const* a, int64_t a_step,
                                       const typename Op::Unit* b, int64_t units, float* const* c,
                                       int64_t rows, int64_t width, bool accumulate) {
  const typename Op::Unit* at[kTileRows];
  for (int i = 0; i < kTileRows; ++i) at[i] = kColumns ? a[0] + i : a[i];
  if (!kColumns) a_step = 1;
#if defined(FASTLOSS_QUADS)
  if constexpr (Op::kElements == 2) {
    return tile_of_quads<kColumns>(at, a_step, b, units, c, rows, width, accumulate);
  }
#endif
  tile<Op>(at, a_step, b, units, c, rows, width, accumulate);
}

// C[m, n] (+)= A · B: `a(i)` and `c(i)` are the rows, B's panels of `units` rows are `panel` units apart.
// With kColumns A is read up to a tile's rows beyond m.
template <class Op, bool kColumns, class A, class C>
FASTLOSS_INLINE void multiply(int64_t m, int64_t n, int64_t units, A&& a, int64_t a_step,
                              const typename Op::Unit* b, int64_t panel, C&& c, bool accumulate) {
  for (int64_t j = 0; j < n; j += kPanel, b += panel) {
    for (int64_t i = 0; i < m; i += kTileRows) {
      const int64_t rows = m - i < kTileRows ? m - i : kTileRows;
      const typename Op::Unit* from[kTileRows];
      float* to[kTileRows];
      for (int r = 0; r < kTileRows; ++r) {
        const int64_t row = i + (r < rows ? r : rows - 1);
        from[r] = a(row), to[r] = c(row) + j;
      }
      tile_at<Op, kColumns>(from, a_step, b, units, to, rows, n - j < kPanel ? n - j : kPanel, accumulate);
    }
  }
}

// --- packing
// --------------------------------------------------------------------------------------------------------

inline constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Of K = k elements in a packed panel.
template <class Op>
constexpr int64_t units_of(int64_t k) {
  return round_up((k + Op::kElements - 1) / Op::kElements, Op::kStep);
}

// W units of a row, and one, from elements of type T (bfloat16 alone makes pairs).
template <class Op, class T>
FASTLOSS_INLINE F32V load_units(const T* x) {
  if constexpr (Op::kElements == 2) {
    return load_raw<F32V>(x);
  } else {
    return load(x);
  }
}
template <class Op, class T>
FASTLOSS_INLINE typename Op::Unit load_unit(const T* x) {
  if constexpr (Op::kElements == 2) {
    return load_raw<uint32_t>(x);
  } else {
    return load_n(x, 1)[0];
  }
}

#if defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
// 16 rows of 16 numbers of 32 bits become columns, in registers.
FASTLOSS_INLINE void transpose(F32V (&r)[16]) {
  __m512 a[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_ps(__m512(r[2 * i]), __m512(r[2 * i + 1]));
    a[2 * i + 1] = _mm512_unpackhi_ps(__m512(r[2 * i]), __m512(r[2 * i + 1]));
  }
  __m512d b[16];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512d low = _mm512_castps_pd(a[4 * i + half]), high = _mm512_castps_pd(a[4 * i + 2 + half]);
      b[4 * i + 2 * half] = _mm512_unpacklo_pd(low, high);
      b[4 * i + 2 * half + 1] = _mm512_unpackhi_pd(low, high);
    }
  }
  // b[4 i + j] holds, in its four quarters, columns j, 4 + j, 8 + j and 12 + j of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 x0 = _mm512_castpd_ps(b[j]), x1 = _mm512_castpd_ps(b[4 + j]);
    const __m512 x2 = _mm512_castpd_ps(b[8 + j]), x3 = _mm512_castpd_ps(b[12 + j]);
    const __m512 even01 = _mm512_shuffle_f32x4(x0, x1, 0x88), odd01 = _mm512_shuffle_f32x4(x0, x1, 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(x2, x3, 0x88), odd23 = _mm512_shuffle_f32x4(x2, x3, 0xdd);
    r[j] = F32V(_mm512_shuffle_f32x4(even01, even23, 0x88));
    r[8 + j] = F32V(_mm512_shuffle_f32x4(even01, even23, 0xdd));
    r[4 + j] = F32V(_mm512_shuffle_f32x4(odd01, odd23, 0x88));
    r[12 + j] = F32V(_mm512_shuffle_f32x4(odd01, odd23, 0xdd));
  }
}
#endif

#if FASTLOSS_VECTOR_BYTES == 16
// 4 rows of 4 numbers of 32 bits become columns.
FASTLOSS_INLINE void transpose(F32V (&r)[4]) {
  const F32V a = zip_low(r[0], r[2]), b = zip_low(r[1], r[3]);
  const F32V c = zip_high(r[0], r[2]), d = zip_high(r[1], r[3]);
  r[0] = zip_low(a, b), r[1] = zip_high(a, b), r[2] = zip_low(c, d), r[3] = zip_high(c, d);
}
#endif

// One panel of B = Xᵀ: `width` rows x(0), x(1) … become columns; K is k elements (a multiple of
// Op::kElements). Asks for rows beyond `width`, and does not read them.
template <class Op, class T, class X>
void pack_transposed(X&& x, int64_t width, int64_t k, typename Op::Unit* out) {
  typedef typename Op::Unit Unit;
  constexpr int64_t P = Op::kPanel;
  const int64_t units = k / Op::kElements;
  int64_t packed = 0;  // columns that are done
#if (defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64) || FASTLOSS_VECTOR_BYTES == 16
  for (; packed + W <= width; packed += W) {
    const T *from[W], *next[W];
    for (int i = 0; i < W; ++i) from[i] = x(packed + i), next[i] = x(packed + W + i);
    int64_t q = 0;
    for (; q + W <= units; q += W) {
      F32V r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        r[i] = load_units<Op>(from[i] + q * Op::kElements);
        if (W == 16 || q % 16 == 0) __builtin_prefetch(next[i] + q * Op::kElements, 0, 2);
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) memcpy(out + (q + i) * P + packed, &r[i], sizeof r[i]);
    }
    for (; q < units; ++q) {
      for (int i = 0; i < W; ++i) {
        out[q * P + packed + i] = load_unit<Op>(from[i] + q * Op::kElements);
      }
    }
  }
#endif
  constexpr int64_t kChunk = 64;  // units whose lines of a panel stay in L1 until every column wrote them
  for (int64_t p = 0; packed < P && p < units; p += kChunk) {
    const int64_t end = units - p < kChunk ? units : p + kChunk;
    int64_t column = packed;
    for (; column < width; ++column) {
      const T* const from = x(column);
      Unit* const to = out + column;
      int64_t q = p;
      for (; q + W <= end; q += W) {
        const F32V v = load_units<Op>(from + q * Op::kElements);
        Unit lanes[W];
        memcpy(lanes, &v, sizeof lanes);
#pragma GCC unroll 16
        for (int lane = 0; lane < W; ++lane) to[(q + lane) * P] = lanes[lane];
      }
      for (; q < end; ++q) to[q * P] = load_unit<Op>(from + q * Op::kElements);
    }
    for (; column < P; ++column) {
      for (int64_t q = p; q < end; ++q) out[q * P + column] = Unit(0);
    }
  }
  memset(static_cast<void*>(out + units * P), 0, (units_of<Op>(k) - units) * P * sizeof(Unit));
}

// W columns of a unit of K: one row's, or two rows' interleaved (`second` may be null: zeros).
template <class Op, class T>
FASTLOSS_INLINE F32V interleave(const T* first, const T* second) {
  if constexpr (Op::kElements == 2) {
#if defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
    // GCC 12 widens a vector of 16 in two halves.
    __m512i pair = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
    if (second) {
      const __m512i high =
          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
      pair = _mm512_or_si512(pair, _mm512_slli_epi32(high, 16));
    }
    return F32V(_mm512_castsi512_ps(pair));
#else
    U32V bits = __builtin_convertvector(load_raw<U16V>(first), U32V);
    if (second) bits |= __builtin_convertvector(load_raw<U16V>(second), U32V) << 16;
    return bit_cast<F32V>(bits);
#endif
  } else {
    return load(first);
  }
}

// Units [begin, end) of K of all panels of B = X, of the k rows x(0), x(1) … of n columns. Takes the rows one
// after the other: a panel at a time would be a line of every row.
template <class Op, class T, class X>
FASTLOSS_INLINE void pack_matrix(X&& x, int64_t n, int64_t k, int64_t begin, int64_t end,
                                 typename Op::Unit* out, int64_t panel) {
  constexpr int64_t P = Op::kPanel;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t left = k - p * Op::kElements;
    const T* const first = left > 0 ? x(p * Op::kElements) : nullptr;
    const T* const second = Op::kElements == 2 && left > 1 ? x(p * Op::kElements + 1) : nullptr;
    for (int64_t j = 0; j < n; j += P) {
      typename Op::Unit* const to = out + j / P * panel + p * P;
      if (left <= 0) {
        memset(to, 0, P * sizeof *to);
        continue;
      }
      for (int64_t i = 0; i < P; i += W) {
        const int64_t columns = n - j - i;
        F32V v{};
        if (columns >= W) {
          v = interleave<Op>(first + j + i, second ? second + j + i : nullptr);
        } else if (columns > 0) {
          T some[2][W] = {};
          memcpy(some[0], first + j + i, columns * sizeof(T));
          if (second) memcpy(some[1], second + j + i, columns * sizeof(T));
          v = interleave<Op>(some[0], some[1]);
        }
        memcpy(to + i, &v, sizeof v);
      }
    }
  }
}

// One panel, `wide` columns (a multiple of W), of the first n columns of the k rows x(0), x(1) …: B as it
// lies, or, its units of K further apart, a column-major A.
template <class Op, class T, class X>
FASTLOSS_INLINE void pack_rows(X&& x, int64_t n, int64_t k, typename Op::Unit* out, int64_t wide,
                               int64_t apart = 0) {
  if (!apart) apart = wide;
  const int64_t units = (k + Op::kElements - 1) / Op::kElements;
  for (int64_t p = 0; p < units; ++p) {
    const T* const first = x(p * Op::kElements);
    const T* const second =
        Op::kElements == 2 && p * Op::kElements + 1 < k ? x(p * Op::kElements + 1) : nullptr;
    typename Op::Unit* const to = out + p * apart;
    for (int64_t i = 0; i < wide; i += W) {
      const int64_t left = n - i;
      F32V v{};
      if (left >= W) {
        v = interleave<Op>(first + i, second ? second + i : nullptr);
      } else if (left > 0) {
        T some[2][W] = {};
        memcpy(some[0], first + i, left * sizeof(T));
        if (second) memcpy(some[1], second + i, left * sizeof(T));
        v = interleave<Op>(some[0], some[1]);
      }
      memcpy(to + i, &v, sizeof v);
    }
  }
  for (int64_t p = units; p < units_of<Op>(k); ++p) memset(out + p * apart, 0, wide * sizeof *out);
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
