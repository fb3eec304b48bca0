// The kernels of policy.cu and scan.cu in fastloss._cuda: float32 alone, on the stream whose address is
// given. Reads and writes nothing itself.
// Apart from bindings.cpp, which has the row functions.
#include "common/policy_bindings.h"

#include "launch_from_python.h"
#include "policy.h"

namespace fastloss::cuda {
namespace {

struct Cuda {
  static void run(const policy::Call& call, int dtype, int64_t stream) {
    expect_float32(dtype);
    if (!call.ticket) throw std::invalid_argument("ticket: expected an address, got 0");
    launch([&] { return policy_loss(call, at(Address(stream))); });
  }
  static void run(const Scan& a, int dtype, int64_t stream) {
    expect_float32(dtype);
    launch([&] { return scan(a, at(Address(stream))); });
  }
  static void run(const ValueLoss& a, int dtype, int64_t stream) {
    expect_float32(dtype);
    if (!a.ticket) throw std::invalid_argument("ticket: expected an address, got 0");
    launch([&] { return value_loss(a, at(Address(stream))); });
  }
  static void run(const KlEstimate& a, int dtype, int64_t stream) {
    expect_float32(dtype);
    launch([&] { return kl_estimate(a, at(Address(stream))); });
  }
};

}  // namespace

void bind_policy(pybind11::module_& m) { PolicyBindings<Cuda>::bind(m); }

}  // namespace fastloss::cuda
