// sum_rows and reciprocal_count of docs/engine.md: a reduction's loss, and its mean's factor.
// Reads one number a row, 4 or 8 bytes, and writes one.
// One block, so that one launch does it and the sum has one order; the caller gives no more rows than a block
// is quick with.
#include "block_sum.h"
#include "launch.h"
#include "reduce.h"

namespace fastloss::cuda {
namespace {

constexpr int kInFlight = 4;

// The sum of of(i) over i < n, in double, in every thread.
template <class Of>
__device__ inline double sum_over(int64_t n, Of of) {
  double sum[1] = {0};
  const int64_t step = blockDim.x;
  for (int64_t i = threadIdx.x; i < n; i += kInFlight * step) {
    double term[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) term[u] = i + u * step < n ? of(i + u * step) : 0.0;
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) sum[0] += term[u];
  }
  block_sum(sum);
  return sum[0];
}

__global__ void __launch_bounds__(kMaxThreads) sum_rows_kernel(Total a) {
  const double sum = sum_over(a.n, [&](int64_t i) { return double(a.values[i]); });
  if (threadIdx.x != 0) return;
  const double factor = a.factor_tensor ? double(a.factor) * double(*a.factor_tensor) : double(a.factor);
  *a.out = float(sum * factor);
}

__global__ void __launch_bounds__(kMaxThreads) reciprocal_count_kernel(Count a) {
  const double count = sum_over(a.n, [&](int64_t i) { return a.target[i] == a.ignore_index ? 0.0 : 1.0; });
  if (threadIdx.x == 0) *a.out = float(1.0 / count);
}

}  // namespace

const char* sum_rows(const Total& a, void* stream) {
  FASTLOSS_LAUNCH(sum_rows_kernel, dim3(1), dim3(kMaxThreads), 0, static_cast<cudaStream_t>(stream), a);
  return text_of(cudaGetLastError());
}

const char* reciprocal_count(const Count& a, void* stream) {
  FASTLOSS_LAUNCH(reciprocal_count_kernel, dim3(1), dim3(kMaxThreads), 0, static_cast<cudaStream_t>(stream),
                  a);
  return text_of(cudaGetLastError());
}

}  // namespace fastloss::cuda
