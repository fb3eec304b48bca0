// row_divergence from Python, once for both modules (docs/distillation.md). Reads and writes nothing itself.
// A backend brings its types, its dtypes and its launcher; `context` is the number of threads (CPU) or the
// stream's address (CUDA).
#pragma once

#include "common/bindings.h"
#include "common/divergence_arguments.h"

namespace fastloss {

template <class Backend>
struct DivergenceBindings {
  using Value = typename Backend::Value;
  using Number = typename Backend::Number;

  static void row_divergence(Address logits, Address teacher_logits, int dtype, int64_t rows, int64_t vocab,
                             int64_t row_stride, int64_t teacher_row_stride, Address target,
                             const pybind11::object& options, Address bias, Address teacher_bias,
                             Address lse_parts, Address teacher_lse_parts, Address hard_lse_parts,
                             Address factors, Address slopes, Address row_scale, Address teacher_row_scale,
                             Address row_factor, Address sums, Address grad, int64_t grad_row_stride,
                             int64_t context) {
    const Record record(options);
    const auto kind = record.code<distillation::Divergence>("divergence");
    if (!slopes == !sums) throw std::invalid_argument("sums: expected either it or slopes");
    if (hard_lse_parts && !target) throw std::invalid_argument("target: a hard loss needs one, got 0");
    const RowDivergenceOf<Value, Number> a = {
        required("logits", logits),
        required("teacher_logits", teacher_logits),
        Backend::dtype_of(dtype),
        rows,
        vocab,
        row_stride,
        teacher_row_stride,
        at<int64_t>(target),
        record.integer("ignore_index"),
        at<Value>(bias),
        at<Value>(teacher_bias),
        required<Value>("lse_parts", lse_parts),
        required<Value>("teacher_lse_parts", teacher_lse_parts),
        at<Value>(hard_lse_parts),
        at<Value>(factors),
        at<Value>(slopes),
        at<Value>(sums),
        at(grad),
        grad_row_stride,
        kind,
        divergence_numbers<Number>(kind, record.number("interpolation")),
        Number(record.number("scale")),
        Number(record.number("teacher_scale")),
        Number(record.number("factor")),
        Number(record.number("hard_loss_coef")),
        at<Value>(row_scale),
        at<Value>(teacher_row_scale),
        at<Value>(row_factor)};
    Backend::run(a, context);
  }

  static void bind(pybind11::module_& m) {
    define(m, "row_divergence", &row_divergence, "logits", "teacher_logits", "dtype", "rows", "vocab",
           "row_stride", "teacher_row_stride", "target", "options", "bias", "teacher_bias", "lse_parts",
           "teacher_lse_parts", "hard_lse_parts", "factors", "slopes", "row_scale", "teacher_row_scale",
           "row_factor", "sums", "grad", "grad_row_stride", "context");
  }
};

}  // namespace fastloss
