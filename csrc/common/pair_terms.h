// The terms of pair_loss and unpaired_loss (docs/sequences.md): value and derivatives of each.
// Reads and writes registers only.
// Written once for C++ and CUDA. `T` is what a backend computes in: double on the CPU, float on a GPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/codes.h"

#ifndef FASTLOSS_HD
#ifdef __CUDACC__
#define FASTLOSS_HD __host__ __device__
#else
#define FASTLOSS_HD
#endif
#endif

namespace fastloss {

constexpr double kLargestExponent = 80;  // e^80 is finite in float32
constexpr double kLargestMargin = 1e16;  // its square, summed over a batch, is finite in float32
constexpr double kNearlyOne = 1e-6;      // closer to alpha = 1, the alpha-divergence is its limit

FASTLOSS_HD inline float exp_of(float x) { return expf(x); }
FASTLOSS_HD inline double exp_of(double x) { return ::exp(x); }
FASTLOSS_HD inline float log_of(float x) { return logf(x); }
FASTLOSS_HD inline double log_of(double x) { return ::log(x); }
FASTLOSS_HD inline float log1p_of(float x) { return log1pf(x); }
FASTLOSS_HD inline double log1p_of(double x) { return ::log1p(x); }
FASTLOSS_HD inline float expm1_of(float x) { return expm1f(x); }
FASTLOSS_HD inline double expm1_of(double x) { return ::expm1(x); }

// Comparisons are written so that a NaN stays a NaN.
template <class T>
FASTLOSS_HD inline T at_most(T x, T limit) {
  return x > limit ? limit : x;
}

template <class T>
struct Logistic {
  T p, q;          // σ(x), σ(-x)
  T log_p, log_q;  // ℓ(x), ℓ(-x)
};

// One exponential and one logarithm for all four.
template <class T>
FASTLOSS_HD inline Logistic<T> logistic(T x) {
  const T e = exp_of(x < 0 ? x : -x), l = log1p_of(e);
  const T large = T(1) / (T(1) + e), small = e * large;
  const bool negative = x < 0;
  return {negative ? small : large, negative ? large : small, at_most(x, T(0)) - l, at_most(-x, T(0)) - l};
}

template <class T>
struct Valued {
  T value, slope;
};

// f of a log-ratio.
template <class T>
FASTLOSS_HD inline Valued<T> divergence_of(Divergence kind, T x, T alpha_minus_1) {
  switch (kind) {
    case Divergence::kReverseKl:
      return {x, T(1)};
    case Divergence::kForwardKl: {
      const T e = exp_of(at_most(-x, T(kLargestExponent)));
      return {T(1) - e, -x > T(kLargestExponent) ? T(0) : e};
    }
    case Divergence::kJsDivergence: {
      const Logistic<T> s = logistic(x);
      return {T(0.6931471805599453) + s.log_p, s.q};
    }
    case Divergence::kAlphaDivergence: {
      if (alpha_minus_1 == 0) return {x, T(1)};
      const T y = alpha_minus_1 * x, clamped = at_most(y, T(kLargestExponent));
      return {expm1_of(clamped) / alpha_minus_1, y > clamped ? T(0) : exp_of(clamped)};
    }
  }
  FASTLOSS_UNREACHABLE();
}

// -(1-ε) ℓ(u) - ε ℓ(-u)
template <class T>
FASTLOSS_HD inline Valued<T> smoothed(T u, T smoothing) {
  const Logistic<T> s = logistic(u);
  const T keep = T(1) - smoothing;
  return {-keep * s.log_p - smoothing * s.log_q, smoothing * s.p - keep * s.q};
}

// log(1 - e^x) + x's own slope: d/dx (x - log1mexp(x)) = 1 / (1 - e^x).
template <class T>
struct Log1mexp {
  T value, log_odds_slope;
};

template <class T>
FASTLOSS_HD inline Log1mexp<T> log1mexp(T x, T limit) {
  const T y = at_most(x, limit), minus_expm1 = -expm1_of(y);
  const T value = y > T(-0.6931471805599453) ? log_of(minus_expm1) : log1p_of(-exp_of(y));
  return {value, x > limit ? T(1) : T(1) / minus_expm1};
}

template <class T>
struct Pair {
  T c, r, xc, xr;    // log-probs (or rewards), log-ratios
  Valued<T> sc, sr;  // f of the log-ratios
  T lc, lr, nll;     // lengths of at least 1; Σ log p of the chosen
  T beta, smoothing, margin;
};

// What all pairs share. log1mexp_limit follows the dtype of the data, not T.
template <class T>
struct PairConstants {
  T delta, tau, sft_scale, log1mexp_limit;
};

template <class T>
struct Term {
  T value, d_c, d_r, d_nll;
};

// A term of u = β (sc - sr) - γ alone.
template <class T>
FASTLOSS_HD inline Term<T> of_contrast(const Pair<T>& pair, Valued<T> t) {
  return {t.value, t.slope * pair.beta * pair.sc.slope, -t.slope * pair.beta * pair.sr.slope, T(0)};
}

template <class T>
FASTLOSS_HD inline Valued<T> hinge(T u) {
  const T above = T(1) - u;
  return above <= 0 ? Valued<T>{T(0), T(0)} : Valued<T>{above, T(-1)};
}

template <class T>
FASTLOSS_HD inline Valued<T> exo(T u, T smoothing) {
  const Logistic<T> s = logistic(u);
  const T log_keep = log1p_of(-smoothing), log_smoothing = log_of(smoothing);
  // ℓ(u) - ℓ(-u) = u
  return {s.p * (s.log_p - log_keep) + s.q * (s.log_q - log_smoothing),
          s.p * s.q * (u - (log_keep - log_smoothing))};
}

template <class T>
FASTLOSS_HD inline Valued<T> robust(T u, T smoothing) {
  const Logistic<T> s = logistic(u);
  const T keep = T(1) - smoothing, scale = T(1) / (T(1) - T(2) * smoothing);
  return {(smoothing * s.log_q - keep * s.log_p) * scale, -(smoothing * s.p + keep * s.q) * scale};
}

template <class T>
FASTLOSS_HD inline Valued<T> discopop(T u, T tau) {
  const Logistic<T> s = logistic(u), m = logistic(u / tau);
  const T e = exp_of(at_most(-u, T(kLargestExponent)));
  const T e_slope = -u > T(kLargestExponent) ? T(0) : -e;
  return {e * m.p - s.log_p * m.q, m.p * m.q / tau * (s.log_p + e) - s.q * m.q + e_slope * m.p};
}

template <class T>
FASTLOSS_HD inline Term<T> ipo(const Pair<T>& pair) {
  const T d = pair.sc.value / pair.lc - pair.sr.value / pair.lr - T(0.5) / pair.beta;
  const T limit = T(kLargestMargin);
  if (d > limit || d < -limit) return {limit * limit, T(0), T(0), T(0)};
  return {d * d, T(2) * d * pair.sc.slope / pair.lc, T(-2) * d * pair.sr.slope / pair.lr, T(0)};
}

template <class T>
FASTLOSS_HD inline Term<T> nca_pair(const Pair<T>& pair) {
  const T half = T(0.5);
  const Logistic<T> c = logistic(pair.beta * pair.xc), r = logistic(pair.beta * pair.xr);
  return {-c.log_p - half * c.log_q - half * r.log_q, pair.beta * (half * c.p - c.q), pair.beta * half * r.p,
          T(0)};
}

template <class T>
FASTLOSS_HD inline Term<T> bco_pair(const Pair<T>& pair, T delta) {
  const Logistic<T> c = logistic(pair.beta * pair.xc - delta), r = logistic(pair.beta * pair.xr - delta);
  return {-c.log_p - r.log_q, -pair.beta * c.q, pair.beta * r.p, T(0)};
}

template <class T>
FASTLOSS_HD inline Term<T> sppo_hard(const Pair<T>& pair) {
  const T half = T(0.5) / pair.beta, c = pair.xc - half, r = pair.xr + half;
  return {c * c + r * r, T(2) * c, T(2) * r, T(0)};
}

template <class T>
FASTLOSS_HD inline Term<T> apo_zero(const Pair<T>& pair) {
  const Logistic<T> c = logistic(pair.beta * pair.xc), r = logistic(pair.beta * pair.xr);
  return {c.q + r.p, -pair.beta * c.p * c.q, pair.beta * r.p * r.q, T(0)};
}

template <class T>
FASTLOSS_HD inline Term<T> apo_down(const Pair<T>& pair) {
  const Logistic<T> c = logistic(pair.beta * pair.xc), u = logistic(pair.beta * (pair.xc - pair.xr));
  const T slope = pair.beta * u.p * u.q;
  return {c.p + u.q, pair.beta * c.p * c.q - slope, slope, T(0)};
}

template <class T>
FASTLOSS_HD inline Term<T> sigmoid_norm(const Pair<T>& pair) {
  const T u = pair.beta * (pair.sc.value / pair.lc - pair.sr.value / pair.lr) - pair.margin;
  const Valued<T> t = smoothed(u, pair.smoothing);
  const T slope = t.slope * pair.beta;
  return {t.value, slope * pair.sc.slope / pair.lc, -slope * pair.sr.slope / pair.lr, T(0)};
}

template <class T>
FASTLOSS_HD inline Term<T> simpo(const Pair<T>& pair) {
  const Valued<T> t =
      smoothed(pair.beta * (pair.c / pair.lc - pair.r / pair.lr) - pair.margin, pair.smoothing);
  return {t.value, t.slope * pair.beta / pair.lc, -t.slope * pair.beta / pair.lr, T(0)};
}

template <class T>
FASTLOSS_HD inline Term<T> simper(const Pair<T>& pair) {
  const T c = exp_of(pair.c / pair.lc), r = exp_of(pair.r / pair.lr);
  return {r - c, -c / pair.lc, r / pair.lr, T(0)};
}

template <class T>
FASTLOSS_HD inline Term<T> orpo(const Pair<T>& pair, T limit) {
  const T c = pair.c / pair.lc, r = pair.r / pair.lr;
  const Log1mexp<T> not_c = log1mexp(c, limit), not_r = log1mexp(r, limit);
  const Logistic<T> odds = logistic((c - r) - (not_c.value - not_r.value));
  const T slope = -pair.beta * odds.q;
  return {-pair.beta * odds.log_p, slope * not_c.log_odds_slope / pair.lc,
          -slope * not_r.log_odds_slope / pair.lr, T(0)};
}

template <class T>
FASTLOSS_HD inline Term<T> center(const Pair<T>& pair) {
  const T sum = pair.c + pair.r;
  return {sum * sum, T(2) * sum, T(2) * sum, T(0)};
}

template <class T>
FASTLOSS_HD inline Term<T> pair_term(PairTerm code, const Pair<T>& pair, const PairConstants<T>& k) {
  const T u = pair.beta * (pair.sc.value - pair.sr.value) - pair.margin;
  switch (code) {
    case PairTerm::kSigmoid:
      return of_contrast(pair, smoothed(u, pair.smoothing));
    case PairTerm::kHinge:
      return of_contrast(pair, hinge(u));
    case PairTerm::kIpo:
      return ipo(pair);
    case PairTerm::kExoPair:
      return of_contrast(pair, exo(u, pair.smoothing));
    case PairTerm::kNcaPair:
      return nca_pair(pair);
    case PairTerm::kRobust:
      return of_contrast(pair, robust(u, pair.smoothing));
    case PairTerm::kBcoPair:
      return bco_pair(pair, k.delta);
    case PairTerm::kSppoHard:
      return sppo_hard(pair);
    case PairTerm::kApoZero:
      return apo_zero(pair);
    case PairTerm::kApoDown:
      return apo_down(pair);
    case PairTerm::kDiscopop:
      return of_contrast(pair, discopop(u, k.tau));
    case PairTerm::kSft:
      return {-pair.nll * k.sft_scale, T(0), T(0), -k.sft_scale};
    case PairTerm::kSigmoidNorm:
      return sigmoid_norm(pair);
    case PairTerm::kSimpo:
      return simpo(pair);
    case PairTerm::kOrpo:
      return orpo(pair, k.log1mexp_limit);
    case PairTerm::kCenter:
      return center(pair);
    case PairTerm::kSimper:
      return simper(pair);
  }
  FASTLOSS_UNREACHABLE();
}

// Value, and its derivative for x = logps - ref; λ is the caller's.
template <class T>
FASTLOSS_HD inline Valued<T> unpaired_term(UnpairedTerm code, T x, T beta, T kl, bool desirable) {
  const T sign = desirable ? T(-1) : T(1);
  switch (code) {
    case UnpairedTerm::kKto: {
      const Logistic<T> s = logistic(sign * beta * (x - kl));
      return {s.p, sign * beta * s.p * s.q};
    }
    case UnpairedTerm::kApoZeroUnpaired: {
      const Logistic<T> s = logistic(sign * beta * x);
      return {s.p, sign * beta * s.p * s.q};
    }
    case UnpairedTerm::kBco: {
      const Logistic<T> s = logistic(sign * (beta * x - kl));
      return {-s.log_q, sign * beta * s.p};
    }
  }
  FASTLOSS_UNREACHABLE();
}

}  // namespace fastloss
