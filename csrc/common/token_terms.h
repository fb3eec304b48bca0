// The math of value_loss, once for all C++ kernels: a token's loss and its derivative, the sums of a part,
// and what is made of all parts. Registers only. V is a float, a double, or a vector of them
// (csrc/cpu/vec.h).
#pragma once

#include "common/policy_terms.h"
#include "common/token_arguments.h"

namespace fastloss {
namespace FASTLOSS_SPACE {

template <class V>
struct ValueTerm {
  V loss, slope;
  MaskOf<V> clipped;
};

// ½ max((v - r)², (clip(v, old ± range) - r)²). A NaN in `old` stays one.
template <class V, class S>
FASTLOSS_TERM ValueTerm<V> value_term(V value, V target, V old, bool clips, S range) {
  const V missed = value - target;
  ValueTerm<V> t = {S(0.5) * missed * missed, missed, MaskOf<V>{}};
  if (!clips) return t;
  const V moved = value - old, near = (old + clamped(moved, -range, range)) - target;
  const V further = S(0.5) * near * near;
  // What the clip leaves alone is not computed again: its rounding would decide which of the two is larger.
  const auto inside = within(moved, -range, range);
  const auto stays = inside | (further <= t.loss);
  t.clipped = (further > t.loss) & (stays == 0);
  t.slope = stays ? t.slope : moved == moved ? V{} : moved;  // a constant, but for a NaN
  t.loss = stays ? t.loss : further;
  return t;
}

// The mean of a part's `n` numbers, and their squares around it, from sums that were counted from `from`.
struct Moments {
  double mean, squares;
};
FASTLOSS_TERM Moments moments_of(double n, double from, double sum, double squares) {
  if (!(n > 0)) return {0.0, 0.0};
  const double left = squares - sum * sum / n;
  return {from + sum / n, left < 0 ? 0.0 : left};
}

// Sums over the parts. A part's mean counts from `from`, one of the means: numbers that are all the same have
// no variance, not even a rounding.
struct ValueTotal {
  double tokens, clipped, loss, values, returns, returns_squares, missed, missed_squares;

  FASTLOSS_TERM void add(const ValuePart& p, double returns_from, double missed_from) {
    const double r = p.tokens > 0 ? p.returns_mean - returns_from : 0.0;
    const double m = p.tokens > 0 ? p.missed_mean - missed_from : 0.0;
    tokens += p.tokens, clipped += p.clipped, loss += p.loss, values += p.values;
    returns += p.tokens * r, returns_squares += p.returns_squares + p.tokens * r * r;
    missed += p.tokens * m, missed_squares += p.missed_squares + p.tokens * m * m;
  }
};

template <class S>
FASTLOSS_TERM void put_value(const ValueLoss& call, const ValueTotal& t) {
  S* const out = static_cast<S*>(call.out);
  const double n = t.tokens > 1 ? t.tokens : 1.0;
  const double scale = call.scale ? double(*static_cast<const S*>(call.scale)) : 1.0 / n;
  const double spread = moments_of(t.tokens, 0, t.returns, t.returns_squares).squares;
  const double missed = moments_of(t.tokens, 0, t.missed, t.missed_squares).squares;
  out[value::kLoss] = S(t.loss * scale), out[value::kScale] = S(scale);
  out[value::kClipRatio] = S(t.clipped / n), out[value::kMean] = S(t.values / n);
  out[value::kExplainedVariance] = S(spread <= 0 ? 0.0 : 1.0 - missed / spread);
}

}  // namespace FASTLOSS_SPACE
}  // namespace fastloss
