// The math of policy_loss, once for all C++ kernels: a token's surrogate, KL, multipliers and derivatives.
// Registers only. docs/sequences.md ("Policy losses") has the formulas and the names.
// V is a float, a double, or a vector of them (csrc/cpu/vec.h); `mask ? a : b` and `&` work on all of these.
#pragma once

#include <type_traits>

#include "common/policy_arguments.h"
#include "common/space.h"

namespace fastloss {
namespace FASTLOSS_SPACE {

using policy::Options;

// `s` in every lane. V{} + s is an addition that GCC must keep (-0 + 0 is 0); ptxas, without it, spills on
// sm_120.
template <class V, class S>
FASTLOSS_TERM V splat(S s) {
#ifdef FASTLOSS_ISA
  return s - V{};
#else
  return V{} + s;
#endif
}

// e^x, and e^x - 1 - x with its digits near 0 (for |x| <= 20).
#ifdef FASTLOSS_ISA
FASTLOSS_INLINE F32V exponential(F32V x) { return exp_any<float>(x); }
FASTLOSS_INLINE F64V exponential(F64V x) { return exp_any<double>(x); }
FASTLOSS_INLINE double exponential(double x) { return __builtin_exp(x); }

template <class V>
FASTLOSS_INLINE V exponential_and_k3(V x, V* k3) {
  using S = std::remove_reference_t<decltype(x[0])>;
  const ExpParts<S> e = exp_parts<S>(x);
  const V beyond = e.r * e.r * e.q;
  *k3 = beyond * e.scale + ((e.r * e.scale - x) + (e.scale - S(1)));
  return ((e.q * e.r + S(1)) * e.r + S(1)) * e.scale;
}

// k3 alone where |x| <= 1 in every lane: a minimax polynomial (mpmath chebyfit of (e^x - 1 - x)/x^2), half
// the work.
FASTLOSS_INLINE F32V k3_near_zero(F32V x) {
  constexpr float c[] = {0x1p-1f,         0x1.555556p-3f, 0x1.55557ap-5f,  0x1.11111ep-7f,
                         0x1.6bff52p-10f, 0x1.a009p-13f,  0x1.a971fcp-16f, 0x1.78a70ep-19f};
  const F32V square = x * x;
  F32V even = splat<F32V>(c[6]), odd = splat<F32V>(c[7]);  // two short chains in place of a long one
#pragma GCC unroll 3
  for (int k = 4; k >= 0; k -= 2) even = even * square + c[k], odd = odd * square + c[k + 1];
  return square * (odd * x + even);
}
FASTLOSS_INLINE F64V k3_near_zero(F64V x) {
  F64V k3;
  exponential_and_k3(x, &k3);
  return k3;
}
#else
inline __device__ float exponential(float x) { return expf(x); }
inline __device__ double exponential(double x) { return exp(x); }

inline __device__ float exponential_and_k3(float x, float* k3) {
  const float e = expf(x);
  float p = fmaf(x, 1.0f / 40320, 1.0f / 5040);
  p = fmaf(x, p, 1.0f / 720), p = fmaf(x, p, 1.0f / 120);
  p = fmaf(x, p, 1.0f / 24), p = fmaf(x, p, 1.0f / 6), p = fmaf(x, p, 0.5f);
  *k3 = fabsf(x) < 0.5f ? x * x * p : (e - 1.0f) - x;
  return e;
}
#endif

constexpr double kMaxLogRatio = 20.0;
constexpr double kLogTiny = -18.420680743952367;  // log 1e-8

// A NaN stays, as in PyTorch's clamp.
template <class V, class S>
FASTLOSS_TERM V clamped(V x, S low, S high) {
  x = x < low ? splat<V>(low) : x;
  return x > high ? splat<V>(high) : x;
}
#ifdef FASTLOSS_ISA
FASTLOSS_INLINE F32V clamped(F32V x, float low, float high) {
  return min_or_second(splat<F32V>(high), max_or_second(splat<F32V>(low), x));
}
FASTLOSS_INLINE F64V clamped(F64V x, double low, double high) {
  return min_or_second(splat<F64V>(high), max_or_second(splat<F64V>(low), x));
}
#endif

template <class V>
using MaskOf = decltype(V{} < V{});

template <class V, class S>
FASTLOSS_TERM MaskOf<V> within(V x, S low, S high) {
  return (x >= low) & (x <= high);
}

template <class V, class S>
FASTLOSS_TERM V zero_nan(V x, S zero) {
  return x == x ? x : splat<V>(zero);
}

// What all tokens of a sequence share. R: the type of the sequence's sums.
template <class R>
struct SequenceSums {
  R n, lr, g, d, log_c, off_policy;
};

template <class S>
struct Sequence {
  S share;             // 1/n for seq-mean-token-mean
  S rho, w_slope;      // beyond the token level: e^w, and dw/dlogprob_t up to the token's own clamp
  S c;                 // the sequence's sampler correction
  bool cut;            // whether that is 0 or truncated
  S keep;              // 0 where the off-policy mask takes the sequence out
  S phi_pos, phi_neg;  // vespo's
};

template <class S>
FASTLOSS_TERM bool needs_more_than_a_count(const Options<S>& o) {
  return o.level != policy::Level::kToken || o.correction >= policy::Correction::kSequenceTruncate ||
         o.off_policy_threshold < S(INFINITY) || o.surrogate == policy::Surrogate::kVespo;
}

template <class S>
FASTLOSS_TERM bool needs_sums(const Options<S>& o, bool agg) {
  return needs_more_than_a_count(o) || (!agg && o.aggregation == policy::Aggregation::kSeqMeanTokenMean);
}

template <class S>
FASTLOSS_TERM bool truncates(const Options<S>& o) {
  return o.correction == policy::Correction::kTokenTruncate ||
         o.correction == policy::Correction::kSequenceTruncate;
}

// c of e^d, and whether it is 0 or truncated.
template <class V, class S>
FASTLOSS_TERM V correct(const Options<S>& o, V e, MaskOf<V>* cut) {
  *cut = (e < o.floor) | (e > o.cap);
  return truncates(o) ? clamped(e, o.floor, o.cap) : *cut ? V{} : e;
}

// log c without a logarithm.
template <class V, class S>
FASTLOSS_TERM V log_correction(const Options<S>& o, V d) {
  const V c = truncates(o)                        ? clamped(d, o.log_floor, o.log_cap)
              : within(d, o.log_floor, o.log_cap) ? d
                                                  : splat<V>(S(kLogTiny));
  return clamped(c, S(kLogTiny), S(kMaxLogRatio));
}

// geometric's one-sided clamp of a log-ratio, and whether it lets the gradient through.
template <class V, class S>
FASTLOSS_TERM V one_sided(const Options<S>& o, V lr, V advantage, MaskOf<V>* slope) {
  const MaskOf<V> positive = advantage > S(0);
  const MaskOf<V> outside = positive ? lr > o.clip_high : lr < -o.clip_low;
  *slope = outside == 0;
  return outside ? (positive ? splat<V>(o.clip_high) : splat<V>(-o.clip_low)) : lr;
}

template <class R, class S>
FASTLOSS_TERM R vespo_phi(R log_w, R w, S k, S lambda) {
  const S phi = S(exponential(R(lambda) + R(k) * log_w - R(lambda) * w));
  return phi <= S(sizeof(S) == 4 ? 3.4028234e38 : 1.7976931348623157e308) ? phi : S(0);
}

template <class S, class R>
FASTLOSS_TERM Sequence<S> sequence_of(const Options<S>& o, const SequenceSums<R>& sums, S first_advantage) {
  Sequence<S> s = {S(1), S(1), S(0), S(1), false, S(1), S(0), S(0)};
  const R n = sums.n > R(1) ? sums.n : R(1);
  if (o.aggregation == policy::Aggregation::kSeqMeanTokenMean) s.share = S(R(1) / n);
  if (o.level != policy::Level::kToken) {
    const bool sum = o.level == policy::Level::kSequenceSum;
    const R total = o.level == policy::Level::kGeometric ? sums.g : sums.lr;
    const R w = sum ? clamped(total, R(-kMaxLogRatio), R(kMaxLogRatio)) : total / n;
    s.rho = S(exponential(w));
    s.w_slope = sum ? (within(total, R(-kMaxLogRatio), R(kMaxLogRatio)) ? S(1) : S(0)) : S(R(1) / n);
  }
  R log_c = sums.log_c;
  if (o.correction >= policy::Correction::kSequenceTruncate) {
    const R e = exponential(sums.d);
    s.c = S(correct(o, e, &s.cut));
    log_c = log_correction(o, sums.d);
  }
  if (first_advantage < S(0) && sums.off_policy / n > R(o.off_policy_threshold)) s.keep = S(0);
  if (o.surrogate == policy::Surrogate::kVespo) {
    const R log_w = clamped(sums.lr + log_c, R(kLogTiny), R(kMaxLogRatio)), w = exponential(log_w);
    s.phi_pos = S(vespo_phi(log_w, w, o.vespo_k_pos, o.vespo_lambda_pos));
    s.phi_neg = S(vespo_phi(log_w, w, o.vespo_k_neg, o.vespo_lambda_neg));
  }
  return s;
}

// What a kernel loads of a token. Masked tokens hold zeros; what is absent is not looked at.
template <class V>
struct Token {
  V logprob, advantage;
  V lr;                // clamped
  MaskOf<V> lr_slope;  // and whether the clamp lets the gradient through
  V ref, entropy, weight;
  V d;  // old - sampler, NaN: 0
  MaskOf<V> selected;
};

template <class V>
struct Terms {
  V loss, policy, kl, rho, k3;
  V dw, dlogprob;  // derivatives of the loss for the log weight, and for the token's own log-prob beside it
  MaskOf<V> low, high, dual, cut;
};

// Value, derivative for w and for the log-prob of the surrogate.
template <class V, class S>
FASTLOSS_TERM void surrogate(const Options<S>& o, const Sequence<S>& s, const Token<V>& t, V rho, V* value,
                             V* dw, V* dlogprob, MaskOf<V>* dual) {
  const V a = t.advantage, zero = V{};
  *dw = *dlogprob = zero;
  switch (o.surrogate) {
    case policy::Surrogate::kClip: {
      const V clipped = clamped(rho, o.ratio_low, o.ratio_high);
      V bounded = rho, d_first = rho;
      if (o.delta < S(INFINITY)) {
        bounded = rho > o.delta ? splat<V>(o.delta) : rho;
        d_first = rho > o.delta ? zero : rho;
      }
      const V first = bounded * a, second = clipped * a, d_second = clipped == rho ? rho : rho - rho;
      // As PyTorch's minimum: equal ones share the gradient. rho - rho: a NaN stays.
      const V slope = first < second ? d_first : second < first ? d_second : S(0.5) * (d_first + d_second);
      *value = -(first < second ? first : second);
      *dw = -a * slope;
      if (o.dual_clip < S(INFINITY)) {
        const V limit = -o.dual_clip * a;
        *dual = (a < zero) & (*value > limit);
        *value = *dual ? limit : *value;
        *dw = *dual ? zero : *dw;
      }
      break;
    }
    case policy::Surrogate::kSapo: {
      const V tau = a > zero ? splat<V>(o.sapo_pos) : splat<V>(o.sapo_neg), y = tau * (rho - S(1));
      const V e = exponential(y < zero ? y : -y), inverse = S(1) / (e + S(1));
      *value = -a * (y < zero ? e * inverse : inverse) * (S(4) / tau);
      *dw = -a * (S(4) * e * inverse * inverse) * rho;
      break;
    }
    case policy::Surrogate::kRatio:
      *value = *dw = -rho * a;
      break;
    case policy::Surrogate::kLogprob:
    case policy::Surrogate::kCispo:
    case policy::Surrogate::kVespo: {
      V factor = splat<V>(S(1));
      if (o.surrogate == policy::Surrogate::kCispo) factor = clamped(rho, o.cispo_low, o.cispo_high);
      if (o.surrogate == policy::Surrogate::kVespo)
        factor = a >= zero ? splat<V>(s.phi_pos) : splat<V>(s.phi_neg);
      *dlogprob = -factor * a;
      *value = *dlogprob * t.logprob;
    }
  }
}

// KL of the reference and its derivative for the log-prob.
template <class V, class S>
FASTLOSS_TERM V kl_of(const Options<S>& o, V ref_minus_logprob, V* slope) {
  const V t = clamped(ref_minus_logprob, S(-kMaxLogRatio), S(kMaxLogRatio)), zero = V{};
  const MaskOf<V> inside = within(ref_minus_logprob, S(-kMaxLogRatio), S(kMaxLogRatio));
  V kl, d;
  switch (o.kl_kind) {
    case policy::KlKind::kK1:
      kl = -t, d = splat<V>(S(1));
      break;
    case policy::KlKind::kK2:
      kl = S(0.5) * t * t, d = -t;
      break;
    case policy::KlKind::kAbs:
      kl = t < zero ? -t : t;
      d = t < zero ? splat<V>(S(1)) : t > zero ? splat<V>(S(-1)) : zero;
      break;
    case policy::KlKind::kK3:
    case policy::KlKind::kLowVar: {
      exponential_and_k3(t, &kl);
      d = -(kl + t);
      if (o.kl_kind == policy::KlKind::kLowVar) {
        d = kl > S(10) ? zero : d;
        kl = kl > S(10) ? splat<V>(S(10)) : kl;
      }
    }
  }
  *slope = inside ? d : zero;
  return kl;
}

template <class V, class S>
FASTLOSS_TERM Terms<V> terms_of(const Options<S>& o, const policy::Call& call, const Sequence<S>& s,
                                const Token<V>& t) {
  const V zero = V{}, a = t.advantage;
  Terms<V> out;
  const V ratio = exponential_and_k3(t.lr, &out.k3);  // the token's, whatever the level
  out.rho = o.level == policy::Level::kToken ? ratio : splat<V>(s.rho);
  out.dual = out.cut = zero > zero;

  V value;
  surrogate(o, s, t, out.rho, &value, &out.dw, &out.dlogprob, &out.dual);
  if (call.select && o.kl_cov_coef != S(0)) {
    const V sign = t.lr < zero ? splat<V>(S(-1)) : t.lr > zero ? splat<V>(S(1)) : zero;
    value += t.selected ? o.kl_cov_coef * sign * t.lr : zero;
    out.dlogprob += t.selected & t.lr_slope ? o.kl_cov_coef * sign : zero;
  }

  V factor = splat<V>(s.keep);
  if (call.token_weight) factor *= t.weight;
  if (o.correction != policy::Correction::kNone) {
    V c = splat<V>(s.c);
    if (o.correction < policy::Correction::kSequenceTruncate) {
      c = correct(o, exponential(t.d), &out.cut);
    } else if (s.cut) {
      out.cut = out.cut == 0;
    }
    if (o.surrogate != policy::Surrogate::kVespo) factor *= c;
  }
  out.loss = out.policy = factor * value;
  out.dw *= factor, out.dlogprob *= factor;

  out.kl = zero;
  if (call.ref) {
    V slope;
    out.kl = kl_of(o, t.ref - t.logprob, &slope);
    if (o.beta != S(0)) {
      const V weight = o.kl_unbiased ? o.beta * out.rho : splat<V>(o.beta);
      out.loss += weight * out.kl;
      out.dlogprob += weight * slope;
      if (o.kl_unbiased) out.dw += weight * out.kl;
    }
  }
  if (call.entropy && o.entropy_coef != S(0)) out.loss -= o.entropy_coef * t.entropy;

  const MaskOf<V> positive = a > zero, negative = a < zero;
  if (o.level == policy::Level::kGeometric) {
    out.low = (t.lr < -o.clip_low) & negative;
    out.high = (t.lr > o.clip_high) & positive;
  } else {
    out.low = (out.rho < o.ratio_low) & negative;
    out.high =
        (out.rho > (o.surrogate == policy::Surrogate::kCispo ? o.cispo_high : o.ratio_high)) & positive;
  }
  return out;
}

FASTLOSS_TERM int64_t begin_of(const policy::Call& call, int64_t s) {
  return call.offsets ? call.offsets[s] : s * call.length;
}
FASTLOSS_TERM int64_t end_of(const policy::Call& call, int64_t s) {
  const int64_t end = call.offsets ? call.offsets[s + 1] : (s + 1) * call.length;
  return end < call.n ? end : call.n;
}

}  // namespace FASTLOSS_SPACE
}  // namespace fastloss
