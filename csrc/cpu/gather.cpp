// gathered_dots: out[j] = x[s] . m[index[j]], and gathered_sums: out[s] = sum_j weights[j] m[index[j]], over
// the entries j of each segment s. Reads each named row once, from memory wherever it lies, and writes each
// output once. Rows are fetched ahead, for they have no order. Built once per instruction set, as rows.cpp.

#ifndef FASTLOSS_ISA
#error "gather.cpp is compiled once per instruction set, with -DFASTLOSS_ISA=avx512, avx2 or generic"
#endif

#include "gather.h"

#include "common/codes.h"
#include "lane_sums.h"
#include "row_math.h"

namespace fastloss {
namespace FASTLOSS_ISA {
namespace {

constexpr int64_t kAhead = 4;  // rows that are fetched before they are needed
constexpr int64_t kLine = 64;  // bytes of a cache line
constexpr int kAccumulators = 4;

FASTLOSS_INLINE void fetch(const void* row, int64_t bytes) {
  const char* const p = static_cast<const char*>(row);
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(p + i);
}

// Sums in lanes, the lanes in double: a dot has the same bits whatever is computed beside it.
template <class T>
FASTLOSS_INLINE double dot(const T* x, const T* m, int64_t dim) {
  using S = typename Acc<T>::S;
  using V = VectorOf<S>;
  constexpr int64_t L = Lanes<S>::n;
  V acc[kAccumulators] = {};
  int64_t i = 0;
  for (; i + kAccumulators * L <= dim; i += kAccumulators * L) {
    for (int k = 0; k < kAccumulators; ++k) acc[k] += load(x + i + k * L) * load(m + i + k * L);
  }
  for (; i + L <= dim; i += L) acc[0] += load(x + i) * load(m + i);
  if (i < dim) acc[1] += load_n(x + i, dim - i) * load_n(m + i, dim - i);
  return sum_lanes((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

template <class T>
void dots_of(const GatheredDots& a, int64_t begin, int64_t end) {
  using S = typename Acc<T>::S;
  const T* const m = static_cast<const T*>(a.m);
  S* const out = static_cast<S*>(a.out);
  const int64_t bytes = a.dim * int64_t(sizeof(T)), last = a.offsets[end];
  for (int64_t s = begin; s < end; ++s) {
    const T* const x = static_cast<const T*>(a.x) + s * a.x_row_stride;
    for (int64_t j = a.offsets[s]; j < a.offsets[s + 1]; ++j) {
      if (j + kAhead < last && a.index[j + kAhead] >= 0)
        fetch(m + a.index[j + kAhead] * a.m_row_stride, bytes);
      out[j] = a.index[j] < 0 ? -S(__builtin_inff()) : S(dot(x, m + a.index[j] * a.m_row_stride, a.dim));
    }
  }
}

template <class T>
void sums_of(const GatheredSums& a, int64_t begin, int64_t end, void* scratch) {
  using S = typename Acc<T>::S;
  using V = VectorOf<S>;
  constexpr int64_t L = Lanes<S>::n;
  const T* const m = static_cast<const T*>(a.m);
  const S* const weights = static_cast<const S*>(a.weights);
  S* const sum = static_cast<S*>(scratch);
  const int64_t bytes = a.dim * int64_t(sizeof(T)), last = a.offsets[end];
  const auto counts = [&](int64_t j) { return a.index[j] >= 0 && weights[j] != 0; };
  for (int64_t s = begin; s < end; ++s) {
    for (int64_t i = 0; i < a.dim; i += L) store(sum + i, V{});
    for (int64_t j = a.offsets[s]; j < a.offsets[s + 1]; ++j) {
      if (j + kAhead < last && counts(j + kAhead)) fetch(m + a.index[j + kAhead] * a.m_row_stride, bytes);
      if (!counts(j)) continue;
      const T* const row = m + a.index[j] * a.m_row_stride;
      const V weight = V{} + weights[j];
      int64_t i = 0;
      for (; i + L <= a.dim; i += L) store(sum + i, load(sum + i) + weight * load(row + i));
      if (i < a.dim) store(sum + i, load(sum + i) + weight * load_n(row + i, a.dim - i));
    }
    T* const out = static_cast<T*>(a.out) + s * a.out_row_stride;
    int64_t i = 0;
    for (; i + L <= a.dim; i += L) store(out + i, load(sum + i));
    if (i < a.dim) store_n(out + i, load(sum + i), a.dim - i);
  }
}

void dots(const GatheredDots& a, int64_t begin, int64_t end) {
  switch (Dtype(a.dtype)) {
    case kFloat32:
      return dots_of<float>(a, begin, end);
    case kBFloat16:
      return dots_of<BF16>(a, begin, end);
    case kFloat16:
      return dots_of<F16>(a, begin, end);
    case kFloat64:
      return dots_of<double>(a, begin, end);
  }
  FASTLOSS_UNREACHABLE();
}

void sums(const GatheredSums& a, int64_t begin, int64_t end, void* scratch) {
  switch (Dtype(a.dtype)) {
    case kFloat32:
      return sums_of<float>(a, begin, end, scratch);
    case kBFloat16:
      return sums_of<BF16>(a, begin, end, scratch);
    case kFloat16:
      return sums_of<F16>(a, begin, end, scratch);
    case kFloat64:
      return sums_of<double>(a, begin, end, scratch);
  }
  FASTLOSS_UNREACHABLE();
}

int64_t scratch_bytes(int64_t dim) { return (dim + 16) * int64_t(sizeof(double)); }

}  // namespace

extern const GatherKernels gather_kernels;
const GatherKernels gather_kernels = {scratch_bytes, dots, sums};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
