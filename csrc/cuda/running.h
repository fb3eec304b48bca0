// The online softmax of one thread, and its combination over the block.
// Registers only, then 4 bytes per warp and sum through shared memory.
// Two barriers per row; the order of every sum is fixed by the thread's index, so the same row gives the same
// bits.
#pragma once

#include "logit_exponent.h"

namespace fastloss::cuda {

// Of logits of type T. Sums are of powers and exponents relative to the reference of the largest value so
// far, or of one whose z was less by no more than kSlack: differences of large logits stay exact. Until
// combine_over_block(), that is: then relative to the largest, or 0 where that is infinite.
template <class T, bool Extra>
struct Running {
  using Exponent = LogitExponent<T>;

  // Without it nearly every warp of every pack would take the path of a new maximum, which one thread's is
  // enough for.
  static constexpr float kSlack = 5;

  float max = -INFINITY, reference = 0;
  float limit = -INFINITY;                 // a larger value changes the reference
  float powers = 0;                        // sum of e^(z - base)
  float powers_x = 0, powers_squared = 0;  // sum of powers times exponents, of squares of powers
  float x = 0, count = 0, weight_x = 0,
        weight = 0;  // sum of exponents, of 1, of weights times exponents, of weights

  // A first maximum of -inf gives factor 0 to sums that are 0; a maximum of +inf is made NaN by the caller.
  __device__ void rebase(const Exponent& exponent, float new_max) {
    const float old_max = max, old_reference = reference;
    max = new_max, limit = new_max + kSlack / exponent.scale;
    reference = exponent.reference_of(max);
    const float shift = exponent.between(old_reference, reference);
    const float factor = fabsf(old_max) == INFINITY ? 0.0f : Exponent::power(shift);
    if constexpr (Extra) {
      powers_x = factor * fmaf(shift, powers, powers_x);
      powers_squared *= factor * factor;
      x = fmaf(shift, count, x);
      weight_x = fmaf(shift, weight, weight_x);
    }
    powers *= factor;
  }

  // fmaxf drops a NaN, but its power is NaN and stays in the sum.
  template <int N>
  __device__ void add(const Exponent& exponent, const float (&values)[N], const float (&weights)[N]) {
    float largest = values[0];
#pragma unroll
    for (int k = 1; k < N; ++k) largest = fmaxf(largest, values[k]);
    if (largest > limit) rebase(exponent, largest);
    max = fmaxf(max, largest);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float d = exponent(values[k], reference);
      const float e = Exponent::power(d);
      sum += e;
      if constexpr (Extra) {
        powers_x = fmaf(e, fmaxf(d, -200.0f), powers_x);  // 0 * -inf = 0
        powers_squared = fmaf(e, e, powers_squared);
        x += d;
        weight += weights[k];
        weight_x = fmaf(weights[k], d, weight_x);
      }
    }
    powers += sum;
    if constexpr (Extra) count += N;
  }

  // Afterwards every thread holds the whole row's sums.
  __device__ void combine_over_block(const Exponent& exponent) {
    __shared__ float maxima[kWarp], partial[7][kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;

    float m = warp_max(max);
    if (lane == 0) maxima[warp] = m;
    __syncthreads();
    m = warp_max(lane < warps ? maxima[lane] : -INFINITY);
    rebase(exponent, m);

    float sums[Extra ? 7 : 1];
    sums[0] = powers;
    if constexpr (Extra) {
      sums[1] = powers_x, sums[2] = powers_squared, sums[3] = x, sums[4] = count, sums[5] = weight_x,
      sums[6] = weight;
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
    powers = sums[0];
    if constexpr (Extra) {
      powers_x = sums[1], powers_squared = sums[2], x = sums[3], count = sums[4], weight_x = sums[5],
      weight = sums[6];
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
