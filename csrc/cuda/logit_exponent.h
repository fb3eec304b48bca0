// e^(z - base) in one FMA and one exponential: the exponent of a value x is fma(x, unit, -offset).
// A value is the raw logit where only a scale lies between it and z, and z itself where there is more.
// Exponents are powers of e for float32 logits, whose exponential is expf, and of 2 for the others, which
// take one instruction for it. Registers only.
#pragma once

#include "dtype.h"

namespace fastloss::cuda {

// Of a row in which z = scale * value, scale at least 0 (else NaN): the largest z is the largest value's.
template <class T>
struct LogitExponent {
  static constexpr bool kPowersOfTwo = sizeof(T) != 4;
  static constexpr float kPerE = kPowersOfTwo ? kLog2E : 1.0f;            // exponents in a power of e
  static constexpr float kE = kPowersOfTwo ? 0.6931471805599453f : 1.0f;  // and the other way round

  float scale, unit;

  __device__ explicit LogitExponent(float of_row) : scale(of_row >= 0 ? of_row : NAN), unit(scale * kPerE) {}

  __device__ float operator()(float value, float offset) const { return fmaf(value, unit, -offset); }

  // What is taken from every exponent of a row whose largest z is `base`. The sum, logsumexp and the gradient
  // take the same number, so that its rounding cancels.
  __device__ static float offset_of(float base) { return base * kPerE; }

  // The logarithm of a sum of powers, from relative to the offset to relative to the base, and back.
  __device__ static float relative_to_base(float log_sum, float base) {
    return fmaf(rounded_off(base), -kE, log_sum);
  }
  __device__ static float relative_to_offset(float log_sum, float base) {
    return fmaf(rounded_off(base), kE, log_sum);
  }

  // |exponent| 2^-24 off for the low precisions, whose logits are 2^-9 or 2^-12 off themselves.
  __device__ static float power(float exponent) {
    if constexpr (kPowersOfTwo) {
      return approximate_exp2(exponent);
    } else {
      return expf(exponent);
    }
  }

 private:
  // Exact base * kPerE less offset_of(base).
  __device__ static float rounded_off(float base) {
    return kPowersOfTwo ? fmaf(base, kPerE, -offset_of(base)) : 0.0f;
  }
};

}  // namespace fastloss::cuda
