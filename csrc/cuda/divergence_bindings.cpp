// The kernel of divergences.cu in fastloss._cuda, on the stream whose address is given.
// Reads and writes nothing itself.
// Apart from bindings.cpp, which has the row functions of one tensor of logits.
#include "common/divergence_bindings.h"

#include "divergences.h"
#include "launch_from_python.h"

namespace fastloss::cuda {
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
  static void run(const RowDivergence& a, int64_t stream) {
    launch([&] { return row_divergence(a, at(Address(stream))); });
  }
};

}  // namespace

void bind_divergences(pybind11::module_& m) { DivergenceBindings<Cuda>::bind(m); }

}  // namespace fastloss::cuda
