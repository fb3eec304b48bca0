// row_divergence (docs/distillation.md): the sums of a divergence over a row of the student's logits and one
// of the teacher's, and the gradient by the student's, which may overwrite them. Reads both rows for the sums
// and once more, from L2 where they are still there, for the gradient, which it writes once. 16-byte packs;
// one block per row. Not tuned on a GPU: bound by instructions, by its machine code.
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
  bool bias_aligned, teacher_bias_aligned;
};

// N neighbouring classes of a row: raw logits of the student, and the probabilities of both.
template <int N>
struct Classes {
  float raw[N];
  ClassPair<float> pair[N];
  bool agree = false;  // one of them is the largest of both rows

  // `x` and `teacher` are packs, or arrays, of the logits from class v on.
  template <class X>
  __device__ Classes(const RowDivergence& a, const Row& row, const X& x, const X& teacher, int v) {
    float bias[N], teacher_bias[N];
    load_floats(a.bias, v, row.bias_aligned, 0.0f, bias);
    load_floats(a.teacher_bias, v, row.teacher_bias_aligned, 0.0f, teacher_bias);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      raw[k] = x[k] + bias[k];
      const float z = row.scale * raw[k], y = row.teacher_scale * (teacher[k] + teacher_bias[k]);
      agree |= (z == row.largest) & (y == row.teacher_largest);
      pair[k] = class_pair((y - row.teacher_largest) - row.teacher_log_sum, (z - row.largest) - row.log_sum,
                           -INFINITY);
    }
  }
};

template <DivergenceKind kind, int N>
struct Terms {
  float value[N], slope[N];

  __device__ Terms(const Classes<N>& classes, const DivergenceNumbers<float>& n) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const DivergenceTerm<float> term = divergence_of_class<kind>(classes.pair[k], n);
      value[k] = term.value, slope[k] = term.slope;
    }
  }
};

// A pack's share in float32: its terms are few and of one sign or small.
template <DivergenceKind kind, int N>
__device__ inline void add(double (&sums)[7], const Classes<N>& classes, const Terms<kind, N>& terms) {
  // Where a probability is 0: infinite if the other has mass.
  const DivergenceNumbers<float> forward_limits = {0, 0, 1, 1, INFINITY},
                                 reverse_limits = {0, 0, INFINITY, 0, 1};
  float value = 0, slope = 0, forward = 0, reverse = 0, q_log_q = 0, p_log_p = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const ClassPair<float>& c = classes.pair[k];
    value += terms.value[k], slope += terms.slope[k];
    forward += divergence_of_class<DivergenceKind::kForwardKl>(c, forward_limits).value;
    reverse += divergence_of_class<DivergenceKind::kReverseKl>(c, reverse_limits).value;
    q_log_q = fmaf(c.q, fmaxf(c.log_q, -200.0f), q_log_q);  // 0 * -inf = 0
    p_log_p = fmaf(c.p, fmaxf(c.log_p, -200.0f), p_log_p);
  }
  sums[0] += double(value), sums[1] += double(slope), sums[2] += double(forward), sums[3] += double(reverse);
  sums[4] += classes.agree ? 1.0 : 0.0;
  sums[5] += double(q_log_q), sums[6] += double(p_log_p);
}

template <class T>
struct TwoPacks {
  Pack<T> student, teacher;
};

template <class T, DivergenceKind kind>
__global__ void __launch_bounds__(kThreads, 2) divergence_kernel(RowDivergence a) {
  constexpr int N = Pack<T>::N, U = 1;
  const int vocab = int(a.vocab), packs = vocab / N, first = threadIdx.x, step = blockDim.x;
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
                     hard ? a.hard_lse_parts[2 * r + 1] : 0.0f,
                     is_aligned(a.bias),
                     is_aligned(a.teacher_bias)};
    const bool aligned = is_aligned(x) && is_aligned(teacher);
    const auto load = [&](int i) {
      return aligned ? TwoPacks<T>{load_pack(x + i * N, false), load_pack(teacher + i * N, false)}
                     : TwoPacks<T>{load_pack_unaligned(x + i * N), load_pack_unaligned(teacher + i * N)};
    };
    float slope = 0;
    if (a.slopes) {
      slope = a.slopes[r];
    } else {
      double sums[7] = {};
      for_each_pack<U>(first, packs, step, load, [&](int i, const TwoPacks<T>& pack) {
        const Classes<N> classes(a, row, pack.student, pack.teacher, i * N);
        add(sums, classes, Terms<kind, N>(classes, a.numbers));
      });
#pragma unroll 1
      for (int v = packs * N + first; v < vocab; v += step) {
        const float one[1] = {to_float(x[v])}, teachers[1] = {to_float(teacher[v])};
        const Classes<1> classes(a, row, one, teachers, v);
        add(sums, classes, Terms<kind, 1>(classes, a.numbers));
      }
      block_sum(sums);
      slope = float(sums[1]);
      if (leader && out) {
        float hard_loss = 0;
        if (hard) {
          const float raw = to_float(x[t]) + (a.bias ? __ldg(a.bias + t) : 0.0f);
          hard_loss = row.hard_log_sum - (raw - row.hard_largest);
        }
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
    const auto gradient = [&](const auto& classes, const auto& terms, int v, float* g) {
      constexpr int M = sizeof(classes.raw) / sizeof(float);
#pragma unroll
      for (int k = 0; k < M; ++k) {
        const float own = classes.pair[k].q;
        g[k] = soft * (terms.slope[k] - own * slope);
        if (hard) {
          const float q =
              row.scale == 1.0f ? own : expf((classes.raw[k] - row.hard_largest) - row.hard_log_sum);
          g[k] += of_hard * q - (v + k == t ? of_hard : 0.0f);
        }
      }
    };
    const bool grad_aligned = is_aligned(grad);
    for_each_pack<U>(first, packs, step, load, [&](int i, const TwoPacks<T>& pack) {
      const Classes<N> classes(a, row, pack.student, pack.teacher, i * N);
      float g[N];
      gradient(classes, Terms<kind, N>(classes, a.numbers), i * N, g);
      store_anywhere(grad + i * N, g, grad_aligned);
    });
#pragma unroll 1
    for (int v = packs * N + first; v < vocab; v += step) {
      const float one[1] = {to_float(x[v])}, teachers[1] = {to_float(teacher[v])};
      const Classes<1> classes(a, row, one, teachers, v);
      float g[1];
      gradient(classes, Terms<kind, 1>(classes, a.numbers), v, g);
      grad[v] = from_float<T>(g[0]);
    }
  }
}

template <class T>
auto kernel_of(DivergenceKind kind) {
  switch (kind) {
#define FASTLOSS_CASE(enumerator, name) \
  case DivergenceKind::enumerator:      \
    return divergence_kernel<T, DivergenceKind::enumerator>;
    FASTLOSS_DISTILLATION_DIVERGENCES(FASTLOSS_CASE)
#undef FASTLOSS_CASE
  }
  FASTLOSS_UNREACHABLE();
}

}  // namespace

const char* row_divergence(const RowDivergence& a, void* stream) {
  if (a.rows == 0) return nullptr;
  if (a.vocab < 1 || a.vocab > kMaxVocab) return "vocab must be between 1 and 2^30";
  return with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const dim3 grid(unsigned(std::min<int64_t>(a.rows, kMaxBlocks)));
    const auto kernel = kernel_of<T>(a.divergence);
    FASTLOSS_LAUNCH(kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), a);
    return text_of(cudaGetLastError());
  });
}

}  // namespace fastloss::cuda
