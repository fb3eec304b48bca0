// fastloss._cuda: the functions of docs/engine.md from Python, every pointer an integer address.
// Reads and writes nothing itself.
// No PyTorch header: builds in seconds, once for every torch version. The emulated module is this file too.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "args.h"
#include "common/code_bindings.h"

#ifndef FASTLOSS_MODULE
#define FASTLOSS_MODULE _cuda
#endif

namespace fastloss::cuda {
void bind_pairs(pybind11::module_&);
void bind_policy(pybind11::module_&);
}  // namespace fastloss::cuda

namespace {

namespace cuda = fastloss::cuda;
using Address = uintptr_t;

template <class T = float>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(const char* error) {
  if (error) throw std::runtime_error(std::string("fastloss CUDA kernel: ") + error);
}

// No kernel computes in float64.
int dtype_of(int dtype) {
  if (fastloss::code_of<fastloss::Dtype>("dtype", dtype) == fastloss::kFloat64)
    throw std::invalid_argument("dtype: expected 0 (float32), 1 (bfloat16) or 2 (float16), got 3 (float64)");
  return dtype;
}

void row_stats(Address logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride, Address target,
               int64_t ignore_index, Address bias, double scale, double softcap, Address logsumexp,
               Address logprob, Address entropy, Address log_sum_sq_probs, Address mean_logit,
               Address is_top1, Address stream) {
  const cuda::Logits in = {at<void>(logits),    dtype_of(dtype), rows,     vocab,        row_stride,
                           at<int64_t>(target), ignore_index,    at(bias), float(scale), float(softcap)};
  const cuda::Stats out = {
      nullptr,        at(logsumexp),       at(logprob), at(entropy), at(log_sum_sq_probs),
      at(mean_logit), at<uint8_t>(is_top1)};
  check(cuda::row_stats(in, out, at<void>(stream)));
}

void row_grad(Address logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride, Address target,
              int64_t ignore_index, Address bias, double scale, double softcap, Address lse, Address a,
              Address b, Address c, Address d, Address w, int64_t w_row_stride, Address out,
              int64_t out_row_stride, Address stream) {
  const cuda::Logits in = {at<void>(logits),    dtype_of(dtype), rows,     vocab,        row_stride,
                           at<int64_t>(target), ignore_index,    at(bias), float(scale), float(softcap)};
  const cuda::Coefficients k = {at(lse), at(a),        at(b),         at(c),         at(d),
                                at(w),   w_row_stride, at<void>(out), out_row_stride};
  check(cuda::row_grad(in, k, at<void>(stream)));
}

void row_cross_entropy(Address logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride,
                       Address target, int64_t ignore_index, Address bias, double scale, double softcap,
                       Address w, int64_t w_row_stride, double label_smoothing, double z_loss,
                       double grad_scale, Address grad_scale_ptr, Address grad, int64_t grad_row_stride,
                       Address loss, Address logsumexp, Address logprob, Address entropy,
                       Address log_sum_sq_probs, Address mean_logit, Address is_top1, Address stream) {
  const cuda::Logits in = {at<void>(logits),    dtype_of(dtype), rows,     vocab,        row_stride,
                           at<int64_t>(target), ignore_index,    at(bias), float(scale), float(softcap)};
  const cuda::CrossEntropy ce = {at(w),
                                 w_row_stride,
                                 float(1.0 - label_smoothing),
                                 float(label_smoothing / double(vocab > 0 ? vocab : 1)),
                                 float(z_loss),
                                 float(grad_scale),
                                 at(grad_scale_ptr),
                                 at<void>(grad),
                                 grad_row_stride};
  const cuda::Stats out = {
      at(loss),       at(logsumexp),       at(logprob), at(entropy), at(log_sum_sq_probs),
      at(mean_logit), at<uint8_t>(is_top1)};
  check(cuda::row_cross_entropy(in, ce, out, at<void>(stream)));
}

void scale_in_place(Address x, int dtype, int64_t rows, int64_t width, int64_t row_stride, Address scale,
                    Address stream) {
  check(cuda::scale_in_place({at<void>(x), dtype_of(dtype), rows, width, row_stride, at(scale)},
                             at<void>(stream)));
}

}  // namespace

PYBIND11_MODULE(FASTLOSS_MODULE, m) {
  m.doc() = "CUDA row kernels of fastloss; docs/engine.md is their contract.";
  const pybind11::call_guard<pybind11::gil_scoped_release> unlocked;
  m.def("tables", &fastloss::tables);
  m.def("row_stats", &row_stats, unlocked);
  m.def("row_grad", &row_grad, unlocked);
  m.def("row_cross_entropy", &row_cross_entropy, unlocked);
  m.def("scale_in_place", &scale_in_place, unlocked);
  m.def("why_not", [] {
    const char* error = cuda::why_not();
    return std::string(error ? error : "");
  });
  cuda::bind_pairs(m);
  cuda::bind_policy(m);
}
