// policy_loss and scan from Python, once for both modules. Reads and writes what docs/sequences.md
// says. `context` is the number of threads (CPU) or the stream's address (CUDA).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/bindings.h"
#include "common/policy_arguments.h"
#include "common/scan_arguments.h"
#include "common/token_arguments.h"

namespace fastloss {

// Of a fastloss.tables.PolicyOptions, by name.
inline policy::Options<double> options_from(const pybind11::object& record) {
  const Record r(record);
  policy::Options<double> o = {};
  o.surrogate = r.code<policy::Surrogate>("surrogate"), o.level = r.code<policy::Level>("level");
  o.aggregation = r.code<policy::Aggregation>("aggregation");
  o.kl_kind = r.code<policy::KlKind>("kl_kind");
  o.correction = r.code<policy::Correction>("correction");
  o.kl_unbiased = r.flag("kl_unbiased");
  o.clip_low = r.number("clip_low"), o.clip_high = r.number("clip_high");
  o.ratio_low = 1.0 - o.clip_low, o.ratio_high = 1.0 + o.clip_high;
  o.delta = r.number("delta"), o.dual_clip = r.number("dual_clip");
  o.cispo_low = r.number("cispo_low"), o.cispo_high = r.number("cispo_high");
  o.sapo_pos = r.number("sapo_pos"), o.sapo_neg = r.number("sapo_neg");
  o.vespo_k_pos = r.number("vespo_k_pos"), o.vespo_lambda_pos = r.number("vespo_lambda_pos");
  o.vespo_k_neg = r.number("vespo_k_neg"), o.vespo_lambda_neg = r.number("vespo_lambda_neg");
  o.kl_cov_coef = r.number("kl_cov_coef"), o.beta = r.number("beta");
  o.entropy_coef = r.number("entropy_coef");
  o.cap = r.number("cap"), o.floor = r.number("floor");
  o.log_cap = std::log(o.cap);
  o.log_floor = o.floor > 0 ? std::log(o.floor) : -std::numeric_limits<double>::infinity();
  o.off_policy_threshold = r.number("off_policy_threshold"), o.max_length = r.number("max_length");
  return o;
}

// The options, and what the loss is divided by (a number, an address, or neither), of a call whose tensors
// and count are there.
inline void set_options(policy::Call& c, const policy::Options<double>& options,
                        const pybind11::object& normalizer, Address normalizer_tensor) {
  c.options = options;
  if (!c.sampler) c.options.correction = policy::Correction::kNone;
  const bool by_length = !c.agg && c.options.aggregation == policy::Aggregation::kSeqMeanTokenSumNorm;
  c.by_tokens = c.agg || c.options.aggregation == policy::Aggregation::kTokenMean;
  c.has_normalizer = normalizer_tensor || !normalizer.is_none();
  c.normalizer = normalizer.is_none() ? 0.0 : normalizer.cast<double>();
  c.normalizer_ptr = at(normalizer_tensor);
  c.normalizer_factor = by_length ? c.options.max_length : 1.0;
  c.divisor = double(std::max<int64_t>(c.count, 1)) * c.normalizer_factor;
}

// Backend::run(arguments, dtype, context) runs.
template <class Backend>
struct PolicyBindings {
  static void policy_loss(Address logprobs, int dtype, Address entropy, Address advantages,
                          bool advantage_of_sequence, Address mask, Address old, Address ref, Address sampler,
                          Address token_weight, Address select, Address share, Address offsets, int64_t n,
                          int64_t length, int64_t count, const pybind11::object& options,
                          const pybind11::object& normalizer, Address normalizer_tensor, Address d_logprobs,
                          Address d_entropy, Address out, Address sums, Address ticket, int64_t context) {
    policy::Call c = {};
    c.logprobs = required("logprobs", logprobs), c.advantages = required("advantages", advantages);
    c.advantage_of_sequence = advantage_of_sequence;
    c.mask = required<uint8_t>("mask", mask);
    c.old = at(old), c.ref = at(ref), c.entropy = at(entropy), c.sampler = at(sampler);
    c.token_weight = at(token_weight), c.select = at<uint8_t>(select), c.agg = at(share);
    c.offsets = at<int64_t>(offsets);
    c.n = n, c.length = length, c.count = count;
    set_options(c, options_from(options), normalizer, normalizer_tensor);
    c.grad = required("d_logprobs", d_logprobs), c.grad_entropy = at(d_entropy), c.out = required("out", out);
    c.sums = count > 0 ? required<double>("sums", sums) : nullptr;
    c.ticket = at<unsigned>(ticket);
    Backend::run(c, dtype, context);
  }

  static void scan(Address rewards, int dtype, Address values, Address mask, Address offsets, int64_t n,
                   int64_t length, int64_t count, double gamma, double lam, Address advantages,
                   Address returns, int64_t context) {
    if (values && !advantages) throw std::invalid_argument("advantages: expected an address, got 0");
    Backend::run(
        Scan{required("rewards", rewards), at(values), required<uint8_t>("mask", mask), at<int64_t>(offsets),
             n, length, count, gamma, lam, at(advantages), required("returns", returns)},
        dtype, context);
  }

  static void value_loss(Address values, int dtype, Address returns, Address old, Address share, Address mask,
                         int64_t n, double clip_range, Address scale, Address grad, Address out,
                         Address parts, Address ticket, int64_t context) {
    ValueLoss a = {};
    a.values = required("values", values), a.returns = required("returns", returns);
    a.old = at(old), a.share = at(share), a.mask = required<uint8_t>("mask", mask);
    a.n = n, a.clip_range = clip_range, a.scale = at(scale);
    a.grad = required("grad", grad), a.out = required("out", out);
    a.parts = required<ValuePart>("parts", parts), a.ticket = at<unsigned>(ticket);
    Backend::run(a, dtype, context);
  }

  static void kl_estimate(Address logprobs, int dtype, Address ref, Address upstream, int64_t n, int kind,
                          Address out, int64_t context) {
    Backend::run(KlEstimate{required("logprobs", logprobs), required("ref", ref), at(upstream), n,
                            code_of<policy::KlKind>("kind", kind), required("out", out)},
                 dtype, context);
  }

  static void bind(pybind11::module_& m) {
    m.attr("VALUE_PART_TOKENS") = kValuePart, m.attr("VALUE_PART_BYTES") = int64_t(sizeof(ValuePart));
    define(m, "value_loss", &value_loss, "values", "dtype", "returns", "old", "share", "mask", "n",
           "clip_range", "scale", "grad", "out", "parts", "ticket", "context");
    define(m, "kl_estimate", &kl_estimate, "logprobs", "dtype", "ref", "upstream", "n", "kind", "out",
           "context");
    define(m, "policy_loss", &policy_loss, "logprobs", "dtype", "entropy", "advantages",
           "advantage_of_sequence", "mask", "old", "ref", "sampler", "token_weight", "select", "share",
           "offsets", "n", "length", "count", "options", "normalizer", "normalizer_tensor", "d_logprobs",
           "d_entropy", "out", "sums", "ticket", "context");
    define(m, "scan", &scan, "rewards", "dtype", "values", "mask", "offsets", "n", "length", "count", "gamma",
           "lam", "advantages", "returns", "context");
  }
};

}  // namespace fastloss
