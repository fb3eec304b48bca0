// exp (error < 1.1 ulp) and tanh with its slope (error < 3 ulp) of a vector of floats or doubles.
// Reads and writes registers only.
// Cody-Waite reduction to |r| <= ln2/2 and a minimax polynomial (mpmath chebyfit of (e^r - 1 - r)/r^2).
#pragma once

#include "vec.h"

namespace fastloss {
namespace FASTLOSS_ISA {

template <class S>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float lowest = -88.0f;  // 2^-127 flushes to 0
  static constexpr float highest = 88.0f;
  static constexpr float log2e = 0x1.715476p+0f;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float round = 12582912.0f + 127.0f;  // 1.5 * 2^23 + the exponent's bias
  static constexpr int mantissa_bits = 23;
  static constexpr float c[] = {0x1p-1f, 0x1.5554dcp-3f, 0x1.55551ap-5f, 0x1.120ba2p-7f, 0x1.6d113cp-10f};
};

template <>
struct ExpConstants<double> {
  static constexpr double lowest = -709.0;
  static constexpr double highest = 709.0;
  static constexpr double log2e = 0x1.71547652b82fep+0;
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double round = 6755399441055744.0 + 1023.0;
  static constexpr int mantissa_bits = 52;
  static constexpr double c[] = {0x1.0000000000001p-1,  0x1.5555555555556p-3,  0x1.5555555553d4fp-5,
                                 0x1.11111111109adp-7,  0x1.6c16c17893833p-10, 0x1.a01a01a7c8d47p-13,
                                 0x1.a019b8ef67c6cp-16, 0x1.71de0d9c145d0p-19, 0x1.2891a8c1d838dp-22,
                                 0x1.af38d53857513p-26};
};

// e^x = scale * (1 + r + r^2 q) with scale a power of two: 0 below `lowest`, exactly.
template <class S>
struct ExpParts {
  typename Lanes<S>::V r, q, scale;
};

template <class S, class V = typename Lanes<S>::V>
FASTLOSS_INLINE ExpParts<S> exp_parts(V x) {
  using C = ExpConstants<S>;
  x = max_or_second(V{} + C::lowest, x);  // a NaN stays
  const V t = x * C::log2e + C::round;    // its low bits are the biased exponent
  const V n = t - C::round;
  V r = x - n * C::ln2_high;
  r = r - n * C::ln2_low;
  constexpr int degree = sizeof(C::c) / sizeof(S) - 1;
  V q = V{} + C::c[degree];
#pragma GCC unroll 16
  for (int k = degree - 1; k >= 0; --k) q = q * r + C::c[k];
  const auto bits = bit_cast<typename Lanes<S>::U>(t) << C::mantissa_bits;
  return {r, q, bit_cast<V>(bits)};
}

// For x <= 0. The power of two is multiplied, not added to the exponent: NaN and the flush to 0 come for
// free.
template <class S, class V = typename Lanes<S>::V>
FASTLOSS_INLINE V exp_nonpositive(V x) {
  const ExpParts<S> e = exp_parts<S>(x);
  V p = e.q * e.r + S(1);
  p = p * e.r + S(1);
  return p * e.scale;
}

// For x <= 0 that came from bfloat16 or float16, or whose exponential becomes one: the argument is reduced by
// ln 2 in one float, and the polynomial (minimax of the relative error over |r| <= ln2/2, mean error -2e-8)
// is one degree shorter. Relative error < 1.6e-7 + 2.8e-9 |x| down to -87.
FASTLOSS_INLINE F32V exp_short(F32V x) {
  using C = ExpConstants<float>;
  constexpr float c[] = {0x1.fffff6p-1f, 0x1.fffdc6p-2f, 0x1.555a6cp-3f, 0x1.573a6cp-5f, 0x1.0fa822p-7f};
  x = max_or_second(F32V{} + C::lowest, x);
  const F32V t = x * C::log2e + C::round, n = t - C::round;
#if defined(__FMA__) || defined(FASTLOSS_NEON)
  const F32V r = x - n * 0x1.62e43p-1f;
#else  // the product would be rounded
  const F32V r = (x - n * C::ln2_high) - n * C::ln2_low;
#endif
  F32V p = r * c[4] + c[3];
  p = p * r + c[2];
  p = p * r + c[1];
  p = p * r + c[0];
  p = p * r + 1.0f;
  return p * bit_cast<F32V>(bit_cast<U32V>(t) << C::mantissa_bits);
}

// For x <= 0, as exact as logits of type T ask for.
template <class T, class V>
FASTLOSS_INLINE V exp_of(V x) {
  if constexpr (sizeof(T) == 2) {
    return exp_short(x);
  } else {
    return exp_nonpositive<typename Acc<T>::S>(x);
  }
}

// For any x; saturates above `highest`, where no probability can be.
template <class S, class V = typename Lanes<S>::V>
FASTLOSS_INLINE V exp_any(V x) {
  return exp_nonpositive<S>(min_or_second(V{} + ExpConstants<S>::highest, x));
}

// tanh(y) = -expm1(-2|y|) / (2 + expm1(-2|y|)) with y's sign, and 1 - tanh^2 = 4q / (1+q)^2 with q =
// e^(-2|y|): both keep their relative accuracy at 0 and far out.
template <class S, class V = typename Lanes<S>::V>
FASTLOSS_INLINE V tanh_and_slope(V y, V* slope) {
  using U = typename Lanes<S>::U;
  const U sign = bit_cast<U>(y) & bit_cast<U>(-V{});
  const V magnitude = bit_cast<V>(bit_cast<U>(y) ^ sign);
  const ExpParts<S> e = exp_parts<S>(magnitude * S(-2));
  const V poly = e.r * e.r * e.q + e.r;
  const V expm1 = poly * e.scale + (e.scale - S(1));
  const V q = poly * e.scale + e.scale;
  const V inverse = S(1) / (expm1 + S(2));
  *slope = S(4) * q * inverse * inverse;
  return bit_cast<V>(bit_cast<U>(-expm1 * inverse) | sign);
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
