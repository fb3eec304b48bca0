// The functions of csrc/common/pair_arguments.h from Python, once for both modules: every pointer an integer address, 0
// for null. Reads and writes what docs/sequences.md says. A backend brings its dtypes and its launchers.
// Arguments are positional; the last one is the number of threads (CPU) or the stream's address (CUDA).
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "common/code_bindings.h"
#include "common/pair_arguments.h"

namespace fastloss {

using Address = uintptr_t;

template <class T>
T* from(Address address) {
  return reinterpret_cast<T*>(address);
}

// (code, weight) of each term, and what follows from the dtype of the data.
template <class S, class M>
void set_terms(PairLoss<S, M>& a, const pybind11::sequence& terms) {
  if (terms.size() > size_t(kMaxTerms)) throw std::invalid_argument("terms: expected at most 8");
  for (const pybind11::handle term : terms) {
    const auto pair = pybind11::reinterpret_borrow<pybind11::sequence>(term);
    a.code[a.terms] = code_of<PairTerm>("terms", pair[0].cast<int>());
    a.term_weight[a.terms++] = M(pair[1].cast<double>());
  }
  a.log1mexp_limit = M(sizeof(S) == 4 ? -1e-7 : -1e-15);
}

template <class S, class M>
void set_divergence(PairLoss<S, M>& a, int divergence, double alpha) {
  a.divergence = code_of<Divergence>("divergence", divergence);
  a.alpha_minus_1 = std::fabs(alpha - 1) < kNearlyOne ? M(0) : M(alpha - 1);
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
              from<S>(values), from<S>(weights), {from<int64_t>(offsets), length, count}, from<S>(out)},
          context);
    });
  }

  static void segment_expand(Address upstream, int dtype, Address weights, Address offsets, int64_t length,
                             int64_t count, int64_t n, Address out, int64_t context) {
    Backend::with_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      Backend::run(
          SegmentExpand<S>{
              from<S>(upstream), from<S>(weights), {from<int64_t>(offsets), length, count}, n, from<S>(out)},
          context);
    });
  }

  static void pair_loss(Address c, Address r, int dtype, int64_t pairs, Address rc, Address rr, Address lc,
                        Address lr, Address nll, const pybind11::sequence& terms, int divergence,
                        double alpha, double beta, Address beta_each, double smoothing,
                        Address smoothing_each, double margin, Address margin_each, Address weight,
                        double delta, Address delta_ptr, double tau, bool average_rewards, Address loss,
                        Address d_c, Address d_r, Address d_nll, Address chosen_reward,
                        Address rejected_reward, Address sums, int64_t context) {
    Backend::with_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      using M = typename Backend::template Math<S>;
      PairLoss<S, M> a = {};
      a.c = from<S>(c), a.r = from<S>(r), a.pairs = pairs;
      a.rc = from<S>(rc), a.rr = from<S>(rr), a.lc = from<S>(lc), a.lr = from<S>(lr), a.nll = from<S>(nll);
      set_terms(a, terms);
      set_divergence(a, divergence, alpha);
      a.beta = {from<S>(beta_each), M(beta)}, a.smoothing = {from<S>(smoothing_each), M(smoothing)};
      a.margin = {from<S>(margin_each), M(margin)}, a.weight = {from<S>(weight), M(1)};
      a.delta = {from<S>(delta_ptr), M(delta)}, a.tau = M(tau);
      a.average_rewards = average_rewards;
      a.loss = from<S>(loss), a.d_c = from<S>(d_c), a.d_r = from<S>(d_r), a.d_nll = from<S>(d_nll);
      a.chosen_reward = from<S>(chosen_reward), a.rejected_reward = from<S>(rejected_reward);
      a.sums = from<S>(sums);
      Backend::run(a, context);
    });
  }

  static void unpaired_loss(Address logps, int dtype, int64_t sequences, Address ref, Address desirable,
                            Address weight, Address kl, int code, double beta, double desirable_weight,
                            double undesirable_weight, Address loss, Address d, Address reward, Address sums,
                            int64_t context) {
    const UnpairedTerm term = code_of<UnpairedTerm>("term", code);
    Backend::with_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      using M = typename Backend::template Math<S>;
      Backend::run(UnpairedLoss<S, M>{from<S>(logps), sequences, from<S>(ref), from<S>(weight),
                                      from<uint8_t>(desirable), from<S>(kl), term, M(beta),
                                      M(desirable_weight), M(undesirable_weight), from<S>(loss), from<S>(d),
                                      from<S>(reward), from<S>(sums)},
                   context);
    });
  }

  static void bind(pybind11::module_& m) {
    m.def("segment_sum", &segment_sum);
    m.def("segment_expand", &segment_expand);
    m.def("pair_loss", &pair_loss);
    m.def("unpaired_loss", &unpaired_loss);
  }
};

}  // namespace fastloss
