// policy_loss of docs/sequences.md: each token's loss by csrc/common/policy_terms.h, its gradient, the sums
// of out[16]. Reads each input once (twice where the sequence has a weight of its own), writes the gradient
// once. One block per sequence, so that a sequence's weight and sums stay in the block; the last block to
// finish adds the sequences' sums up in their order: one launch, and no atomic but the integer that counts
// the blocks.
#include "common/policy_terms.h"

#include <algorithm>

#include "block_sum.h"
#include "policy.h"

namespace fastloss::cuda {
namespace {

constexpr int kThreads = kMaxThreads < 256 ? kMaxThreads : 256;

// The inputs with their type, and the token at hand.
struct Reader {
  const policy::Call& call;
  const Options<float>& o;
  float advantage;  // of the sequence
  int64_t i;

  __device__ float at(const void* p) const { return static_cast<const float*>(p)[i]; }
  __device__ float advantages() const { return call.advantage_of_sequence ? advantage : at(call.advantages); }
  __device__ float log_ratio(float logprob) const {
    return call.old ? logprob - at(call.old) : logprob - logprob;
  }
  __device__ float old_or(float logprob) const { return call.old ? at(call.old) : logprob; }
  __device__ float mismatch(float logprob) const {
    return zero_nan(old_or(logprob) - at(call.sampler), 0.0f);
  }
  __device__ float off_policy(float logprob) const {
    return zero_nan((call.sampler ? at(call.sampler) : old_or(logprob)) - logprob, 0.0f);
  }

