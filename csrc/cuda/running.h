// The online softmax of one thread, and its combination over the block.
// Registers only, then 4 bytes per warp and sum through shared memory.
// Two barriers per row; the order of every sum is fixed by the thread's index, so the same row gives the same
// bits.
#pragma once

#include "dtype.h"

namespace fastloss::cuda {

// Of logits of type T. Sums are relative to base(), the maximum so far, or 0 while that is infinite:
// differences of large logits stay exact.
template <class T, bool Extra>
struct Running {
  float max = -INFINITY;
  float exps = 0;                         // sum of e^(z - base)
  float exps_z = 0, exps_squared = 0;     // sum of e (z - base), of e^2
  float z = 0, count = 0, wz = 0, w = 0;  // sum of z - base, of 1, of w (z - base), of w

  __device__ static float base_of(float max) { return fabsf(max) == INFINITY ? 0.0f : max; }
  __device__ float base() const { return base_of(max); }

  // A first maximum of -inf gives factor 0 to sums that are 0; a maximum of +inf is made NaN by finish().
  __device__ void rebase(float new_max) {
    const float new_base = base_of(new_max);
    const float factor = exp_of_logit<T>(max - new_base);
    if constexpr (Extra) {
      const float shift = base() - new_base;
      exps_z = factor * fmaf(shift, exps, exps_z);
      exps_squared *= factor * factor;
      z = fmaf(shift, count, z);
      wz = fmaf(shift, w, wz);
    }
    exps *= factor;
    max = new_max;
  }

  // fmaxf drops a NaN, but its exponential is NaN and stays in the sum.
  template <int N>
  __device__ void add(const float (&values)[N], const float (&weights)[N]) {
    float new_max = max;
#pragma unroll
    for (int k = 0; k < N; ++k) new_max = fmaxf(new_max, values[k]);
    rebase(new_max);
    const float new_base = base();
    float sum = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float d = values[k] - new_base;
      const float e = exp_of_logit<T>(d);
      sum += e;
      if constexpr (Extra) {
        exps_z = fmaf(e, fmaxf(d, -200.0f), exps_z);  // 0 * -inf = 0
        exps_squared = fmaf(e, e, exps_squared);
        z += d;
        w += weights[k];
        wz = fmaf(weights[k], d, wz);
      }
    }
    exps += sum;
    if constexpr (Extra) count += N;
  }

  // Afterwards every thread holds the whole row's sums.
  __device__ void combine_over_block() {
    __shared__ float maxima[kWarp], partial[7][kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;

    float m = warp_max(max);
    if (lane == 0) maxima[warp] = m;
    __syncthreads();
    m = warp_max(lane < warps ? maxima[lane] : -INFINITY);
    rebase(m);

    float sums[Extra ? 7 : 1];
    sums[0] = exps;
    if constexpr (Extra) {
      sums[1] = exps_z, sums[2] = exps_squared, sums[3] = z, sums[4] = count, sums[5] = wz, sums[6] = w;
    }
#pragma unroll
    for (int i = 0; i < (Extra ? 7 : 1); ++i) {
      sums[i] = warp_sum(sums[i]);
      if (lane == 0) partial[i][warp] = sums[i];
    }
    // A thread that is ahead writes maxima of the next row only after this barrier, and partial after the
    // next one's first.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < (Extra ? 7 : 1); ++i) sums[i] = warp_sum(lane < warps ? partial[i][lane] : 0.0f);
    exps = sums[0];
    if constexpr (Extra) {
      exps_z = sums[1], exps_squared = sums[2], z = sums[3], count = sums[4], wz = sums[5], w = sums[6];
    }
  }

  // An exchange by xor adds the same two numbers in both lanes: all lanes end with the same bits.
  __device__ static float warp_sum(float x) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
  }

  __device__ static float warp_max(float x) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
    return x;
  }
};

}  // namespace fastloss::cuda
