// value_loss and kl_estimate of docs/sequences.md ("Single tokens"). value_loss reads 9 bytes per token (13
// with a clip, 4 more with shares) and writes 4; one block per part of kValuePart tokens, and the last one to
// finish adds the parts up in their order: one launch, and no atomic but the integer that counts the blocks.
// kl_estimate reads 8 bytes per token (12 backwards) and writes 4.
#include "common/token_terms.h"

#include <algorithm>

#include "block_sum.h"
#include "launch.h"
#include "policy.h"

namespace fastloss::cuda {
namespace {

constexpr int kThreads = kMaxThreads < 256 ? kMaxThreads : 256;
constexpr int kPerThread = int(kValuePart) / kThreads;

// The largest number of the block. The leading barrier lets it be called again at once.
template <class T>
__device__ inline T block_max(T x) {
  __shared__ T partial[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, x, distance);
    x = other > x ? other : x;
  }
  __syncthreads();
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  x = partial[0];
  for (int w = 1; w < warps; ++w) x = partial[w] > x ? partial[w] : x;
  return x;
}

constexpr float kNone = -3.402823466e38f;  // below every number

// What the moments of the block count from: the largest of its numbers, one of them, so that numbers that are
// all the same have no variance.
__device__ inline float from_of(float largest) { return largest > kNone ? largest : 0.0f; }

__device__ void one_part(const ValueLoss& call, int64_t part) {
  const float *values = static_cast<const float*>(call.values),
              *returns = static_cast<const float*>(call.returns);
  const float *olds = static_cast<const float*>(call.old), *shares = static_cast<const float*>(call.share);
  float* const grad = static_cast<float*>(call.grad);
  const float range = float(call.clip_range);
  const int64_t begin = part * kValuePart + threadIdx.x;
  float target[kPerThread], missed[kPerThread];
  bool live[kPerThread];
  float largest_return = kNone, largest_missed = kNone;
  double sums[4] = {};  // tokens, clipped, loss, values
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t i = begin + int64_t(k) * blockDim.x;
    const bool there = i < call.n;
    live[k] = there && call.mask[i];
    target[k] = live[k] ? returns[i] : 0.0f;
    const float value = live[k] ? values[i] : 0.0f;
    const float old = live[k] && olds ? olds[i] : 0.0f, share = live[k] && shares ? shares[i] : 1.0f;
    const ValueTerm<float> term = value_term(value, target[k], old, olds != nullptr, range);
    missed[k] = target[k] - value;
    if (there) grad[i] = live[k] ? share * term.slope : 0.0f;
    if (!live[k]) continue;
    largest_return = target[k] > largest_return ? target[k] : largest_return;
    largest_missed = missed[k] > largest_missed ? missed[k] : largest_missed;
    sums[0] += 1.0, sums[1] += term.clipped ? 1.0 : 0.0;
    sums[2] += double(share * term.loss), sums[3] += double(value);
  }
  const float returns_from = from_of(block_max(largest_return));
  const float missed_from = from_of(block_max(largest_missed));
  double moments[4] = {};  // sums and squares of returns, and of what the values miss
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const double r = live[k] ? double(target[k]) - returns_from : 0.0;
    const double m = live[k] ? double(missed[k]) - missed_from : 0.0;
    moments[0] += r, moments[1] += r * r, moments[2] += m, moments[3] += m * m;
  }
  block_sum(sums), block_sum(moments);
  if (threadIdx.x != 0) return;
  const Moments r = moments_of(sums[0], returns_from, moments[0], moments[1]);
  const Moments m = moments_of(sums[0], missed_from, moments[2], moments[3]);
  call.parts[part] = {sums[0], sums[1], sums[2], sums[3], r.mean, r.squares, m.mean, m.squares};
}

__device__ void finish(const ValueLoss& call, int64_t count) {
  double returns_from = -INFINITY, missed_from = -INFINITY;
  for (int64_t part = threadIdx.x; part < count; part += blockDim.x) {
    const ValuePart& p = call.parts[part];
    if (!(p.tokens > 0)) continue;
    returns_from = p.returns_mean > returns_from ? p.returns_mean : returns_from;
    missed_from = p.missed_mean > missed_from ? p.missed_mean : missed_from;
  }
  returns_from = block_max(returns_from), missed_from = block_max(missed_from);
  if (!(returns_from > -INFINITY)) returns_from = 0;  // no token, or all are NaN
  if (!(missed_from > -INFINITY)) missed_from = 0;
  ValueTotal mine = {};
  for (int64_t part = threadIdx.x; part < count; part += blockDim.x) {
    mine.add(call.parts[part], returns_from, missed_from);
  }
  double all[8] = {mine.tokens,  mine.clipped,         mine.loss,   mine.values,
                   mine.returns, mine.returns_squares, mine.missed, mine.missed_squares};
  block_sum(all);
  if (threadIdx.x != 0) return;
  put_value<float>(call, {all[0], all[1], all[2], all[3], all[4], all[5], all[6], all[7]});
}

__global__ void __launch_bounds__(kThreads) value_loss_kernel(ValueLoss call, int64_t count) {
  for (int64_t part = blockIdx.x; part < count; part += gridDim.x) one_part(call, part);
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    __threadfence();  // the parts, which this thread wrote, before the count
    is_last = atomicAdd(call.ticket, 1u) == gridDim.x - 1;
    if (is_last) atomicExch(call.ticket, 0u);
    __threadfence();
  }
  __syncthreads();
  if (is_last) finish(call, count);
}

template <bool backwards>
__global__ void __launch_bounds__(kThreads) kl_estimate_kernel(KlEstimate call, Options<float> o) {
  const float *logprobs = static_cast<const float*>(call.logprobs),
              *ref = static_cast<const float*>(call.ref);
  const float* const upstream = static_cast<const float*>(call.upstream);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < call.n; i += step) {
    float slope;
    const float kl = kl_of(o, ref[i] - logprobs[i], &slope);
    static_cast<float*>(call.out)[i] = backwards ? upstream[i] * slope : kl;
  }
}

}  // namespace

const char* value_loss(const ValueLoss& call, void* stream) {
  const int64_t count = call.count();
  const dim3 grid(unsigned(std::clamp<int64_t>(count, 1, kMaxBlocks)));
  FASTLOSS_LAUNCH(value_loss_kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), call, count);
  return text_of(cudaGetLastError());
}

const char* kl_estimate(const KlEstimate& call, void* stream) {
  if (call.n == 0) return nullptr;
  Options<float> o = {};
  o.kl_kind = call.kind;
  const dim3 grid(unsigned(std::min<int64_t>((call.n + kThreads - 1) / kThreads, kMaxBlocks)));
  const auto kernel = call.upstream ? kl_estimate_kernel<true> : kl_estimate_kernel<false>;
  FASTLOSS_LAUNCH(kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), call, o);
  return text_of(cudaGetLastError());
}

}  // namespace fastloss::cuda
