// The kernels of policy.cu and scan.cu in fastloss._cuda: float32 alone, on the stream given last.
// Reads and writes nothing itself.
// Apart from bindings.cpp, which has the row functions.
#include "common/policy_bindings.h"

#include "policy.h"

namespace fastloss::cuda {
namespace {

struct Cuda {
  template <class Arguments>
  static void run(const Arguments& a, int dtype, int64_t stream) {
    if (dtype != kFloat32)
      throw std::invalid_argument("dtype: expected 0 (float32), got " + std::to_string(dtype));
    const char* error = nullptr;
    {
      const pybind11::gil_scoped_release unlocked;
      error = launch(a, reinterpret_cast<void*>(stream));
    }
    if (error) throw std::runtime_error(std::string("fastloss CUDA kernel: ") + error);
  }
  static const char* launch(const policy::Call& call, void* stream) { return policy_loss(call, stream); }
  static const char* launch(const Scan& a, void* stream) { return scan(a, stream); }
};

}  // namespace

void bind_policy(pybind11::module_& m) { PolicyBindings<Cuda>::bind(m); }

}  // namespace fastloss::cuda
