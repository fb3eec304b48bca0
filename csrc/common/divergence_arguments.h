// The arguments of row_divergence (docs/distillation.md) as a plain struct, and the numbers of its divergence
// that do not depend on a class. Reads and writes nothing: every pointer is the caller's memory.
// `Value` and `Number` are those of row_arguments.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/codes.h"

namespace fastloss {

template <class Number>
struct DivergenceNumbers {
  Number w, rest;                 // the interpolation, and 1 - w: subtracted in double
  Number value_no_p, slope_no_p;  // where p is 0, a class adds value_no_p q, and d/d log q is slope_no_p q
  Number value_no_q;              // where q is 0, a class adds value_no_q p
};

// The limits of a divergence's term where a probability is 0 (a logit of -inf).
template <class Number>
DivergenceNumbers<Number> divergence_numbers(distillation::Divergence kind, double w) {
  const double inf = HUGE_VAL, rest = 1 - w;
  double no_p = 0, no_q = 0;
  switch (kind) {
    case distillation::Divergence::kForwardKl:
      no_p = 1, no_q = inf;
      break;
    case distillation::Divergence::kReverseKl:
      no_p = inf, no_q = 1;
      break;
    case distillation::Divergence::kJsd:
      no_p = -rest * std::log1p(-w), no_q = -w * std::log(w);
      break;
    case distillation::Divergence::kTvd:
      no_p = 0.5, no_q = 0.5;
      break;
    case distillation::Divergence::kSkewedForwardKl:
      no_p = rest, no_q = -rest - std::log(w);
      break;
    case distillation::Divergence::kSkewedReverseKl:
      no_p = -rest - std::log(w), no_q = rest;
      break;
    case distillation::Divergence::kAlpha:
      no_p = 1 / w, no_q = 1 / rest;
      break;
  }
  // The slope of what is infinite has no value: 0, so that it stays out of the other classes' gradients.
  return {Number(w), Number(rest), Number(no_p), Number(no_p == inf ? 0 : no_p), Number(no_q)};
}

template <class Value, class Number>
struct RowDivergenceOf {
  const void *x, *teacher;  // [rows, vocab] of one dtype
  int dtype;
  int64_t rows, vocab, row_stride, teacher_row_stride;
  const int64_t* target;  // [rows] or null
  int64_t ignore_index;
  const Value *bias, *teacher_bias;            // acc [vocab] or null
  const Value *lse_parts, *teacher_lse_parts;  // acc [rows, 2], of the logits times their scale
  const Value* hard_lse_parts;  // acc [rows, 2], of the student's raw logits; null: no hard loss
  const Value* factors;         // acc [rows] or null (1): of each row's gradient
  const Value* slopes;          // acc [rows]: kSlope of an earlier call; null: it is made
  Value* sums;                  // acc [rows, kSums]; null where slopes are given
  void* grad;                   // or null; may be x
  int64_t grad_row_stride;
  distillation::Divergence divergence;
  DivergenceNumbers<Number> numbers;
  Number scale, teacher_scale, factor, hard_loss_coef;
  // acc [rows] or null: what multiplies scale, teacher_scale and factor in each row, where a token has its
  // own temperature.
  const Value *row_scale, *teacher_row_scale, *row_factor;
};

}  // namespace fastloss
