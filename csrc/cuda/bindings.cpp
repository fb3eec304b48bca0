// fastloss._cuda: the row functions of docs/engine.md, and what binds the rest. The emulated module is this
// file too. Reads and writes nothing itself.
// No PyTorch header: builds in seconds, once for every torch version.
#include "args.h"
#include "cluster_rows.h"
#ifdef FASTLOSS_EMULATE
#include "cluster.h"
#endif
#include "common/row_bindings.h"
#include "launch_from_python.h"
#include "reduce.h"

#ifndef FASTLOSS_MODULE
#define FASTLOSS_MODULE _cuda
#endif

namespace fastloss::cuda {
void bind_pairs(pybind11::module_&);
void bind_policy(pybind11::module_&);
void bind_divergences(pybind11::module_&);
void bind_exponentials(pybind11::module_&);

namespace {

struct Cuda {
  using Value = float;
  using Number = float;

  static int dtype_of(int code) {
    if (code_of<Dtype>("dtype", code) == kFloat64)
      throw std::invalid_argument(
          "dtype: expected 0 (float32), 1 (bfloat16) or 2 (float16), got 3 (float64)");
    return code;
  }
  static void run(const Logits& in, const Stats& out, int64_t stream) {
    launch([&] { return row_stats(in, out, at(Address(stream))); });
  }
  static void run(const Logits& in, const Coefficients& k, int64_t stream) {
    launch([&] { return row_grad(in, k, at(Address(stream))); });
  }
  static void run(const Logits& in, const GivenCrossEntropy<float>& given, const Stats& out, int64_t stream) {
    const CrossEntropy ce = {at<float>(given.w),
                             given.w_row_stride,
                             given.terms,
                             float(given.factor),
                             at<float>(given.factor_tensor),
                             at(given.grad),
                             given.grad_row_stride};
    launch([&] { return row_cross_entropy(in, ce, out, at(Address(stream))); });
  }
};

void scale(Address x, int dtype, int64_t rows, int64_t width, int64_t row_stride, Address factor,
           int64_t context) {
  const Scaling a = {
      required("x", x), Cuda::dtype_of(dtype), rows, width, row_stride, required<float>("factor", factor)};
  launch([&] { return scale_in_place(a, at(Address(context))); });
}

void total(Address values, int64_t n, float factor, Address factor_tensor, Address out, int64_t context) {
  const Total a = {required<float>("values", values), n, factor, at<float>(factor_tensor),
                   required<float>("out", out)};
  launch([&] { return sum_rows(a, at(Address(context))); });
}

void count(Address target, int64_t n, int64_t ignore_index, Address out, int64_t context) {
  const Count a = {required<int64_t>("target", target), n, ignore_index, required<float>("out", out)};
  launch([&] { return reciprocal_count(a, at(Address(context))); });
}

// Empty where the kernel of clusters takes such a call. grad: 0 with has_grad for a new tensor.
std::string no_clusters(Address logits, int dtype, int64_t vocab, int64_t row_stride,
                        const pybind11::object& options, bool has_target, bool has_bias, bool has_grad,
                        Address grad, int64_t grad_row_stride, bool more) {
  const Record record(options);
  float some = 0;  // its address stands for a tensor that is not looked at
  int64_t label = 0;
  Logits in = {};
  in.x = at(logits), in.dtype = Cuda::dtype_of(dtype), in.vocab = vocab, in.row_stride = row_stride;
  in.target = has_target ? &label : nullptr, in.bias = has_bias ? &some : nullptr;
  in.scale = float(record.number("scale")), in.softcap = float(record.number("softcap"));
  CrossEntropy ce = {};
  ce.terms = loss_terms_of<float>(record, vocab);
  ce.grad = !has_grad ? nullptr : at(grad ? grad : Address(16)), ce.grad_row_stride = grad_row_stride;
  Stats out = {};
  out.entropy = more ? &some : nullptr;
  const char* why = why_no_clusters(in, ce, out);
  return why ? why : "";
}

}  // namespace
}  // namespace fastloss::cuda

PYBIND11_MODULE(FASTLOSS_MODULE, m) {
  namespace cuda = fastloss::cuda;
  m.doc() = "CUDA kernels of fastloss; docs/engine.md and docs/sequences.md are their contract.";
  m.def("tables", &fastloss::tables);
  m.def("why_not", [] {
    const char* error = cuda::why_not();
    return std::string(error ? error : "");
  });
  fastloss::RowBindings<cuda::Cuda>::bind(m);
  fastloss::define(m, "scale_in_place", &cuda::scale, "x", "dtype", "rows", "width", "row_stride", "factor",
                   "context");
  fastloss::define(m, "sum_rows", &cuda::total, "values", "n", "factor", "factor_tensor", "out", "context");
  fastloss::define(m, "reciprocal_count", &cuda::count, "target", "n", "ignore_index", "out", "context");
  fastloss::define(m, "why_no_clusters", &cuda::no_clusters, "logits", "dtype", "vocab", "row_stride",
                   "options", "has_target", "has_bias", "has_grad", "grad", "grad_row_stride", "more");
  cuda::bind_pairs(m);
  cuda::bind_policy(m);
  cuda::bind_divergences(m);
  cuda::bind_exponentials(m);
#ifdef FASTLOSS_EMULATE
  m.def("cluster_launches", [] { return emulated::cluster_launches.load(); });
#endif
}
