// policy_loss, gae and discounted_returns in fastloss._cpu: float32 and float64.
// Reads and writes nothing itself.
// Apart from bindings.cpp, which has the row functions.
#include "common/policy_bindings.h"

#include <optional>
#include <vector>

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

using Address = uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// policy_loss of padded sequences with the fewest calls from Python around it: options read once, the
// gradient times the scale, the metrics made here.
void plain_policy_loss(int dtype, Address logprobs, Address old, Address advantages,
                       bool advantage_of_sequence, Address mask, Address ref, Address entropy,
                       Address sampler, int64_t length, int64_t count, const policy::Options<double>& options,
                       const pybind11::object& normalizer, Address normalizer_ptr, Address grad,
                       Address grad_entropy, Address loss, Address metrics, int64_t threads) {
  thread_local std::vector<double> sums;
  sums.resize(size_t(count) * policy::kSums);
  policy::Call c = {};
  c.logprobs = at(logprobs), c.old = at(old), c.advantages = at(advantages);
  c.advantage_of_sequence = advantage_of_sequence;
  c.mask = at<uint8_t>(mask), c.ref = at(ref), c.entropy = at(entropy), c.sampler = at(sampler);
  c.n = length * count, c.length = length, c.count = count;
  set_options(c, options, normalizer);
  c.normalizer_ptr = at(normalizer_ptr), c.has_normalizer |= normalizer_ptr != 0;
  c.grad = at(grad), c.grad_entropy = at(grad_entropy), c.scales_grad = true;
  c.loss = at(loss), c.metrics = at(metrics), c.sums = sums.data();
  Cpu::run(c, dtype, threads);
}

}  // namespace

void bind_policy(pybind11::module_& m) {
  PolicyBindings<Cpu>::bind(m);
  pybind11::class_<policy::Options<double>>(m, "PolicyOptions", pybind11::module_local())
      .def(pybind11::init(&options_from));
  m.def("plain_policy_loss", &plain_policy_loss);
}

}  // namespace fastloss
