// policy_loss, gae and discounted_returns from Python, once for both modules: every pointer an integer
// address, 0 for null. Reads and writes what docs/sequences.md, 7 and 8, says.
// Arguments are positional; the last one is the number of threads (CPU) or the stream's address (CUDA).
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "common/code_bindings.h"
#include "common/policy_arguments.h"
#include "common/scan_arguments.h"

namespace fastloss {

// Of a fastloss.losses.policy_options.PolicyOptions, by name.
inline policy::Options<double> options_from(const pybind11::object& options) {
  const auto number = [&](const char* name) { return options.attr(name).cast<double>(); };
  const auto code = [&](const char* name) { return options.attr(name).cast<int>(); };
  policy::Options<double> o = {};
  o.surrogate = code_of<policy::Surrogate>("surrogate", code("surrogate"));
  o.level = code_of<policy::Level>("level", code("level"));
  o.kl_kind = code_of<policy::KlKind>("kl_kind", code("kl_kind"));
  o.correction = code_of<policy::Correction>("correction", code("correction"));
  o.aggregation = code_of<policy::Aggregation>("aggregation", code("aggregation"));
  o.kl_unbiased = options.attr("kl_unbiased").cast<bool>();
  o.clip_low = number("clip_low"), o.clip_high = number("clip_high");
  o.ratio_low = 1.0 - o.clip_low, o.ratio_high = 1.0 + o.clip_high;
  o.delta = number("delta"), o.dual_clip = number("dual_clip");
  o.cispo_low = number("cispo_low"), o.cispo_high = number("cispo_high");
  o.sapo_pos = number("sapo_pos"), o.sapo_neg = number("sapo_neg");
  o.vespo_k_pos = number("vespo_k_pos"), o.vespo_lambda_pos = number("vespo_lambda_pos");
  o.vespo_k_neg = number("vespo_k_neg"), o.vespo_lambda_neg = number("vespo_lambda_neg");
  o.kl_cov_coef = number("kl_cov_coef"), o.beta = number("beta");
  o.entropy_coef = number("entropy_coef");
  o.cap = number("cap"), o.floor = number("floor");
  o.log_cap = std::log(o.cap);
  o.log_floor = o.floor > 0 ? std::log(o.floor) : -std::numeric_limits<double>::infinity();
  o.off_policy_threshold = number("off_policy_threshold"), o.max_length = number("max_length");
  return o;
}

// The options, and what the loss is divided by, of a call whose tensors and count are there.
inline void set_options(policy::Call& c, const policy::Options<double>& options,
                        const pybind11::object& normalizer) {
  c.options = options;
  if (!c.sampler) c.options.correction = policy::Correction::kNone;
  const bool by_length = !c.agg && c.options.aggregation == policy::Aggregation::kSeqMeanTokenSumNorm;
  c.by_tokens = c.agg || c.options.aggregation == policy::Aggregation::kTokenMean;
  c.has_normalizer = !normalizer.is_none();
  c.normalizer = normalizer.is_none() ? 0.0 : normalizer.cast<double>();
  c.normalizer_factor = by_length ? c.options.max_length : 1.0;
  c.divisor = double(std::max<int64_t>(c.count, 1)) * c.normalizer_factor;
}

// Backend::run(arguments, dtype, context) runs.
template <class Backend>
struct PolicyBindings {
  using Address = uintptr_t;

  template <class T = void>
  static T* at(Address address) {
    return reinterpret_cast<T*>(address);
  }

  static void policy_loss(int dtype, Address logprobs, Address old, Address advantages,
                          bool advantage_of_sequence, Address mask, Address ref, Address entropy,
                          Address sampler, Address token_weight, Address select, Address agg, Address offsets,
                          int64_t n, int64_t length, int64_t count, const pybind11::object& options,
                          const pybind11::object& normalizer, Address normalizer_ptr, Address grad,
                          Address grad_entropy, Address out, Address sums, Address ticket, int64_t context) {
    policy::Call c = {};
    c.logprobs = at(logprobs), c.old = at(old), c.advantages = at(advantages);
    c.advantage_of_sequence = advantage_of_sequence;
    c.mask = at<uint8_t>(mask);
    c.ref = at(ref), c.entropy = at(entropy), c.sampler = at(sampler), c.token_weight = at(token_weight);
    c.select = at<uint8_t>(select), c.agg = at(agg), c.offsets = at<int64_t>(offsets);
    c.n = n, c.length = length, c.count = count;
    set_options(c, options_from(options), normalizer);
    c.normalizer_ptr = at(normalizer_ptr), c.has_normalizer |= normalizer_ptr != 0;
    c.grad = at(grad), c.grad_entropy = at(grad_entropy), c.out = at(out);
    c.sums = at<double>(sums), c.ticket = at<unsigned>(ticket);
    Backend::run(c, dtype, context);
  }

  static void scan(int dtype, Address rewards, Address values, Address mask, Address offsets, int64_t n,
                   int64_t length, int64_t count, double gamma, double lam, Address advantages,
                   Address returns, int64_t context) {
    Backend::run(Scan{at(rewards), at(values), at<uint8_t>(mask), at<int64_t>(offsets), n, length, count,
                      gamma, lam, at(advantages), at(returns)},
                 dtype, context);
  }

  static void bind(pybind11::module_& m) {
    m.def("policy_loss", &policy_loss);
    m.def("scan", &scan);
  }
};

}  // namespace fastloss
