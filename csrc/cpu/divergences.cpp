// row_divergence (docs/distillation.md): the sums of a divergence over a row of the student's logits and one
// of the teacher's, and the gradient by the student's, which may overwrite them. Reads both rows once for the
// sums and once more, from the cache, for the gradient, which it writes once. One row at a time in blocks of
// 2048 logits, which stay in L1. Built once per instruction set, as rows.cpp.

#ifndef FASTLOSS_ISA
#error "divergences.cpp is compiled once per instruction set, with -DFASTLOSS_ISA=avx512, avx2 or generic"
#endif

#include "divergences.h"

#include "common/divergence_terms.h"
#include "lane_sums.h"
#include "row_math.h"

namespace fastloss {
namespace FASTLOSS_ISA {
namespace {

using distillation::Divergence;

constexpr int64_t kFlush = 32;  // vectors that are added up in S before the sums go to double

template <class S>
DivergenceNumbers<S> numbers_in(const DivergenceNumbers<double>& n) {
  return {S(n.w), S(n.rest), S(n.value_no_p), S(n.slope_no_p), S(n.value_no_q)};
}

// What a row's classes share.
template <class S>
struct Row {
  S largest, log_sum, teacher_largest, teacher_log_sum;
  S hard_largest, hard_log_sum;
  DivergenceNumbers<S> numbers;

  using V = VectorOf<S>;
  FASTLOSS_INLINE ClassPair<V> pair(V z, V y) const {
    return class_pair((y - teacher_largest) - teacher_log_sum, (z - largest) - log_sum, -S(__builtin_inff()));
  }
};

template <class S>
struct Sums {
  Sum<S> value, slope, kl, reverse_kl, entropy, teacher_entropy;

  FASTLOSS_INLINE void flush() {
    value.flush(), slope.flush(), kl.flush(), reverse_kl.flush(), entropy.flush(), teacher_entropy.flush();
  }
};

// Whole vectors of z and y, the last padded with -inf: a class that neither has adds nothing.
template <Divergence kind, class S>
FASTLOSS_INLINE bool add_block(const Row<S>& row, const S* z, const S* y, int64_t n, Sums<S>* sums) {
  using V = VectorOf<S>;
  constexpr int64_t L = Lanes<S>::n;
  const DivergenceNumbers<S> forward = {S(0), S(0), S(1), S(1), S(__builtin_inff())},
                             reverse = {S(0), S(0), S(__builtin_inff()), S(0), S(1)};
  const V least = V{} + lowest_finite<S>();
  auto both = V{} < V{};
  for (int64_t begin = 0; begin < n; begin += kFlush * L) {
    const int64_t end = begin + kFlush * L < n ? begin + kFlush * L : n;
    for (int64_t i = begin; i < end; i += L) {
      const V zi = load(z + i), yi = load(y + i);
      both |= (zi == row.largest) & (yi == row.teacher_largest);
      const ClassPair<V> c = row.pair(zi, yi);
      const DivergenceTerm<V> f = divergence_of_class<Divergence::kForwardKl>(c, forward),
                              r = divergence_of_class<Divergence::kReverseKl>(c, reverse);
      const DivergenceTerm<V> term = kind == Divergence::kForwardKl ? f
                                     : kind == Divergence::kReverseKl
                                         ? r
                                         : divergence_of_class<kind>(c, row.numbers);
      sums->value += term.value, sums->slope += term.slope;
      sums->kl += f.value, sums->reverse_kl += r.value;
      sums->entropy += c.q * (c.log_q > least ? c.log_q : least);  // 0 * -inf = 0
      sums->teacher_entropy += c.p * (c.log_p > least ? c.log_p : least);
    }
    sums->flush();
  }
  return any_lane(both);
}

// The gradient of a vector of classes, without the target's own part.
template <Divergence kind, bool hard, class S, class V = VectorOf<S>>
FASTLOSS_INLINE V gradient_of(const Row<S>& row, V z, V y, V raw, S slope, S soft_factor, S hard_factor,
                              bool same) {
  const ClassPair<V> c = row.pair(z, y);
  const DivergenceTerm<V> term = divergence_of_class<kind>(c, row.numbers);
  V g = soft_factor * (term.slope - c.q * slope);
  if (hard) {
    g += hard_factor * (same ? c.q : exponential_of((raw - row.hard_largest) - row.hard_log_sum));
  }
  return g;
}

template <class S>
struct Scratch {
  S *z, *y, *raw;

