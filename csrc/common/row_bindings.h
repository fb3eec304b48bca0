// The row functions of docs/engine.md from Python, once for both modules. A backend brings its types, its
// dtypes and its launchers; `context` is the number of threads (CPU) or the stream's address (CUDA).
// Reads and writes nothing itself.
#pragma once

#include "common/bindings.h"
#include "common/row_arguments.h"

namespace fastloss {

template <class Number>
LossTermsOf<Number> loss_terms_of(const Record& options, int64_t vocab) {
  const double label_smoothing = options.number("label_smoothing");
  return {Number(1 - label_smoothing), Number(label_smoothing / double(vocab > 0 ? vocab : 1)),
          Number(options.number("z_loss"))};
}

// Cross-entropy as Python gives it; a backend makes its own struct of it.
template <class Number>
struct GivenCrossEntropy {
  Address w;
  int64_t w_row_stride;
  LossTermsOf<Number> terms;
  double factor;
  Address factor_tensor;  // acc [1], multiplies factor; or 0
  Address grad;           // or 0
  int64_t grad_row_stride;
};

// Backend::Value and Backend::Number are those of row_arguments.h; Backend::dtype_of(code) is an error where
// there is no kernel; Backend::run(arguments..., context) runs.
template <class Backend>
struct RowBindings {
  using Value = typename Backend::Value;
  using Logits = LogitsOf<Value, typename Backend::Number>;
  using Stats = StatsOf<Value>;

  static Logits logits_of(Address logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride,
                          Address target, Address bias, Address row_scale, const Record& options) {
    using Number = typename Backend::Number;
    return {required("logits", logits),
            Backend::dtype_of(dtype),
            rows,
            vocab,
            row_stride,
            at<int64_t>(target),
            options.integer("ignore_index"),
            at<Value>(bias),
            Number(options.number("scale")),
            Number(options.number("softcap")),
            at<Value>(row_scale)};
  }

  static void row_stats(Address logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride,
                        Address target, const pybind11::object& options, Address bias, Address row_scale,
                        Address logsumexp, Address logprobs, Address entropy, Address log_sum_sq_probs,
                        Address mean_logits, Address is_top1, Address lse_parts, int64_t context) {
    const Logits in =
        logits_of(logits, dtype, rows, vocab, row_stride, target, bias, row_scale, Record(options));
    if (!target && (logprobs || is_top1))
      throw std::invalid_argument("target: logprobs and is_top1 need one, got 0");
    const Stats stats = {nullptr,
                         at<Value>(logsumexp),
                         at<Value>(logprobs),
                         at<Value>(entropy),
                         at<Value>(log_sum_sq_probs),
                         at<Value>(mean_logits),
                         at<uint8_t>(is_top1),
                         at<Value>(lse_parts)};
    Backend::run(in, stats, context);
  }

  static void row_grad(Address logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride,
                       Address target, const pybind11::object& options, Address bias, Address row_scale,
                       Address lse_parts, Address a, Address b, Address c, Address d, Address w,
                       int64_t w_row_stride, Address out, int64_t out_row_stride, int64_t context) {
    const Logits in =
        logits_of(logits, dtype, rows, vocab, row_stride, target, bias, row_scale, Record(options));
    const CoefficientsOf<Value> k = {required<Value>("lse_parts", lse_parts),
                                     at<Value>(a),
                                     at<Value>(b),
                                     at<Value>(c),
                                     at<Value>(d),
                                     at<Value>(w),
                                     w_row_stride,
                                     required("out", out),
                                     out_row_stride};
    Backend::run(in, k, context);
  }

  static void row_cross_entropy(Address logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride,
                                Address target, const pybind11::object& options, Address bias,
                                Address row_scale, Address w, int64_t w_row_stride, double factor,
                                Address factor_tensor, Address grad, int64_t grad_row_stride, Address loss,
                                Address logsumexp, Address logprobs, Address entropy,
                                Address log_sum_sq_probs, Address mean_logits, Address is_top1,
                                Address lse_parts, int64_t context) {
    const Record record(options);
    const Logits in = logits_of(logits, dtype, rows, vocab, row_stride, target, bias, row_scale, record);
    if (!target && !w) throw std::invalid_argument("target: expected it or w, got neither");
    using Number = typename Backend::Number;
    const GivenCrossEntropy<Number> given = {
        w, w_row_stride, loss_terms_of<Number>(record, vocab), factor, factor_tensor, grad, grad_row_stride};
    const Stats stats = {
        required<Value>("loss", loss), at<Value>(logsumexp),   at<Value>(logprobs),  at<Value>(entropy),
        at<Value>(log_sum_sq_probs),   at<Value>(mean_logits), at<uint8_t>(is_top1), at<Value>(lse_parts)};
    Backend::run(in, given, stats, context);
  }

  static void bind(pybind11::module_& m) {
    define(m, "row_stats", &row_stats, "logits", "dtype", "rows", "vocab", "row_stride", "target", "options",
           "bias", "row_scale", "logsumexp", "logprobs", "entropy", "log_sum_sq_probs", "mean_logits",
           "is_top1", "lse_parts", "context");
    define(m, "row_grad", &row_grad, "logits", "dtype", "rows", "vocab", "row_stride", "target", "options",
           "bias", "row_scale", "lse_parts", "a", "b", "c", "d", "w", "w_row_stride", "out", "out_row_stride",
           "context");
    define(m, "row_cross_entropy", &row_cross_entropy, "logits", "dtype", "rows", "vocab", "row_stride",
           "target", "options", "bias", "row_scale", "w", "w_row_stride", "factor", "factor_tensor", "grad",
           "grad_row_stride", "loss", "logsumexp", "logprobs", "entropy", "log_sum_sq_probs", "mean_logits",
           "is_top1", "lse_parts", "context");
  }
};

}  // namespace fastloss
