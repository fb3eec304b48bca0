// The arguments of segment_sum, segment_expand, pair_loss and unpaired_loss (docs/sequences.md) as plain
// structs, and what happens to one pair or one sequence between its loads and its stores. `S` is the dtype in
// memory, `M` the one computed in: float and double on the CPU, float and float on a GPU.
#pragma once

#include "common/pair_terms.h"

namespace fastloss {

constexpr int kMaxTerms = 8, kSums = 7;
static_assert(kPairSums == kSums && kUnpairedSums == kSums);

struct Segments {
  const int64_t* offsets;  // [count + 1], or null: every sequence has `length`
  int64_t length, count;

  FASTLOSS_HD int64_t begin(int64_t s) const { return offsets ? offsets[s] : s * length; }
};

template <class S>
struct SegmentSum {
  const S *values, *weights;
  Segments segments;
  S* out;  // [count]
};

template <class S>
struct SegmentExpand {
  const S *upstream, *weights;
  Segments segments;
  int64_t n;
  S* out;  // [n]; 0 outside all sequences
};

// A position of weight 0 is not looked at: its value may be a NaN.
template <class S>
FASTLOSS_HD inline double weighted(const S* values, const S* weights, int64_t i) {
  if (!weights) return double(values[i]);
  const double w = double(weights[i]);
  return w == 0 ? 0.0 : w * double(values[i]);
}

// A number, or one per pair.
template <class S, class M>
struct PerPair {
  const S* each;
  M number;

  FASTLOSS_HD M at(int64_t i) const { return each ? M(each[i]) : number; }
};

template <class S, class M>
struct PairLoss {
  const S *c, *r;
  int64_t pairs;
  const S *rc, *rr, *lc, *lr, *nll;  // each [pairs] or null
  int terms;
  PairTerm code[kMaxTerms];
  M term_weight[kMaxTerms];
  Divergence divergence;
  M alpha_minus_1;
  PerPair<S, M> beta, smoothing, margin, weight;
  M delta, tau, log1mexp_limit;
  bool average_rewards;
  S *loss, *d_c, *d_r, *d_nll, *chosen_reward, *rejected_reward, *sums;

  FASTLOSS_HD bool needs_tokens() const {
    bool any = false;
    for (int k = 0; k < terms; ++k) any |= code[k] == PairTerm::kSft;
    return any && lc;
  }
};

// `tokens` is Σ lc, used by sft.
template <class S, class M>
FASTLOSS_HD inline PairConstants<M> pair_constants(const PairLoss<S, M>& a, double tokens) {
  return {a.delta, a.tau, tokens > 0 ? M(double(a.pairs) / tokens) : M(0), a.log1mexp_limit};
}

// Computes and stores pair i; its share of the sums is added to `sums`.
template <class S, class M>
FASTLOSS_HD inline void one_pair(const PairLoss<S, M>& a, const PairConstants<M>& k, int64_t i,
                                 double (&sums)[kSums]) {
  Pair<M> pair;
  pair.c = M(a.c[i]), pair.r = M(a.r[i]);
  pair.xc = pair.c - (a.rc ? M(a.rc[i]) : M(0)), pair.xr = pair.r - (a.rr ? M(a.rr[i]) : M(0));
  pair.lc = a.lc && a.lc[i] != 0 ? M(a.lc[i]) : M(1), pair.lr = a.lr && a.lr[i] != 0 ? M(a.lr[i]) : M(1);
  pair.nll = a.nll ? M(a.nll[i]) : pair.c;
  pair.beta = a.beta.at(i), pair.smoothing = a.smoothing.at(i), pair.margin = a.margin.at(i);
  pair.sc = divergence_of(a.divergence, pair.xc, a.alpha_minus_1);
  pair.sr = divergence_of(a.divergence, pair.xr, a.alpha_minus_1);

  Term<M> all = {};
  for (int t = 0; t < a.terms; ++t) {
    const Term<M> term = pair_term(a.code[t], pair, k);
    const M w = a.term_weight[t];
    all.value += w * term.value, all.d_c += w * term.d_c, all.d_r += w * term.d_r,
        all.d_nll += w * term.d_nll;
  }
  const M weight = a.weight.at(i);
  if (!a.nll) all.d_c += all.d_nll;
  if (a.d_nll) a.d_nll[i] = S(weight * all.d_nll);
  a.d_c[i] = S(weight * all.d_c), a.d_r[i] = S(weight * all.d_r);

  const S loss = S(weight * all.value);
  M chosen = pair.beta * pair.xc, rejected = pair.beta * pair.xr;
  if (a.average_rewards) chosen /= pair.lc, rejected /= pair.lr;
  a.loss[i] = loss, a.chosen_reward[i] = S(chosen), a.rejected_reward[i] = S(rejected);

  sums[kPairLoss] += double(loss);
  sums[kChosenReward] += double(chosen), sums[kRejectedReward] += double(rejected);
  sums[kAccuracy] += chosen > rejected ? 1.0 : 0.0, sums[kMargin] += double(chosen) - double(rejected);
  sums[kChosenLogps] += double(pair.c), sums[kRejectedLogps] += double(pair.r);
}

template <class S, class M>
struct UnpairedLoss {
  const S* logps;
  int64_t sequences;
  const S *ref, *weight;  // each [sequences] or null
  const uint8_t* desirable;
  const S* kl;  // one number, or null
  UnpairedTerm code;
  M beta, desirable_weight, undesirable_weight;
  S *loss, *d, *reward, *sums;
};

template <class S, class M>
FASTLOSS_HD inline void one_sequence(const UnpairedLoss<S, M>& a, M kl, int64_t i, double (&sums)[kSums]) {
  const M logps = M(a.logps[i]), x = logps - (a.ref ? M(a.ref[i]) : M(0));
  const bool desirable = a.desirable[i] != 0;
  const M weight =
      (a.weight ? M(a.weight[i]) : M(1)) * (desirable ? a.desirable_weight : a.undesirable_weight);
  const Valued<M> term = unpaired_term(a.code, x, a.beta, kl, desirable);
  const S loss = S(weight * term.value);
  const M reward = a.beta * x;
  a.loss[i] = loss, a.d[i] = S(weight * term.slope), a.reward[i] = S(reward);

  sums[kUnpairedLoss] += double(loss), sums[kDesirable] += desirable ? 1.0 : 0.0;
  sums[kDesirableReward] += desirable ? double(reward) : 0.0;
  sums[kUndesirableReward] += desirable ? 0.0 : double(reward);
  sums[kDesirableLogps] += desirable ? double(logps) : 0.0;
  sums[kUndesirableLogps] += desirable ? 0.0 : double(logps);
}

}  // namespace fastloss
