// e^(z - base) of a value x by one difference, one product and one exponential: the exponent is
// (x - reference) unit.
// A value is the raw logit where only a scale lies between it and z, and z itself where there is more.
// Exponents are powers of e for float32 logits, whose exponential is expf, and of 2 for the others, which
// take one instruction for it. Registers only.
#pragma once

#include "dtype.h"

namespace fastloss::cuda {

// Of a row in which z = scale * value, scale at least 0 (else NaN): the largest z is the largest value's.
//
// A low-precision logit less another is exact beside any offset, and 0 where they are equal, at any scale.
// fma(x, unit, -K) would be one instruction less, of the eight in whose time a multiprocessor makes one
// exponential; but K is rounded, by more than any exponent may be where a mask made all of a row -1e30.
template <class T>
struct LogitExponent {
  static constexpr bool kLow = sizeof(T) != 4;
  static constexpr float kE = kLow ? 0.6931471805599453f : 1.0f;  // a power of e in exponents' units

  float scale, unit;

  __device__ explicit LogitExponent(float of_row)
      : scale(of_row >= 0 ? of_row : NAN), unit(kLow ? scale * kLog2E : scale) {}

  // float32 logits are as long as their product with the scale: the reference is the largest z, rounded, and
  // each z is rounded before the difference, so that equal logits stay equal.
  __device__ float operator()(float value, float reference) const {
    return kLow ? (value - reference) * unit : value * unit - reference;
  }

  // z less base_of(reference) before its rounding.
  __device__ float below(float value, float reference) const {
    return kLow ? (value - reference) * scale : (*this)(value, reference);
  }

  // What all values of a row are taken relative to, from its largest; 0 where that is infinite.
  __device__ float reference_of(float max) const {
    const float reference = kLow ? max : scale * max;
    return fabsf(reference) == INFINITY ? 0.0f : reference;
  }

  // The exponent of one reference relative to another.
  __device__ float between(float reference, float other) const {
    return kLow ? (reference - other) * unit : reference - other;
  }

  __device__ float base_of(float reference) const { return kLow ? scale * reference : reference; }

  // The reference whose z, rounded, is `base`: a logit, so that the quotient's own rounding is undone.
  __device__ float reference_of_base(float base) const {
    if (!kLow || scale == 1.0f) return base;
    return scale > 0 ? to_float(from_float<T>(base / scale)) : 0.0f;
  }

  // What base_of rounded off; 0 beyond 2^24, where a float has no room for the logarithm of a sum beside it.
  __device__ float rounded_off(float reference) const {
    const float base = base_of(reference);
    return kLow && fabsf(base) < 16777216.0f ? fmaf(scale, reference, -base) : 0.0f;
  }

  // |exponent| 2^-24 off for the low precisions, whose logits are 2^-9 or 2^-12 off themselves.
  __device__ static float power(float exponent) {
    if constexpr (kLow) {
      return approximate_exp2(exponent);
    } else {
      return expf(exponent);
    }
  }
};

}  // namespace fastloss::cuda
