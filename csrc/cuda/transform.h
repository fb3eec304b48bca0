// From a raw logit to z (bias, soft-cap, scale), and the soft-cap's slope, as docs/engine.md defines them.
// Reads and writes registers only.
// No approximate tanh: its 2^-11 would be a larger error than bfloat16's.
#pragma once

#include "args.h"
#include "logit_exponent.h"

namespace fastloss::cuda {

// tanh(y) = 1 - 2q/(1+q) with q = e^(-2|y|), which loses its digits near 0: there y + y^3 P(y^2), fitted on
// [0, 0.6] in numpy (Chebyshev), 1.4 units of 2^-24. The slope 4q/(1+q)^2 keeps its digits far out, where 1 -
// tanh^2 has none.
__device__ inline float tanh_and_slope(float y, float* slope) {
  const float magnitude = fabsf(y);
  const float q = expf(-2.0f * magnitude);
  float r = approximate_reciprocal(1.0f + q);
  r = fmaf(fmaf(-r, 1.0f + q, 1.0f), r, r);
  const float far = fmaf(-2.0f * q, r, 1.0f);

  const float u = y * y;
  float poly = -6.276389118e-3f;
  poly = fmaf(poly, u, 2.111621574e-2f);
  poly = fmaf(poly, u, -5.387513712e-2f);
  poly = fmaf(poly, u, 1.333292425e-1f);
  poly = fmaf(poly, u, -3.333333135e-1f);
  const float near = fmaf(magnitude * u, poly, magnitude);

  const bool is_near = magnitude < 0.6f;
  *slope = is_near ? fmaf(-near, near, 1.0f) : 4.0f * q * r * r;
  return copysignf(is_near ? near : far, y);
}

__device__ inline float scale_of(const Logits& in, int64_t row) {
  return in.row_scale ? in.scale * in.row_scale[row] : in.scale;
}

// `General` off: no bias and no soft-cap, and the compiler drops their registers.
template <bool General>
struct Transform {
  float scale, softcap, inverse_softcap;

  __device__ explicit Transform(const Logits& in)
      : scale(in.scale), softcap(in.softcap), inverse_softcap(in.softcap > 0 ? 1.0f / in.softcap : 0.0f) {}

  // With the row's own scale.
  __device__ Transform of_row(const Logits& in, int64_t row) const {
    Transform mine = *this;
    mine.scale = scale_of(in, row);
    return mine;
  }

  // What lies between a value and z.
  template <class T>
  __device__ LogitExponent<T> exponent() const {
    return LogitExponent<T>(General ? 1.0f : scale);
  }

  // z, or the raw logit where z is only a scale away from it. The slope is that of the soft-cap alone;
  // `scale` belongs to the coefficients.
  __device__ float value(float x, float bias, float* slope) const {
    *slope = 1.0f;
    if constexpr (!General) return x;
    float u = x + bias;
    if (softcap > 0) {
      // u / softcap with a correctly rounded quotient's error and no division; past 10, tanh is 1 and u may
      // be inf.
      float y = u * inverse_softcap;
      if (fabsf(y) < 10.0f) y = fmaf(fmaf(-y, softcap, u), inverse_softcap, y);
      u = softcap * tanh_and_slope(y, slope);
    }
    return scale * u;
  }

  __device__ float z(float x, float bias, float* slope) const {
    return General ? value(x, bias, slope) : scale * value(x, bias, slope);
  }
};

}  // namespace fastloss::cuda
