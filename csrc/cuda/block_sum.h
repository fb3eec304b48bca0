// Sums over the threads of a block in double, in a fixed tree: the same bits for the same block size.
// 8 bytes per warp and sum through shared memory.
// Two barriers; afterwards every thread holds the sums.
#pragma once

#include <cstdint>

#include "platform.h"

namespace fastloss::cuda {

// An exchange by xor adds the same two numbers in both lanes: all lanes end with the same bits.
__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// Every thread of the block calls it. The leading barrier lets it be called again at once.
template <int N>
__device__ inline void block_sum(double (&sums)[N]) {
  __shared__ double partial[N][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sums[i] = warp_sum(sums[i]);
    if (lane == 0) partial[i][warp] = sums[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) sums[i] = warp_sum(lane < warps ? partial[i][lane] : 0.0);
}

}  // namespace fastloss::cuda
