// The functions of pair_arguments.h from Python, once for both modules. Reads and writes what
// docs/sequences.md says. A backend brings its dtypes and its launchers; `context` is the number of
// threads (CPU) or the stream's address (CUDA).
#pragma once

#include "common/bindings.h"
#include "common/pair_arguments.h"

namespace fastloss {

// A field of a fastloss.tables.PairOptions that is a number, or a tensor of one per pair (at the address that
// is passed beside the record).
inline double number_for_all(const Record& options, const char* name, Address each) {
  const pybind11::object value = options.field(name);
  if (PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr())) return value.cast<double>();
  if (!each)
    throw std::invalid_argument(std::string(name) + ": expected a number, or the address of one per pair");
  return 0.0;
}

// Of a fastloss.tables.PairOptions, by name: all but its tensors.
template <class S, class M>
void set_options(PairLoss<S, M>& a, const Record& options, Address beta_each = 0, Address smoothing_each = 0,
                 Address margin_each = 0) {
  const auto terms = pybind11::reinterpret_borrow<pybind11::sequence>(options.field("terms"));
  if (terms.size() > size_t(kMaxTerms)) throw std::invalid_argument("terms: expected at most 8");
  a.terms = 0;
  for (const pybind11::handle term : terms) {
    const auto pair = pybind11::reinterpret_borrow<pybind11::sequence>(term);
    a.code[a.terms] = code_of<PairTerm>("terms", pair[0].cast<int>());
    a.term_weight[a.terms++] = M(pair[1].cast<double>());
  }
  a.divergence = options.code<Divergence>("divergence");
  const double alpha = options.number("alpha");
  a.alpha_minus_1 = std::fabs(alpha - 1) < kNearlyOne ? M(0) : M(alpha - 1);
  a.beta = {at<S>(beta_each), M(number_for_all(options, "beta", beta_each))};
  a.smoothing = {at<S>(smoothing_each), M(number_for_all(options, "smoothing", smoothing_each))};
  a.margin = {at<S>(margin_each), M(number_for_all(options, "margin", margin_each))};
  a.delta = M(options.number("delta")), a.tau = M(options.number("tau"));
  a.average_rewards = options.flag("average_rewards");
  a.weight.number = M(1);
  a.log1mexp_limit = M(sizeof(S) == 4 ? -1e-7 : -1e-15);
}

// Backend::with_dtype(code, f) calls f with a zero of the storage dtype; Backend::Math<S> is what S is
// computed in; Backend::run(arguments, context) runs.
template <class Backend>
struct PairBindings {
  static void segment_sum(Address values, int dtype, Address weights, Address offsets, int64_t length,
                          int64_t count, Address out, int64_t context) {
    Backend::with_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      Backend::run(
          SegmentSum<S>{
              at<S>(values), at<S>(weights), {at<int64_t>(offsets), length, count}, required<S>("out", out)},
          context);
    });
  }

  static void segment_expand(Address upstream, int dtype, Address weights, Address offsets, int64_t length,
                             int64_t count, int64_t n, Address out, int64_t context) {
    Backend::with_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      Backend::run(SegmentExpand<S>{at<S>(upstream),
                                    at<S>(weights),
                                    {at<int64_t>(offsets), length, count},
                                    n,
                                    required<S>("out", out)},
                   context);
    });
  }

  static void pair_loss(Address chosen, Address rejected, int dtype, int64_t pairs, Address nll,
                        Address ref_chosen, Address ref_rejected, Address chosen_lengths,
                        Address rejected_lengths, Address weight, const pybind11::object& options,
                        Address beta_each, Address smoothing_each, Address margin_each, Address loss,
                        Address d_chosen, Address d_rejected, Address d_nll, Address chosen_reward,
                        Address rejected_reward, Address sums, int64_t context) {
    Backend::with_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      using M = typename Backend::template Math<S>;
      PairLoss<S, M> a = {};
      set_options(a, Record(options), beta_each, smoothing_each, margin_each);
      a.c = required<S>("chosen", chosen), a.r = required<S>("rejected", rejected), a.pairs = pairs;
      a.rc = at<S>(ref_chosen), a.rr = at<S>(ref_rejected);
      a.lc = at<S>(chosen_lengths), a.lr = at<S>(rejected_lengths), a.nll = at<S>(nll);
      a.weight.each = at<S>(weight);
      a.loss = required<S>("loss", loss), a.d_c = required<S>("d_chosen", d_chosen);
      a.d_r = required<S>("d_rejected", d_rejected), a.d_nll = at<S>(d_nll);
      a.chosen_reward = required<S>("chosen_reward", chosen_reward);
      a.rejected_reward = required<S>("rejected_reward", rejected_reward);
      a.sums = required<S>("sums", sums);
      Backend::run(a, context);
    });
  }

  static void unpaired_loss(Address logps, int dtype, int64_t sequences, Address desirable, Address ref,
                            Address weight, Address kl, const pybind11::object& options, Address loss,
                            Address d_logps, Address reward, Address sums, int64_t context) {
    const Record record(options);
    const UnpairedTerm term = record.code<UnpairedTerm>("term");
    Backend::with_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      using M = typename Backend::template Math<S>;
      Backend::run(UnpairedLoss<S, M>{required<S>("logps", logps), sequences, at<S>(ref), at<S>(weight),
                                      required<uint8_t>("desirable", desirable), at<S>(kl), term,
                                      M(record.number("beta")), M(record.number("desirable_weight")),
                                      M(record.number("undesirable_weight")), required<S>("loss", loss),
                                      required<S>("d_logps", d_logps), required<S>("reward", reward),
                                      required<S>("sums", sums)},
                   context);
    });
  }

  static void bind(pybind11::module_& m) {
    define(m, "segment_sum", &segment_sum, "values", "dtype", "weights", "offsets", "length", "count", "out",
           "context");
    define(m, "segment_expand", &segment_expand, "upstream", "dtype", "weights", "offsets", "length", "count",
           "n", "out", "context");
    define(m, "pair_loss", &pair_loss, "chosen", "rejected", "dtype", "pairs", "nll", "ref_chosen",
           "ref_rejected", "chosen_lengths", "rejected_lengths", "weight", "options", "beta_each",
           "smoothing_each", "margin_each", "loss", "d_chosen", "d_rejected", "d_nll", "chosen_reward",
           "rejected_reward", "sums", "context");
    define(m, "unpaired_loss", &unpaired_loss, "logps", "dtype", "sequences", "desirable", "ref", "weight",
           "kl", "options", "loss", "d_logps", "reward", "sums", "context");
  }
};

}  // namespace fastloss
