// Mean or summed cross-entropy of index targets, and its gradient, in one call from Python: for logits so
// small that the calls around the kernel are the cost. Reads targets twice, else what row_cross_entropy reads
// and writes. Checks the targets before anything is written.

#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace fastloss {
namespace {

using Address = uintptr_t;

template <class S>
double sum_of(const Logits& l, CrossEntropy& c, int64_t threads) {
  thread_local std::vector<S> losses;
  losses.resize(l.rows);
  row_cross_entropy(l, c, Stats{losses.data(), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr},
                    threads);
  double sum = 0;
  for (const S loss : losses) sum += loss;
  return sum;
}

// Writes the loss (acc) and, if grad is not null, its gradient; returns the position of the first bad target,
// or -1.
int64_t reduced_cross_entropy(Address logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride,
                              Address target, int64_t ignore_index, bool mean, Address grad, Address loss,
                              int64_t threads) {
  const int64_t* const t = reinterpret_cast<const int64_t*>(target);
  const TargetCount count = count_targets(t, rows, vocab, ignore_index);
  if (count.first_bad >= 0) return count.first_bad;
  const double factor = !mean ? 1.0 : count.valid ? 1.0 / double(count.valid) : __builtin_inf();
  const Logits l{reinterpret_cast<const void*>(logits),
                 dtype,
                 rows,
                 vocab,
                 row_stride,
                 t,
                 ignore_index,
                 nullptr,
                 1.0,
                 0.0};
  CrossEntropy c{nullptr, 0, 0.0, 0.0, factor, reinterpret_cast<void*>(grad), vocab};
  std::optional<pybind11::gil_scoped_release> release;
  if (rows * vocab >= kSmallWork) release.emplace();
  if (dtype == kFloat64) {
    *reinterpret_cast<double*>(loss) = factor * sum_of<double>(l, c, threads);
  } else {
    *reinterpret_cast<float*>(loss) = float(factor * sum_of<float>(l, c, threads));
  }
  return -1;
}

}  // namespace

void bind_small_call(pybind11::module_& m) { m.def("reduced_cross_entropy", &reduced_cross_entropy); }

}  // namespace fastloss
