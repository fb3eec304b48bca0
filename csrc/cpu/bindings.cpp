// fastloss._cpu: the row functions of docs/engine.md, the small functions beside them, and what binds the
// rest. Reads and writes what docs/engine.md says.
// No PyTorch header: one build serves every torch version.

#include <pybind11/stl.h>

#include "common/divergence_bindings.h"
#include "common/row_bindings.h"
#include "dispatch.h"
#include "parallel.h"

namespace fastloss {

void bind_pairs(pybind11::module_&);
void bind_policy(pybind11::module_&);
void bind_head(pybind11::module_&);
void bind_gather(pybind11::module_&);
void bind_direct_cross_entropy(pybind11::module_&);

namespace {

struct Cpu {
  using Value = void;
  using Number = double;

  static int dtype_of(int code) { return code_of<Dtype>("dtype", code); }

  static void run(const Logits& in, const Stats& out, int64_t threads) {
    const ReleaseGil gil(in.rows * in.vocab >= kSmallWork);
    row_stats(in, out, threads);
  }
  static void run(const Logits& in, const Coefficients& k, int64_t threads) {
    const ReleaseGil gil(in.rows * in.vocab >= kSmallWork);
    row_grad(in, k, threads);
  }
  static void run(const Logits& in, const GivenCrossEntropy<double>& given, const Stats& out,
                  int64_t threads) {
    double factor = given.factor;
    if (given.factor_tensor) {
      factor *= in.dtype == kFloat64 ? *at<double>(given.factor_tensor) : *at<float>(given.factor_tensor);
    }
    const CrossEntropy ce = {at(given.w), given.w_row_stride, given.terms,
                             factor,      at(given.grad),     given.grad_row_stride};
    const ReleaseGil gil(in.rows * in.vocab >= kSmallWork);
    row_cross_entropy(in, ce, out, threads);
  }
  static void run(const RowDivergence& a, int64_t threads) {
    const ReleaseGil gil(a.rows * a.vocab >= kSmallWork);
    row_divergence(a, threads);
  }
};

pybind11::tuple targets_of(Address target, int64_t n, int64_t vocab, int64_t ignore_index) {
  const TargetCount count =
      count_targets(n ? required<int64_t>("target", target) : nullptr, n, vocab, ignore_index);
  return pybind11::make_tuple(count.valid, count.first_bad);
}

void sum_of_rows(Address values, int dtype, int64_t n, double factor, Address out) {
  sum_rows(n ? required("values", values) : nullptr, dtype, n, factor, required("out", out));
}

void convert_between(Address src, int src_dtype, Address dst, int dst_dtype, int64_t n, int64_t threads) {
  if (n <= 0) return;
  const void* const from = required("src", src);
  void* const to = required("dst", dst);
  const ReleaseGil gil(n >= kSmallWork);
  convert(from, src_dtype, to, dst_dtype, n, threads);
}

}  // namespace
}  // namespace fastloss

PYBIND11_MODULE(_cpu, m) {
  using namespace fastloss;
  m.doc() = "CPU kernels of fastloss; docs/engine.md and docs/sequences.md are their contract.";
  m.def("tables", &tables);
  RowBindings<Cpu>::bind(m);
  DivergenceBindings<Cpu>::bind(m);
  define(m, "count_targets", &targets_of, "target", "n", "vocab", "ignore_index");
  define(m, "sum_rows", &sum_of_rows, "values", "dtype", "n", "factor", "out");
  using pybind11::arg;
  m.def("convert", &convert_between, arg("src"), arg("src_dtype"), arg("dst"), arg("dst_dtype"), arg("n"),
        arg("threads"));
  m.def("isa", [] { return std::string(isa().name); });
  m.def("set_isa", &set_isa);
  m.def("supported_isas", &supported_isas);
  bind_pairs(m);
  bind_policy(m);
  bind_head(m);
  bind_gather(m);
  bind_direct_cross_entropy(m);
}
