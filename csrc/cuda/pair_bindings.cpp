// The kernels of pairs.cu in fastloss._cuda: float32 alone, on the stream given last.
// Reads and writes nothing itself.
// Apart from bindings.cpp, which has the row functions.
#include "common/pair_bindings.h"

#include "pairs.h"

namespace fastloss::cuda {
namespace {

struct Cuda {
  template <class S>
  using Math = float;

  template <class F>
  static void with_dtype(int dtype, F f) {
    if (dtype != kFloat32)
      throw std::invalid_argument("dtype: expected 0 (float32), got " + std::to_string(dtype));
    f(0.0f);
  }

  template <class Arguments>
  static void run(const Arguments& a, int64_t stream) {
    const char* error = nullptr;
    {
      const pybind11::gil_scoped_release unlocked;
      error = launch(a, from<void>(Address(stream)));
    }
    if (error) throw std::runtime_error(std::string("fastloss CUDA kernel: ") + error);
  }

  static const char* launch(const SegmentSum<float>& a, void* stream) { return segment_sum(a, stream); }
  static const char* launch(const SegmentExpand<float>& a, void* stream) { return segment_expand(a, stream); }
  static const char* launch(const PairLoss<float, float>& a, void* stream) { return pair_loss(a, stream); }
  static const char* launch(const UnpairedLoss<float, float>& a, void* stream) {
    return unpaired_loss(a, stream);
  }
};

}  // namespace

void bind_pairs(pybind11::module_& m) { PairBindings<Cuda>::bind(m); }

}  // namespace fastloss::cuda
