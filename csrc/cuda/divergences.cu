// row_divergence (docs/distillation.md): the sums of a divergence over a row of the student's logits and one
// of the teacher's, and the gradient by the student's, which may overwrite them. Reads both rows for the sums
// and once more, from L2 where they are still there, for the gradient, which it writes once. One block per
// row. Not tuned on a GPU. The divergence is a uniform branch, not a template argument: seven times fewer
// kernels to compile.
#include <algorithm>

#include "common/divergence_terms.h"

#include "block_sum.h"
#include "divergences.h"
#include "dtype.h"
#include "gradient.h"
#include "launch.h"

namespace fastloss::cuda {
namespace {

constexpr int kThreads = kMaxThreads < 256 ? kMaxThreads : 256;
constexpr int64_t kMaxVocab = int64_t(1) << 30;

// What a row's classes share.
struct Row {
  float scale, teacher_scale;
  float largest, log_sum, teacher_largest, teacher_log_sum, hard_largest, hard_log_sum;
};

// A class of a row: its raw logits, and what its probabilities are.
template <class T>
struct Class {
  float raw;
  bool is_largest;  // of both rows
  ClassPair<float> pair;

  __device__ Class(const RowDivergence& a, const Row& row, const T* x, const T* teacher, int v)
      : raw(to_float(x[v]) + (a.bias ? __ldg(a.bias + v) : 0.0f)) {
    const float y =
        row.teacher_scale * (to_float(teacher[v]) + (a.teacher_bias ? __ldg(a.teacher_bias + v) : 0.0f));
    const float z = row.scale * raw;
    is_largest = (z == row.largest) & (y == row.teacher_largest);
    pair = class_pair((y - row.teacher_largest) - row.teacher_log_sum, (z - row.largest) - row.log_sum,
                      -INFINITY);
  }
};

__device__ inline DivergenceTerm<float> term_of(DivergenceKind kind, const ClassPair<float>& pair,
                                                const DivergenceNumbers<float>& n) {
  switch (kind) {
#define FASTLOSS_CASE(enumerator, name) \
  case DivergenceKind::enumerator:      \
    return divergence_of_class<DivergenceKind::enumerator>(pair, n);
    FASTLOSS_DISTILLATION_DIVERGENCES(FASTLOSS_CASE)
#undef FASTLOSS_CASE
  }
  FASTLOSS_UNREACHABLE();
}

template <class T>
__global__ void __launch_bounds__(kThreads) divergence_kernel(RowDivergence a) {
  const int vocab = int(a.vocab), first = threadIdx.x, step = blockDim.x;
  const bool leader = threadIdx.x == 0;
  for (int64_t r = blockIdx.x; r < a.rows; r += gridDim.x) {
    const int64_t t = a.target ? a.target[r] : -1;
    const bool ignored = a.target && t == a.ignore_index;
    float* const out = a.sums ? a.sums + r * distillation::kSums : nullptr;
    T* const grad = a.grad ? static_cast<T*>(a.grad) + r * a.grad_row_stride : nullptr;
    if (ignored || (a.target && (t < 0 || t >= a.vocab))) {
      const float value = ignored ? 0.0f : NAN;
      for (int k = first; out && k < distillation::kSums; k += step) out[k] = value;
      if (grad) fill_row(grad, vocab, value, first, step);
      continue;
    }
    const T* const x = static_cast<const T*>(a.x) + r * a.row_stride;
    const T* const teacher = static_cast<const T*>(a.teacher) + r * a.teacher_row_stride;
    const bool hard = a.hard_lse_parts && a.target;
    const float weight = a.row_factor ? a.factor * a.row_factor[r] : a.factor;
    const Row row = {a.row_scale ? a.scale * a.row_scale[r] : a.scale,
                     a.teacher_row_scale ? a.teacher_scale * a.teacher_row_scale[r] : a.teacher_scale,
                     a.lse_parts[2 * r],
                     a.lse_parts[2 * r + 1],
                     a.teacher_lse_parts[2 * r],
                     a.teacher_lse_parts[2 * r + 1],
                     hard ? a.hard_lse_parts[2 * r] : 0.0f,
                     hard ? a.hard_lse_parts[2 * r + 1] : 0.0f};
    float slope = 0;
    if (a.slopes) {
      slope = a.slopes[r];
    } else {
      double sums[7] = {};
#pragma unroll 1
      for (int v = first; v < vocab; v += step) {
        const Class<T> c(a, row, x, teacher, v);
        const DivergenceNumbers<float> none = {0, 0, 1, 1, 1};
        DivergenceTerm<float> forward = divergence_of_class<DivergenceKind::kForwardKl>(c.pair, none),
                              reverse = divergence_of_class<DivergenceKind::kReverseKl>(c.pair, none);
        // The KLs' own limits, which `none` has not: infinite where there is mass.
        if (c.pair.no_q && c.pair.p > 0) forward.value = INFINITY;
        if (c.pair.no_p && c.pair.q > 0) reverse.value = INFINITY;
        const DivergenceTerm<float> term = term_of(a.divergence, c.pair, a.numbers);
        sums[0] += double(term.value), sums[1] += double(term.slope);
        sums[2] += double(forward.value), sums[3] += double(reverse.value);
        sums[4] += c.is_largest ? 1.0 : 0.0;
        sums[5] += double(c.pair.q * fmaxf(c.pair.log_q, -200.0f));  // 0 * -inf = 0
        sums[6] += double(c.pair.p * fmaxf(c.pair.log_p, -200.0f));
      }
      block_sum(sums);
      slope = float(sums[1]);
      if (leader && out) {
        float hard_loss = 0;
        if (hard)
          hard_loss = row.hard_log_sum - (Class<T>(a, row, x, teacher, int(t)).raw - row.hard_largest);
        out[distillation::kLoss] =
            float(double(weight) * sums[0] + double(a.hard_loss_coef) * double(hard_loss));
        out[distillation::kKl] = float(sums[2]);
        out[distillation::kReverse] = float(sums[3]);
        out[distillation::kAgreement] = sums[4] > 0 ? 1.0f : 0.0f;
        out[distillation::kEntropy] = float(-sums[5]);
        out[distillation::kTeacherEntropy] = float(-sums[6]);
        out[distillation::kHardLoss] = hard_loss;
        out[distillation::kSlope] = slope;
      }
      // The leader's target must be read before the gradient overwrites it.
      __syncthreads();
    }
    if (!grad) continue;
    const float factor = a.factors ? a.factors[r] : 1.0f;
    const float soft = factor * weight * row.scale, of_hard = factor * a.hard_loss_coef;
#pragma unroll 1
    for (int v = first; v < vocab; v += step) {
      const Class<T> c(a, row, x, teacher, v);
      float g = soft * (term_of(a.divergence, c.pair, a.numbers).slope - c.pair.q * slope);
      if (hard) {
        const float q = row.scale == 1.0f ? c.pair.q : expf((c.raw - row.hard_largest) - row.hard_log_sum);
        g += of_hard * q - (v == t ? of_hard : 0.0f);
      }
      grad[v] = from_float<T>(g);
    }
  }
}

}  // namespace

const char* row_divergence(const RowDivergence& a, void* stream) {
  if (a.rows == 0) return nullptr;
  if (a.vocab < 1 || a.vocab > kMaxVocab) return "vocab must be between 1 and 2^30";
  return with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const dim3 grid(unsigned(std::min<int64_t>(a.rows, kMaxBlocks)));
    FASTLOSS_LAUNCH(divergence_kernel<T>, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), a);
    return text_of(cudaGetLastError());
  });
}

}  // namespace fastloss::cuda
