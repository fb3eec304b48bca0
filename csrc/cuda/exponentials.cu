// E_v = 2^((z_v - z_t) log2 e) slope_v over a row's bfloat16 logits, its cross-entropy, and what E is to be
// multiplied by: row_exponentials of docs/engine.md. Reads the row once and writes it once, 4 V bytes, with
// one exponential an element; a row whose exponentials do not fit is zeroed (2 V more) and marked. One block
// per row, whose threads follow from V alone; a pack stays with the thread that read it.
#include "exponentials.h"

#include <algorithm>

#include "block_sum.h"
#include "common/row_terms.h"
#include "gradient.h"
#include "launch.h"

namespace fastloss::cuda {
namespace {

constexpr float kMost = 1208925819614629174706176.0f;  // 2^80: of a sum of exponentials, a loss of 55
constexpr int kPacksPerThread = 4;
constexpr int64_t kMaxVocab = int64_t(1) << 30;  // indices within a row are 32-bit

// `own`: the target's value, which all others are taken relative to: raw logits, or z. `unit`: scale and log2
// e.
template <class T, bool General>
__device__ inline float write_exponentials(T* x, int vocab, int t, const float* bias,
                                           const Transform<General>& transform, float unit, float own) {
  constexpr int N = Pack<T>::N, U = General ? 2 : 4;  // loads in flight
  if (!General) bias = nullptr;
  const int packs = vocab / N, step = blockDim.x;
  const bool aligned = is_aligned(x), bias_aligned = is_aligned(bias);
  const auto exponential = [&](float logit, float b, float* slope) {
    const float u = transform.value(logit, b, slope);
    return approximate_exp2((u - own) * unit);
  };
  float sum = 0;
  const auto write = [&](int j, const Pack<T>& pack) {
    float b[N], e[N], slope[N], part = 0;
    load_floats(bias, j * N, bias_aligned, 0.0f, b);
#pragma unroll
    for (int k = 0; k < N; ++k) e[k] = exponential(pack[k], b[k], &slope[k]);
    const int target_at = t - j * N;
    if (unsigned(target_at) < unsigned(N)) {
#pragma unroll
      for (int k = 0; k < N; ++k) e[k] = k == target_at ? 0.0f : e[k];
    }
#pragma unroll
    for (int k = 0; k < N; ++k) part += e[k];
    sum += part;
    if constexpr (General) {
#pragma unroll
      for (int k = 0; k < N; ++k) e[k] *= slope[k];
    }
    store_anywhere(x + j * N, e, aligned);
  };
  const int first = threadIdx.x;
  if (aligned) {
    for_each_pack<U>(first, packs, step, [&](int j) { return load_pack(x + j * N, true); }, write);
  } else {
    for_each_pack<U>(first, packs, step, [&](int j) { return load_pack_unaligned(x + j * N); }, write);
  }
  for (int v = packs * N + threadIdx.x; v < vocab; v += step) {
    float slope;
    const float e = exponential(to_float(x[v]), bias ? __ldg(bias + v) : 0.0f, &slope);
    if (v != t) sum += e;
    x[v] = from_float<T>(e * slope);
  }
  return sum;
}

template <class T, bool General>
__global__ void __launch_bounds__(kMaxThreads, 2) exponentials_kernel(Logits in, Exponentials a) {
  const int vocab = int(in.vocab);
  const Transform<General> of_all(in);
  const bool leader = threadIdx.x == 0;
  const auto put = [&](int64_t row, float loss, float base, float log_sum, float multiplier, float residue,
                       bool rough) {
    a.loss[row] = loss, a.lse_parts[2 * row] = base, a.lse_parts[2 * row + 1] = log_sum;
    a.multiplier[row] = multiplier, a.residue[row] = residue, a.rough[row] = rough;
  };

  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    T* x = static_cast<T*>(a.out) + row * in.row_stride;
    const int64_t wide_t = in.target[row];
    const bool ignored = wide_t == in.ignore_index, bad = wide_t < 0 || wide_t >= in.vocab;
    if (ignored || bad) {
      fill_row(x, vocab, 0.0f, threadIdx.x, blockDim.x);
      if (leader) put(row, 0, 0, 0, 0, 0, !ignored);
      continue;
    }
    const int t = int(wide_t);
    const Transform<General> transform = of_all.of_row(in, row);
    const float x_t = to_float(x[t]);
    float slope_t;
    const float z_t = transform.z(x_t, General && in.bias ? in.bias[t] : 0.0f, &slope_t);
    __syncthreads();  // every thread has read the target's logit before one writes over it

    const float unit = General ? kLog2E : kLog2E * transform.scale, own = General ? z_t : x_t;
    double sum[1] = {write_exponentials<T, General>(x, vocab, t, in.bias, transform, unit, own)};
    block_sum(sum);  // the barriers of which also order the row's entries before the target's

    const float others = float(sum[0]);  // the sum of e^(z - z_t) without the target
    const float log_sum = log1pf(others), lse = z_t + log_sum;
    const float w_t = a.w ? a.w[t] : 1.0f;
    const auto k = cross_entropy_coefficients(a.terms, true, w_t, 0.0f, lse);
    // Comparisons that a NaN fails. The last: what the target's entry is divided by.
    const bool fits = others <= kMost && fabsf(z_t) < INFINITY &&
                      (k.b == 0.0f ? k.a == 0.0f : 16.0f * fabsf(k.b) >= fabsf(k.a));
    if (!fits) {
      fill_row(x, vocab, 0.0f, threadIdx.x, blockDim.x);
      if (leader) put(row, 0, 0, 0, 0, 0, true);
    } else if (leader) {
      // (a + b p_t) / (b / sum), without the difference of p_t and 1.
      const float at_target = k.b == 0.0f ? 0.0f : fmaf(k.a, others, k.a + k.b) / k.b * slope_t;
      const T rounded_off = from_float<T>(at_target);
      x[t] = rounded_off;
      const float factor = transform.scale * a.factor * (a.factor_tensor ? *a.factor_tensor : 1.0f);
      put(row, cross_entropy_loss(a.terms, true, w_t, log_sum, 0.0f, lse), z_t, log_sum,
          k.b / (1.0f + others) * factor, at_target - to_float(rounded_off), false);
    }
  }
}

template <bool General>
const char* launch(const Logits& in, const Exponentials& a, void* stream) {
  using T = bfloat16;
  const int64_t needed = (in.vocab / Pack<T>::N + kPacksPerThread - 1) / kPacksPerThread;
  const int threads = int(std::clamp<int64_t>((needed + kWarp - 1) / kWarp * kWarp, kWarp, kMaxThreads));
  const auto kernel = exponentials_kernel<T, General>;
  FASTLOSS_LAUNCH(kernel, dim3(unsigned(std::min<int64_t>(in.rows, kMaxBlocks))), dim3(threads), 0,
                  static_cast<cudaStream_t>(stream), in, a);
  return text_of(cudaGetLastError());
}

}  // namespace

const char* row_exponentials(const Logits& in, const Exponentials& a, void* stream) {
  if (in.rows == 0) return nullptr;
  if (in.vocab < 1 || in.vocab > kMaxVocab) return "vocab must be between 1 and 2^30";
  return in.bias || in.softcap > 0 ? launch<true>(in, a, stream) : launch<false>(in, a, stream);
}

}  // namespace fastloss::cuda
