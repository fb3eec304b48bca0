// The divergences of docs/distillation.md, once for CPU and CUDA: a class's share of the value, and its
// derivative by log q. Registers only. Each value is 0 with slope 0 at q = p (a Bregman form), so that
// neither equal rows nor the rounding of a row's log-sum leave anything behind. V is a float, a double, or a
// vector of them (csrc/cpu/vec.h); S its number.
#pragma once

#include "common/divergence_arguments.h"
#include "common/space.h"

namespace fastloss {
namespace FASTLOSS_SPACE {

using DivergenceKind = distillation::Divergence;

template <class V, class S>
FASTLOSS_TERM V filled(S s) {
  return V{} + s;
}

// Below this no u of log_of_sum is: a mixture without a part of its larger side.
template <class S>
FASTLOSS_TERM S least_sum() {
  return sizeof(S) == 4 ? S(2e-38) : S(1e-300);
}

#ifdef FASTLOSS_ISA
template <class V>
using IntegersOf = decltype(V{} < V{});

FASTLOSS_INLINE F32V exponential_of(F32V x) { return exp_any<float>(x); }
FASTLOSS_INLINE F64V exponential_of(F64V x) { return exp_any<double>(x); }

// e^x - 1 for x <= 0.
template <class V>
FASTLOSS_INLINE V expm1_nonpositive(V x) {
  using S = std::remove_reference_t<decltype(x[0])>;
  const ExpParts<S> e = exp_parts<S>(x);
  const V poly = e.r * e.r * e.q + e.r;
  return poly * e.scale + (e.scale - S(1));
}

// log u of u = 1 + x in (0, 1], with the digits of x near 0: u = 2^k m with m in [sqrt(1/2), sqrt(2)), and
// log m = 2 artanh((m - 1) / (m + 1)).
template <class V>
FASTLOSS_INLINE V log_of_sum(V u, V x) {
  using S = std::remove_reference_t<decltype(x[0])>;
  using I = IntegersOf<V>;
  constexpr int mantissa = ExpConstants<S>::mantissa_bits, terms = sizeof(S) == 4 ? 5 : 11;
  const S root = S(0.70710678118654752);
  const I bits = bit_cast<I>(u), k = (bits - bit_cast<I>(filled<V>(root))) >> mantissa;
  const V m = bit_cast<V>(bits - (k << mantissa)), exponent = __builtin_convertvector(k, V);
  const V f = k == 0 ? x : m - S(1), s = f / (f + S(2)), square = s * s;
  V series = filled<V>(S(1) / S(2 * terms - 1));
#pragma GCC unroll 16
  for (int i = terms - 1; i > 1; --i) series = series * square + S(1) / S(2 * i - 1);
  const V log_m = (s + s) + (s + s) * square * series;
  return exponent * ExpConstants<S>::ln2_high + (exponent * ExpConstants<S>::ln2_low + log_m);
}
#else
inline __device__ float exponential_of(float x) { return expf(x); }
inline __device__ float expm1_nonpositive(float x) { return expm1f(x); }
inline __device__ float log_of_sum(float u, float x) { return x > -0.5f ? log1pf(x) : logf(u); }
#endif

// Of the mixture m = a p + b q with a + b = 1, from d = log q - log p.
template <class V>
struct Mixture {
  V over_p, over_q;  // log(m / p), log(m / q)
  V excess;          // (q - p) / m
};

template <class V, class S>
FASTLOSS_TERM Mixture<V> mixture(V d, S a, S b) {
  const auto up = d > S(0);
  const V e = expm1_nonpositive(up ? -d : d);  // the smaller of p and q over the larger, less 1
  const V x = e * (up ? filled<V>(a) : filled<V>(b));
  // Rounding must not take u, the mixture over the larger, below the larger's own part.
  const V part = up ? filled<V>(b) : filled<V>(a);
  const V lowest = part > least_sum<S>() ? part : filled<V>(least_sum<S>());
  const V sum = x + S(1), u = sum < lowest ? lowest : sum;
  const V log_u = log_of_sum(u, x);
  return {up ? d + log_u : log_u, up ? log_u : log_u - d, (up ? -e : e) / u};
}

template <class V>
struct DivergenceTerm {
  V value, slope;  // slope: d value / d log q
};

// p and q are e^log_p and e^log_q, d = log_q - log_p. All finite: where a probability is 0, see below.
template <DivergenceKind kind, class V, class S>
FASTLOSS_TERM DivergenceTerm<V> divergence_term(V p, V q, V d, const DivergenceNumbers<S>& n) {
  switch (kind) {
    case DivergenceKind::kForwardKl: {
      const V more = q - p;
      return {more - p * d, more};
    }
    case DivergenceKind::kReverseKl: {
      const V slope = q * d;
      return {(p - q) + slope, slope};
    }
    case DivergenceKind::kJsd: {
      const Mixture<V> m = mixture(d, n.w, n.rest);
      const V of_student = n.rest * (q * m.over_q);
      return {-n.w * (p * m.over_p) - of_student, -of_student};
    }
    case DivergenceKind::kTvd: {
      const V more = q - p, half = q * S(0.5);
      const V zero = V{};
      return {(more < S(0) ? -more : more) * S(0.5), more > S(0) ? half : more < S(0) ? -half : zero};
    }
    case DivergenceKind::kSkewedForwardKl: {
      const Mixture<V> m = mixture(d, n.w, n.rest);
      return {n.rest * (q - p) - p * m.over_p, n.rest * n.rest * (q * m.excess)};
    }
    case DivergenceKind::kSkewedReverseKl: {
      const Mixture<V> m = mixture(d, n.rest, n.w);
      return {n.rest * (p - q) - q * m.over_q, -(q * m.over_q) - n.w * n.rest * (q * m.excess)};
    }
    case DivergenceKind::kAlpha: {
      const auto up = d > S(0);
      const V fall = up ? -d : d, e = expm1_nonpositive(fall);
      const V k = up ? filled<V>(n.w) : filled<V>(n.rest);
      const V part = expm1_nonpositive(k * fall), larger = up ? q : p;
      return {larger * (k * e - part) / (n.w * n.rest), (up ? -(q * part) : p * (e - part)) / n.w};
    }
  }
  FASTLOSS_UNREACHABLE();
}

// One class, whose log-probabilities may be -inf.
template <class V>
struct ClassPair {
  V log_p, log_q, p, q, d;
  decltype(V{} < V{}) no_p, no_q;
};

template <class V, class S>
FASTLOSS_TERM ClassPair<V> class_pair(V log_p, V log_q, S minus_inf) {
  ClassPair<V> c;
  c.no_p = log_p == minus_inf, c.no_q = log_q == minus_inf;
  c.log_p = log_p, c.log_q = log_q;
  c.p = exponential_of(log_p), c.q = exponential_of(log_q);
  const V zero = V{};
  c.d = (c.no_p | c.no_q) ? zero : log_q - log_p;
  return c;
}

template <class V, class S>
FASTLOSS_TERM V times_mass(S limit, V mass) {
  const V zero = V{};
  return mass > S(0) ? limit * mass : zero;  // 0 * inf = 0
}

template <DivergenceKind kind, class V, class S>
FASTLOSS_TERM DivergenceTerm<V> divergence_of_class(const ClassPair<V>& c, const DivergenceNumbers<S>& n) {
  DivergenceTerm<V> term = divergence_term<kind>(c.p, c.q, c.d, n);
  const V zero = V{};
  term.value = c.no_p ? times_mass(n.value_no_p, c.q) : term.value;
  term.slope = c.no_p ? n.slope_no_p * c.q : term.slope;
  term.value = c.no_q ? times_mass(n.value_no_q, c.p) : term.value;
  term.slope = c.no_q ? zero : term.slope;
  return term;
}

}  // namespace FASTLOSS_SPACE
}  // namespace fastloss
