// policy_loss, gae and discounted_returns in fastloss._cpu: float32 and float64.
// Reads and writes nothing itself.
// Apart from bindings.cpp, which has the row functions.
#include "../policy_bindings.h"

#include <optional>

#include "args.h"
#include "parallel.h"
#include "policy.h"
#include "scan.h"

namespace fastloss {
namespace {

struct Cpu {
  template <class Run>
  static void unlocked(int64_t n, int dtype, Run&& run) {
    if (dtype != kFloat32 && dtype != kFloat64)
      throw std::invalid_argument("dtype: expected 0 (float32) or 3 (float64)");
    std::optional<pybind11::gil_scoped_release> release;
    if (n >= kSmallWork) release.emplace();  // releasing costs about as much as a tiny call
    run();
  }
  static void run(const policy::Call& call, int dtype, int64_t threads) {
    unlocked(call.n, dtype, [&] { policy_loss(call, dtype, threads); });
  }
  static void run(const Scan& a, int dtype, int64_t threads) {
    unlocked(a.n, dtype, [&] { scan(a, dtype, threads); });
  }
};

}  // namespace

void bind_policy(pybind11::module_& m) { PolicyBindings<Cpu>::bind(m); }

}  // namespace fastloss
