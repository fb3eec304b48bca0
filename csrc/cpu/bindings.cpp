// Python names of the CPU backend: fastloss._cpu. Every pointer is an integer address, 0 for null.
// Reads and writes what docs/engine.md says.
// No PyTorch header: one build serves every torch version.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "common/code_bindings.h"
#include "dispatch.h"
#include "parallel.h"

namespace fastloss {
void bind_pairs(pybind11::module_&);
void bind_policy(pybind11::module_&);
void bind_head(pybind11::module_&);
void bind_small_call(pybind11::module_&);
}  // namespace fastloss

namespace py = pybind11;
using fastloss::Coefficients;
using fastloss::CrossEntropy;
using fastloss::Logits;
using fastloss::Stats;
using Address = uintptr_t;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}
void* at(Address address) { return at<void>(address); }

// Releasing the GIL costs about as much as a tiny call.
struct MaybeReleaseGil {
  std::optional<py::gil_scoped_release> release;
  explicit MaybeReleaseGil(int64_t elements) {
    if (elements >= fastloss::kSmallWork) release.emplace();
  }
};

Logits logits_of(Address x, int dtype, int64_t rows, int64_t vocab, int64_t row_stride, Address target,
                 int64_t ignore_index, Address bias, double scale, double softcap) {
  return {at(x),        fastloss::code_of<fastloss::Dtype>("dtype", dtype),
          rows,         vocab,
          row_stride,   at<int64_t>(target),
          ignore_index, at(bias),
          scale,        softcap};
}

double scalar_at(Address p, int dtype) {
  if (!p) return 1.0;
  return dtype == fastloss::kFloat64 ? *at<double>(p) : double(*at<float>(p));
}

void row_stats(Address x, int dtype, int64_t rows, int64_t vocab, int64_t row_stride, Address target,
               int64_t ignore_index, Address bias, double scale, double softcap, Address logsumexp,
               Address logprob, Address entropy, Address log_sum_sq_probs, Address mean_logit,
               Address is_top1, int64_t threads) {
  const Logits l = logits_of(x, dtype, rows, vocab, row_stride, target, ignore_index, bias, scale, softcap);
  const Stats s{nullptr,        at(logsumexp),       at(logprob), at(entropy), at(log_sum_sq_probs),
                at(mean_logit), at<uint8_t>(is_top1)};
  MaybeReleaseGil gil(rows * vocab);
  fastloss::row_stats(l, s, threads);
}

void row_grad(Address x, int dtype, int64_t rows, int64_t vocab, int64_t row_stride, Address target,
              int64_t ignore_index, Address bias, double scale, double softcap, Address lse, Address a,
              Address b, Address c, Address d, Address w, int64_t w_row_stride, Address out,
              int64_t out_row_stride, int64_t threads) {
  const Logits l = logits_of(x, dtype, rows, vocab, row_stride, target, ignore_index, bias, scale, softcap);
  const Coefficients k{at(lse), at(a), at(b), at(c), at(d), at(w), w_row_stride, at(out), out_row_stride};
  MaybeReleaseGil gil(rows * vocab);
  fastloss::row_grad(l, k, threads);
}

void row_cross_entropy(Address x, int dtype, int64_t rows, int64_t vocab, int64_t row_stride, Address target,
                       int64_t ignore_index, Address bias, double scale, double softcap, Address w,
                       int64_t w_row_stride, double label_smoothing, double z_loss, double grad_scale,
                       Address grad_scale_ptr, Address grad, int64_t grad_row_stride, Address loss,
                       Address logsumexp, Address logprob, Address entropy, Address log_sum_sq_probs,
                       Address mean_logit, Address is_top1, int64_t threads) {
  const Logits l = logits_of(x, dtype, rows, vocab, row_stride, target, ignore_index, bias, scale, softcap);
  if (!target && !w) throw std::invalid_argument("row_cross_entropy: target and w are both null");
  const CrossEntropy c{
      at(w),    w_row_stride,   label_smoothing, z_loss, grad_scale * scalar_at(grad_scale_ptr, dtype),
      at(grad), grad_row_stride};
  const Stats s{at(loss),       at(logsumexp),       at(logprob), at(entropy), at(log_sum_sq_probs),
                at(mean_logit), at<uint8_t>(is_top1)};
  MaybeReleaseGil gil(rows * vocab);
  fastloss::row_cross_entropy(l, c, s, threads);
}

py::tuple count_targets(Address target, int64_t n, int64_t vocab, int64_t ignore_index) {
  const auto count = fastloss::count_targets(at<int64_t>(target), n, vocab, ignore_index);
  return py::make_tuple(count.valid, count.first_bad);
}

void sum_rows(Address values, int dtype, int64_t n, double factor, Address out) {
  fastloss::sum_rows(at(values), dtype, n, factor, at(out));
}

void convert(Address src, int src_dtype, Address dst, int dst_dtype, int64_t n, int64_t threads) {
  MaybeReleaseGil gil(n);
  fastloss::convert(at(src), src_dtype, at(dst), dst_dtype, n, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Row kernels for the CPU; the contract is docs/engine.md.";
  m.def("tables", &fastloss::tables);
  m.def("row_stats", &row_stats);
  m.def("row_grad", &row_grad);
  m.def("row_cross_entropy", &row_cross_entropy);
  m.def("count_targets", &count_targets);
  m.def("sum_rows", &sum_rows);
  m.def("convert", &convert);
  m.def("isa", [] { return std::string(fastloss::kernels().name); });
  m.def("set_isa", &fastloss::set_isa);
  m.def("supported_isas", &fastloss::supported_isas);
  fastloss::bind_pairs(m);
  fastloss::bind_policy(m);
  fastloss::bind_head(m);
  fastloss::bind_small_call(m);
}
