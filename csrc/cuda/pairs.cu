// segment_sum, segment_expand, pair_loss and unpaired_loss of docs/sequences.md.
// Reads each input once and writes each output once: 4 bytes per token or per pair and array.
// Sums: one block per sequence. Pairs: one block walks over all of them, so that the sums need no second
// launch.
#include <algorithm>

#include "block_sum.h"
#include "pairs.h"

namespace fastloss::cuda {
namespace {

constexpr int kThreads = kMaxThreads < 256 ? kMaxThreads : 256;
constexpr int kInFlight = 4;

// Positions are dealt to threads by their place in the sequence: where it lies and what is beside it changes
// no bit.
__global__ void __launch_bounds__(kThreads) segment_sum_kernel(SegmentSum<float> a) {
  const int step = blockDim.x;
  for (int64_t s = blockIdx.x; s < a.segments.count; s += gridDim.x) {
    const int64_t end = a.segments.begin(s + 1);
    double sum[1] = {0};
    for (int64_t i = a.segments.begin(s) + threadIdx.x; i < end; i += kInFlight * step) {
      double term[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u)
        term[u] = i + u * step < end ? weighted(a.values, a.weights, i + u * step) : 0.0;
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) sum[0] += term[u];
    }
    block_sum(sum);
    if (threadIdx.x == 0) a.out[s] = float(sum[0]);
  }
}

// Sequence `count` is what lies outside all others.
__global__ void __launch_bounds__(kThreads) segment_expand_kernel(SegmentExpand<float> a) {
  const int64_t first = int64_t(blockIdx.y) * blockDim.x + threadIdx.x,
                step = int64_t(gridDim.y) * blockDim.x;
  const Segments& seg = a.segments;
  for (int64_t s = blockIdx.x; s <= seg.count; s += gridDim.x) {
    if (s == seg.count) {
      for (int64_t i = first; i < seg.begin(0); i += step) a.out[i] = 0.0f;
      for (int64_t i = seg.begin(s) + first; i < a.n; i += step) a.out[i] = 0.0f;
      continue;
    }
    const int64_t end = seg.begin(s + 1);
    const float g = a.upstream[s];
    for (int64_t i = seg.begin(s) + first; i < end; i += step) {
      const float w = a.weights ? a.weights[i] : 1.0f;
      a.out[i] = w == 0 ? 0.0f : w * g;
    }
  }
}

__global__ void __launch_bounds__(kThreads) pair_loss_kernel(PairLoss<float, float> a) {
  double tokens[1] = {double(a.pairs)};
  if (a.needs_tokens()) {
    tokens[0] = 0;
    for (int64_t i = threadIdx.x; i < a.pairs; i += blockDim.x) tokens[0] += double(a.lc[i]);
    block_sum(tokens);
  }
  const PairConstants<float> k = pair_constants(a, tokens[0]);
  double sums[kSums] = {};
  for (int64_t i = threadIdx.x; i < a.pairs; i += blockDim.x) one_pair(a, k, i, sums);
  block_sum(sums);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) a.sums[s] = float(sums[s]);
  }
}

__global__ void __launch_bounds__(kThreads) unpaired_loss_kernel(UnpairedLoss<float, float> a) {
  double sums[kSums] = {};
  const float kl = a.kl ? *a.kl : 0.0f;
  for (int64_t i = threadIdx.x; i < a.sequences; i += blockDim.x) one_sequence(a, kl, i, sums);
  block_sum(sums);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) a.sums[s] = float(sums[s]);
  }
}

const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int threads_for(int64_t elements) {
  return int(std::clamp<int64_t>((elements + kWarp - 1) / kWarp * kWarp, kWarp, kThreads));
}

}  // namespace

const char* segment_sum(const SegmentSum<float>& a, void* stream) {
  if (a.segments.count == 0) return nullptr;
  const dim3 grid(unsigned(std::min<int64_t>(a.segments.count, kMaxBlocks)));
  FASTLOSS_LAUNCH(segment_sum_kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), a);
  return last_error();
}

const char* segment_expand(const SegmentExpand<float>& a, void* stream) {
  if (a.n == 0) return nullptr;
  // Nothing is shared along a sequence: a long one is cut, each thread doing about four positions.
  const int64_t mean = a.n / (a.segments.count + 1) + 1;
  const dim3 grid(unsigned(std::min<int64_t>(a.segments.count + 1, kMaxBlocks)),
                  unsigned(std::clamp<int64_t>(mean / (4 * kThreads), 1, 64)));
  FASTLOSS_LAUNCH(segment_expand_kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), a);
  return last_error();
}

const char* pair_loss(const PairLoss<float, float>& a, void* stream) {
  FASTLOSS_LAUNCH(pair_loss_kernel, dim3(1), dim3(threads_for(a.pairs)), 0, static_cast<cudaStream_t>(stream),
                  a);
  return last_error();
}

const char* unpaired_loss(const UnpairedLoss<float, float>& a, void* stream) {
  FASTLOSS_LAUNCH(unpaired_loss_kernel, dim3(1), dim3(threads_for(a.sequences)), 0,
                  static_cast<cudaStream_t>(stream), a);
  return last_error();
}

}  // namespace fastloss::cuda