  __device__ Token<float> token() const {
    Token<float> t;
    t.logprob = at(call.logprobs);
    t.advantage = advantages();
    const float raw = log_ratio(t.logprob);
    t.lr = clamped(raw, float(-kMaxLogRatio), float(kMaxLogRatio));
    t.lr_slope = within(raw, float(-kMaxLogRatio), float(kMaxLogRatio));
    t.ref = call.ref ? at(call.ref) : 0.0f;
    t.entropy = call.entropy ? at(call.entropy) : 0.0f;
    t.weight = call.token_weight ? at(call.token_weight) : 0.0f;
    t.d = o.correction != policy::Correction::kNone ? mismatch(t.logprob) : 0.0f;
    t.selected = call.select && call.select[i];
    return t;
  }
};

// The smallest of a number over the block; the leading barrier lets it be called again at once.
template <class T>
__device__ T block_min(T x) {
  __shared__ T partial[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, x, distance);
    x = other < x ? other : x;
  }
  __syncthreads();
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  for (int w = 0; w < warps; ++w) x = partial[w] < x ? partial[w] : x;
  return x;
}

__device__ Sequence<float> prelude(Reader in, int64_t begin, int64_t end) {
  double sums[6] = {};
  int64_t first = end;
  for (in.i = begin + threadIdx.x; in.i < end; in.i += blockDim.x) {
    if (!in.call.mask[in.i]) continue;
    first = in.i < first ? in.i : first;
    const float logprob = in.at(in.call.logprobs);
    const float lr = clamped(in.log_ratio(logprob), float(-kMaxLogRatio), float(kMaxLogRatio));
    sums[0] += 1.0, sums[1] += double(lr);
    if (in.o.level == policy::Level::kGeometric) {
      bool slope;
      sums[2] += double(one_sided(in.o, lr, in.advantages(), &slope));
    }
    if (in.o.correction != policy::Correction::kNone) {
      const float d = in.mismatch(logprob);
      sums[3] += double(d), sums[4] += double(log_correction(in.o, d));
    }
    if (in.o.off_policy_threshold < INFINITY) sums[5] += double(in.off_policy(logprob));
  }
  block_sum(sums);
  float first_advantage = 0;
  if (in.o.off_policy_threshold < INFINITY) {
    in.i = block_min(first);
    if (in.i < end) first_advantage = in.advantages();
  }
  const SequenceSums<double> all = {sums[0], sums[1], sums[2], sums[3], sums[4], sums[5]};
  return sequence_of(in.o, all, first_advantage);
}

__device__ void one_sequence(const policy::Call& call, const Options<float>& o, int64_t index) {
  const int64_t begin = begin_of(call, index), end = end_of(call, index);
  float *grad = static_cast<float*>(call.grad), *grad_entropy = static_cast<float*>(call.grad_entropy);
  Reader in = {call, o, call.advantage_of_sequence ? static_cast<const float*>(call.advantages)[index] : 0.0f,
               0};
  const Sequence<float> sequence = needs_sums(o, call.agg != nullptr)
                                       ? prelude(in, begin, end)
                                       : sequence_of(o, SequenceSums<double>{}, 0.0f);

  float sum[policy::kSums] = {}, common = 0, min = INFINITY, max = -INFINITY;
  for (in.i = begin + threadIdx.x; in.i < end; in.i += blockDim.x) {
    const int64_t i = in.i;
    if (!call.mask[i]) {
      grad[i] = 0;
      if (grad_entropy) grad_entropy[i] = 0;
      continue;
    }
    const Token<float> token = in.token();
    const Terms<float> terms = terms_of(o, call, sequence, token);
    const float share = call.agg ? in.at(call.agg) : sequence.share;
    float slope = terms.dlogprob;
    if (o.level == policy::Level::kToken) {
      slope += token.lr_slope ? terms.dw : 0.0f;
    } else {
      common += share * terms.dw;
    }
    grad[i] = share * slope;
    if (grad_entropy) grad_entropy[i] = -o.entropy_coef * share;

    sum[policy::kLoss] += share * terms.loss, sum[policy::kPolicy] += share * terms.policy;
    sum[policy::kTokens] += 1.0f;
    sum[policy::kLowClipped] += terms.low ? 1.0f : 0.0f;
    sum[policy::kHighClipped] += terms.high ? 1.0f : 0.0f;
    sum[policy::kDualClipped] += terms.dual ? 1.0f : 0.0f;
    sum[policy::kCut] += terms.cut ? 1.0f : 0.0f;
    sum[policy::kK1Sum] -= token.lr, sum[policy::kK3Sum] += terms.k3, sum[policy::kKl] += terms.kl;
    sum[policy::kEntropy] += token.entropy;
    sum[policy::kRatioSum] += terms.rho, sum[policy::kRatioSquared] += terms.rho * terms.rho;
    min = terms.rho < min ? terms.rho : min, max = terms.rho > max ? terms.rho : max;
  }

  double all[policy::kSums + 1];
#pragma unroll
  for (int k = 0; k < policy::kSums; ++k) all[k] = double(sum[k]);
  all[policy::kSums] = double(common);
  block_sum(all);
  min = block_min(min), max = -block_min(-max);
  if (threadIdx.x == 0) {
    all[policy::kMinRatio] = double(min), all[policy::kMaxRatio] = double(max);
#pragma unroll
    for (int k = 0; k < policy::kSums; ++k) call.sums[index * policy::kSums + k] = all[k];
  }
  if (o.level == policy::Level::kToken) return;

  // What the weight shared by all tokens passes on to each.
  const float passed = float(all[policy::kSums] * double(sequence.w_slope));
  for (in.i = begin + threadIdx.x; in.i < end; in.i += blockDim.x) {
    if (!call.mask[in.i]) continue;
    const float raw = in.log_ratio(in.at(call.logprobs));
    bool slope = within(raw, float(-kMaxLogRatio), float(kMaxLogRatio));
    if (o.level == policy::Level::kGeometric) {
      bool lets_through;
      one_sided(o, clamped(raw, float(-kMaxLogRatio), float(kMaxLogRatio)), in.advantages(), &lets_through);
      slope = slope && lets_through;
    }
    if (slope) grad[in.i] += passed;
  }
}

// The sequences' sums, in order: thread (row, k) adds every rows-th, thread k the rows.
__device__ void finish(const policy::Call& call) {
  __shared__ double partial[kThreads];
  const int k = threadIdx.x % policy::kSums, rows = blockDim.x / policy::kSums;
  const bool is_min = k == policy::kMinRatio, is_max = k == policy::kMaxRatio;
  const auto combine = [&](double a, double b) {
    return is_min ? (b < a ? b : a) : is_max ? (b > a ? b : a) : a + b;
  };
  double total = is_min ? INFINITY : is_max ? -INFINITY : 0.0;
  for (int64_t s = threadIdx.x / policy::kSums; s < call.count; s += rows)
    total = combine(total, __ldcg(&call.sums[s * policy::kSums + k]));
  partial[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x < policy::kSums) {
    for (int row = 1; row < rows; ++row) total = combine(total, partial[row * policy::kSums + k]);
    partial[k] = total;
  }
  __syncthreads();
  if (threadIdx.x >= policy::kSums) return;
  const double tokens = partial[policy::kTokens];
  double divisor = call.by_tokens ? (tokens > 1.0 ? tokens : 1.0) : call.divisor;
  if (call.has_normalizer) {
    const float* p = static_cast<const float*>(call.normalizer_ptr);
    divisor = (p ? double(*p) : call.normalizer) * call.normalizer_factor;
  }
  if (k == policy::kScale) total = 1.0 / divisor;
  if (k == policy::kLoss) total /= divisor;
  if ((is_min || is_max) && tokens == 0.0) total = 1.0;
  // Comparisons pass over a NaN, sums keep it: ratios are bounded, so only a NaN ratio makes their sum one.
  const double ratios = partial[policy::kRatioSum];
  if ((is_min || is_max) && ratios != ratios) total = ratios;
  static_cast<float*>(call.out)[k] = float(total);
}

__global__ void __launch_bounds__(kThreads) policy_loss_kernel(policy::Call call, Options<float> o) {
  for (int64_t s = blockIdx.x; s < call.count; s += gridDim.x) one_sequence(call, o, s);
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    __threadfence();  // the sums, which this thread wrote, before the count
    is_last = atomicAdd(call.ticket, 1u) == gridDim.x - 1;
    if (is_last) atomicExch(call.ticket, 0u);
    __threadfence();
  }
  __syncthreads();
  if (is_last) finish(call);
}

}  // namespace

const char* policy_loss(const policy::Call& call, void* stream) {
  const dim3 grid(unsigned(std::clamp<int64_t>(call.count, 1, kMaxBlocks)));
  FASTLOSS_LAUNCH(policy_loss_kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), call,
                  call.options.as<float>());
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastloss::cuda
