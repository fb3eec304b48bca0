// Mean or summed cross-entropy of index targets, and its gradient, in one call from Python: for logits so
// small that the calls around the kernel are the cost. Reads targets twice, else what row_cross_entropy reads
// and writes. Checks the targets before anything is written.

#include <vector>

#include "common/bindings.h"
#include "dispatch.h"
#include "parallel.h"

namespace fastloss {
namespace {

template <class S>
double sum_of(const Logits& l, CrossEntropy& c, int64_t threads) {
  thread_local std::vector<S> losses;
  losses.resize(l.rows);
  Stats stats = {};
  stats.loss = losses.data();
  row_cross_entropy(l, c, stats, threads);
  double sum = 0;
  for (const S loss : losses) sum += loss;
  return sum;
}

// Writes the loss (acc) and, if grad is not null, its gradient; returns the position of the first bad target,
// or -1.
int64_t reduced_cross_entropy(Address logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride,
                              Address target, int64_t ignore_index, bool mean, Address grad, Address loss,
                              int64_t threads) {
  const int64_t* const t = required<int64_t>("target", target);
  void* const out = required("loss", loss);
  const TargetCount count = count_targets(t, rows, vocab, ignore_index);
  if (count.first_bad >= 0) return count.first_bad;
  const double factor = !mean ? 1.0 : count.valid ? 1.0 / double(count.valid) : __builtin_inf();
  const Logits l = {required("logits", logits),
                    code_of<Dtype>("dtype", dtype),
                    rows,
                    vocab,
                    row_stride,
                    t,
                    ignore_index,
                    nullptr,
                    1.0,
                    0.0};
  CrossEntropy c = {nullptr, 0, {1, 0, 0}, factor, at(grad), vocab};
  const ReleaseGil gil(rows * vocab >= kSmallWork);
  if (dtype == kFloat64) {
    *static_cast<double*>(out) = factor * sum_of<double>(l, c, threads);
  } else {
    *static_cast<float*>(out) = float(factor * sum_of<float>(l, c, threads));
  }
  return -1;
}

}  // namespace

// The direct calls are made by position: naming each argument would cost more than the kernel.
void bind_direct_cross_entropy(pybind11::module_& m) {
  using pybind11::arg;
  m.def("reduced_cross_entropy", &reduced_cross_entropy, arg("logits"), arg("dtype"), arg("rows"),
        arg("vocab"), arg("row_stride"), arg("target"), arg("ignore_index"), arg("mean"), arg("grad"),
        arg("loss"), arg("threads"));
}

}  // namespace fastloss