  explicit Scratch(void* memory) : z(static_cast<S*>(memory)), y(z + kBlock), raw(y + kBlock) {}
};

template <class T, class S = typename Acc<T>::S>
S logit(const T* x, const void* bias, int64_t v) {
  return load_n(x + v, 1)[0] + (bias ? static_cast<const S*>(bias)[v] : S(0));
}

template <class T, Divergence kind>
void rows_of(const RowDivergence& a, int64_t begin, int64_t end, void* memory) {
  using S = typename Acc<T>::S;
  using V = VectorOf<S>;
  const Scratch<S> scratch(memory);
  const Logits student = {a.x,    a.dtype, a.rows, a.vocab,    a.row_stride, a.target, a.ignore_index,
                          a.bias, a.scale, 0.0,    a.row_scale};
  Logits teacher = student, plain = student;
  teacher.bias = a.teacher_bias, teacher.scale = a.teacher_scale, teacher.row_scale = a.teacher_row_scale;
  plain.scale = 1.0, plain.row_scale = nullptr;
  const Transform<T> of_students(student), of_teachers(teacher), to_raw(plain);
  Row<S> row = {};
  row.numbers = numbers_in<S>(a.numbers);
  S* const sums_out = static_cast<S*>(a.sums);
  S unused;

  for (int64_t r = begin; r < end; ++r) {
    const RowKind row_kind = kind_of(student, r);
    S* const out = sums_out ? sums_out + r * distillation::kSums : nullptr;
    T* const grad = a.grad ? static_cast<T*>(a.grad) + r * a.grad_row_stride : nullptr;
    if (row_kind != RowKind::normal) {
      const S value = row_kind == RowKind::bad ? S(__builtin_nanf("")) : S(0);
      for (int k = 0; out && k < distillation::kSums; ++k) out[k] = value;
      if (grad) fill_row<T>(grad, a.vocab, value);
      continue;
    }
    const T* const x = static_cast<const T*>(a.x) + r * a.row_stride;
    const T* const teacher_x = static_cast<const T*>(a.teacher) + r * a.teacher_row_stride;
    row.largest = S(get<S>(a.lse_parts, 2 * r)), row.log_sum = S(get<S>(a.lse_parts, 2 * r + 1));
    row.teacher_largest = S(get<S>(a.teacher_lse_parts, 2 * r));
    row.teacher_log_sum = S(get<S>(a.teacher_lse_parts, 2 * r + 1));
    const Transform<T> to_z = of_students.of_row(student, r), to_y = of_teachers.of_row(teacher, r);
    const double scale = scale_of<S>(student, r), teacher_scale = scale_of<S>(teacher, r);
    const double weight = a.row_factor ? a.factor * get<S>(a.row_factor, r) : a.factor;
    const bool same = scale == 1.0;  // the hard loss has the student's own probabilities
    const bool hard = a.hard_lse_parts && a.target;
    const int64_t t = hard ? a.target[r] : 0;
    S raw_t = 0, y_t = 0;
    if (hard) {
      row.hard_largest = S(get<S>(a.hard_lse_parts, 2 * r));
      row.hard_log_sum = S(get<S>(a.hard_lse_parts, 2 * r + 1));
      raw_t = logit(x, a.bias, t), y_t = S(teacher_scale) * logit(teacher_x, a.teacher_bias, t);
    }

    double slope = 0;
    if (a.slopes) {
      slope = get<S>(a.slopes, r);
    } else {
      Sums<S> sums;
      bool agree = false;
      for (int64_t start = 0; start < a.vocab; start += kBlock) {
        const int64_t n = a.vocab - start < kBlock ? a.vocab - start : kBlock;
        const S* const z =
            load_block(to_z, x + start, start, n, scratch.z, static_cast<S*>(nullptr), &unused);
        const S* const y =
            load_block(to_y, teacher_x + start, start, n, scratch.y, static_cast<S*>(nullptr), &unused);
        agree |= add_block<kind>(row, z, y, n, &sums);
      }
      slope = sums.slope.total();
      if (out) {
        const double hard_loss = hard ? double(row.hard_log_sum) - double(raw_t - row.hard_largest) : 0.0;
        out[distillation::kLoss] = S(weight * sums.value.total() + a.hard_loss_coef * hard_loss);
        out[distillation::kKl] = S(sums.kl.total());
        out[distillation::kReverse] = S(sums.reverse_kl.total());
        out[distillation::kAgreement] = S(agree);
        out[distillation::kEntropy] = S(-sums.entropy.total());
        out[distillation::kTeacherEntropy] = S(-sums.teacher_entropy.total());
        out[distillation::kHardLoss] = S(hard_loss);
        out[distillation::kSlope] = S(slope);
      }
    }
    if (!grad) continue;

    const double factor = a.factors ? get<S>(a.factors, r) : 1.0;
    const S soft = S(factor * weight * scale), of_hard = S(factor * a.hard_loss_coef), total = S(slope);
    for (int64_t start = 0; start < a.vocab; start += kBlock) {
      const int64_t n = a.vocab - start < kBlock ? a.vocab - start : kBlock;
      const S* const z = load_block(to_z, x + start, start, n, scratch.z, static_cast<S*>(nullptr), &unused);
      const S* const y =
          load_block(to_y, teacher_x + start, start, n, scratch.y, static_cast<S*>(nullptr), &unused);
      if (!hard) {
        write_block(grad + start, n, [&](int64_t i, int64_t) __attribute__((always_inline)) {
          return gradient_of<kind, false>(row, load(z + i), load(y + i), V{}, total, soft, of_hard, true);
        });
        continue;
      }
      const S* const raw =
          same ? z : load_block(to_raw, x + start, start, n, scratch.raw, static_cast<S*>(nullptr), &unused);
      write_block(grad + start, n, [&](int64_t i, int64_t) __attribute__((always_inline)) {
        return gradient_of<kind, true>(row, load(z + i), load(y + i), load(raw + i), total, soft, of_hard,
                                       same);
      });
    }
    if (hard) {
      const V g = gradient_of<kind, true>(row, V{} + S(scale) * raw_t, V{} + y_t, V{} + raw_t, total, soft,
                                          of_hard, same);
      store_one(grad + t, S(g[0] - of_hard));
    }
  }
}

template <class T>
void with_divergence(const RowDivergence& a, int64_t begin, int64_t end, void* memory) {
  switch (a.divergence) {
#define FASTLOSS_CASE(enumerator, name) \
  case Divergence::enumerator:          \
    return rows_of<T, Divergence::enumerator>(a, begin, end, memory);
    FASTLOSS_DISTILLATION_DIVERGENCES(FASTLOSS_CASE)
#undef FASTLOSS_CASE
  }
  FASTLOSS_UNREACHABLE();
}

void row_divergence(const RowDivergence& a, int64_t begin, int64_t end, void* memory) {
  switch (Dtype(a.dtype)) {
    case kFloat32:
      return with_divergence<float>(a, begin, end, memory);
    case kBFloat16:
      return with_divergence<BF16>(a, begin, end, memory);
    case kFloat16:
      return with_divergence<F16>(a, begin, end, memory);
    case kFloat64:
      return with_divergence<double>(a, begin, end, memory);
  }
  FASTLOSS_UNREACHABLE();
}

int64_t scratch_bytes() { return 3 * kBlock * sizeof(double); }

}  // namespace

extern const DivergenceKernels divergence_kernels;
const DivergenceKernels divergence_kernels = {scratch_bytes, row_divergence};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
