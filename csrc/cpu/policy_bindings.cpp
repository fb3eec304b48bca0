// policy_loss, gae and discounted_returns in fastloss._cpu: float32 and float64.
// Reads and writes nothing itself.
// Apart from bindings.cpp, which has the row functions.
#include "common/policy_bindings.h"

#include <vector>

#include "args.h"
#include "parallel.h"
#include "policy.h"
#include "scan.h"
#include "tokens.h"

namespace fastloss {
namespace {

struct Cpu {
  static void run(const policy::Call& call, int dtype, int64_t threads) {
    expect_accumulation_dtype(dtype);
    const ReleaseGil gil(call.n >= kSmallWork);
    policy_loss(call, dtype, threads);
  }
  static void run(const Scan& a, int dtype, int64_t threads) {
    expect_accumulation_dtype(dtype);
    const ReleaseGil gil(a.n >= kSmallWork);
    scan(a, dtype, threads);
  }
  static void run(const ValueLoss& a, int dtype, int64_t threads) {
    expect_accumulation_dtype(dtype);
    const ReleaseGil gil(a.n >= kSmallWork);
    value_loss(a, dtype, threads);
  }
  static void run(const KlEstimate& a, int dtype, int64_t threads) {
    expect_accumulation_dtype(dtype);
    const ReleaseGil gil(a.n >= kSmallWork);
    kl_estimate(a, dtype, threads);
  }
};

// policy_loss of padded sequences with the fewest calls from Python around it: options read once, the
// gradient times the scale, the metrics made here.
void direct_policy_loss(const policy::Options<double>& options, int dtype, Address logprobs, Address old,
                        Address advantages, bool advantage_of_sequence, Address mask, Address ref,
                        Address entropy, Address sampler, int64_t length, int64_t count,
                        const pybind11::object& normalizer, Address normalizer_tensor, Address d_logprobs,
                        Address d_entropy, Address loss, Address metrics, int64_t threads) {
  thread_local std::vector<double> sums;
  sums.resize(size_t(count) * policy::kSums);
  policy::Call c = {};
  c.logprobs = required("logprobs", logprobs), c.old = at(old);
  c.advantages = required("advantages", advantages);
  c.advantage_of_sequence = advantage_of_sequence;
  c.mask = required<uint8_t>("mask", mask), c.ref = at(ref), c.entropy = at(entropy), c.sampler = at(sampler);
  c.n = length * count, c.length = length, c.count = count;
  set_options(c, options, normalizer, normalizer_tensor);
  c.grad = required("d_logprobs", d_logprobs), c.grad_entropy = at(d_entropy), c.scales_grad = true;
  c.loss = required("loss", loss), c.metrics = required("metrics", metrics), c.sums = sums.data();
  Cpu::run(c, dtype, threads);
}

}  // namespace

void bind_policy(pybind11::module_& m) {
  PolicyBindings<Cpu>::bind(m);
  // A fastloss.tables.PolicyOptions that was read: reading it costs as much as a tiny call.
  pybind11::class_<policy::Options<double>>(m, "PolicyOptions", pybind11::module_local())
      .def(pybind11::init(&options_from), pybind11::arg("options"));
  // By position: naming each argument would cost more than the kernel.
  using pybind11::arg;
  m.def("direct_policy_loss", &direct_policy_loss, arg("options"), arg("dtype"), arg("logprobs"), arg("old"),
        arg("advantages"), arg("advantage_of_sequence"), arg("mask"), arg("ref"), arg("entropy"),
        arg("sampler"), arg("length"), arg("count"), arg("normalizer"), arg("normalizer_tensor"),
        arg("d_logprobs"), arg("d_entropy"), arg("loss"), arg("metrics"), arg("threads"));
}

}  // namespace fastloss
