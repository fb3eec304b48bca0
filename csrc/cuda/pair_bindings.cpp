// The kernels of pairs.cu in fastloss._cuda: float32 alone, on the stream whose address is given.
// Reads and writes nothing itself.
// Apart from bindings.cpp, which has the row functions.
#include "common/pair_bindings.h"

#include "launch_from_python.h"
#include "pairs.h"

namespace fastloss::cuda {
namespace {

struct Cuda {
  template <class S>
  using Math = float;

  template <class F>
  static void with_dtype(int dtype, F f) {
    expect_float32(dtype);
    f(0.0f);
  }

  static void run(const SegmentSum<float>& a, int64_t stream) {
    launch([&] { return segment_sum(a, at(Address(stream))); });
  }
  static void run(const SegmentExpand<float>& a, int64_t stream) {
    launch([&] { return segment_expand(a, at(Address(stream))); });
  }
  static void run(const PairLoss<float, float>& a, int64_t stream) {
    launch([&] { return pair_loss(a, at(Address(stream))); });
  }
  static void run(const UnpairedLoss<float, float>& a, int64_t stream) {
    launch([&] { return unpaired_loss(a, at(Address(stream))); });
  }
};

}  // namespace

void bind_pairs(pybind11::module_& m) { PairBindings<Cuda>::bind(m); }

}  // namespace fastloss::cuda
