// gae and discounted_returns of docs/sequences.md: A_t = δ_t + γλ A_next, δ_t = r_t + γ V_next - V_t; G_t
// = r_t + γ G_next. Reads rewards, values and mask once, writes advantages and returns once: 17 bytes per
// token (9 without values). One block per sequence, tiles of tokens from its end: x = b + a x_next is a pair
// (a, b) per token, and pairs compose, so that a tile is a scan over the threads and the tile before it one
// more pair. Pairs of the recurrence are double: a float a^k is worse than the loop's k roundings, and memory
// bounds the kernel.
#include <algorithm>
#include <cstdint>

#include "platform.h"
#include "policy.h"

namespace fastloss::cuda {
namespace {

constexpr int kThreads = kMaxThreads < 256 ? kMaxThreads : 256;
constexpr int kPerThread = 4;
template <class S>
struct Pair {
  S a, b;

  // a = 0 takes nothing, not even a NaN.
  __device__ S of(S next) const { return a == S(0) ? b : fma(a, next, b); }
  __device__ Pair after(Pair next) const { return {a * next.a, of(next.b)}; }
};

template <class S>
struct Scanned {
  S before, all;
};

// The pairs of the threads before this one (later tokens), and of all, composed with `carry`.
template <class S>
__device__ inline Scanned<S> scan_block(Pair<S> mine, S carry, Pair<S>* totals) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const Pair<S> next = {__shfl_up_sync(0xffffffffu, mine.a, distance),
                          __shfl_up_sync(0xffffffffu, mine.b, distance)};
    if (lane >= distance) mine = mine.after(next);
  }
  __syncthreads();  // totals may still be read for an earlier scan
  if (lane == kWarp - 1) totals[warp] = mine;
  Pair<S> before = {__shfl_up_sync(0xffffffffu, mine.a, 1), __shfl_up_sync(0xffffffffu, mine.b, 1)};
  if (lane == 0) before = {S(1), S(0)};
  __syncthreads();
  S x = carry, at_warp = x;
  for (int w = 0; w < warps; ++w) {
    if (w == warp) at_warp = x;
    x = totals[w].of(x);
  }
  return {before.of(at_warp), x};
}

template <bool Values>
__global__ void __launch_bounds__(kThreads, 1) scan_kernel(Scan a) {
  __shared__ Pair<float> value_totals[kWarp];
  __shared__ Pair<double> totals[kWarp];
  const float *rewards = static_cast<const float*>(a.rewards), *values = static_cast<const float*>(a.values);
  float *advantages = static_cast<float*>(a.advantages), *returns = static_cast<float*>(a.returns);
  const double gamma = a.gamma, decay = Values ? a.gamma * a.lam : gamma;
  const int tile = blockDim.x * kPerThread;

  for (int64_t s = blockIdx.x; s < a.count; s += gridDim.x) {
    const int64_t begin = a.offsets ? a.offsets[s] : s * a.length;
    const int64_t end = a.offsets ? a.offsets[s + 1] : begin + a.length;
    float value_carry = 0;
    double carry = 0;
    for (int64_t tile_end = end; tile_end > begin; tile_end -= tile) {
      // This thread's tokens, the last one first.
      const int64_t last = tile_end - 1 - int64_t(threadIdx.x) * kPerThread;
      double r[kPerThread];
      float v[kPerThread];
      bool live[kPerThread];
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        const int64_t t = last - k;
        live[k] = t >= begin && a.mask[t];
        r[k] = live[k] ? rewards[t] : 0.0;
        v[k] = Values && live[k] ? values[t] : 0.0f;
      }
      if constexpr (Values) {
        Pair<float> first_value = {1.0f, 0.0f};
#pragma unroll
        for (int k = 0; k < kPerThread; ++k)
          if (live[k]) first_value = {0.0f, v[k]};
        const Scanned<float> values_after = scan_block(first_value, value_carry, value_totals);
        value_carry = values_after.all;
        float value_next = values_after.before;
#pragma unroll
        for (int k = 0; k < kPerThread; ++k) {
          if (!live[k]) continue;
          r[k] = fma(gamma, double(value_next), r[k]) - v[k];
          value_next = v[k];
        }
      }
      Pair<double> mine = {1.0, 0.0};
#pragma unroll
      for (int k = 0; k < kPerThread; ++k)
        if (live[k]) mine = Pair<double>{decay, r[k]}.after(mine);
      const Scanned<double> after = scan_block(mine, carry, totals);
      carry = after.all;
      double x = after.before;
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        const int64_t t = last - k;
        if (live[k]) x = Pair<double>{decay, r[k]}.of(x);
        if (t < begin) continue;
        returns[t] = live[k] ? float(x + v[k]) : 0.0f;
        if (Values) advantages[t] = live[k] ? float(x) : 0.0f;
      }
    }
  }
}

}  // namespace

const char* scan(const Scan& a, void* stream) {
  if (a.count == 0) return nullptr;
  const dim3 grid(unsigned(std::min<int64_t>(a.count, kMaxBlocks)));
  const auto kernel = a.values ? scan_kernel<true> : scan_kernel<false>;
  FASTLOSS_LAUNCH(kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), a);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastloss::cuda
