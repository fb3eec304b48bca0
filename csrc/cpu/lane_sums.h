// Sums in lanes: a few dozen vectors are added up in S, then what they are goes to double.
// Reads and writes registers only.
// Inline, in the ISA's namespace.
#pragma once

#include "vec.h"

namespace fastloss {
namespace FASTLOSS_ISA {
namespace {

template <class S>
using VectorOf = typename Lanes<S>::V;

FASTLOSS_INLINE void widen_into(F64V (&wide)[2], F32V v) {
  F32HalfV half[2];
  memcpy(half, &v, sizeof v);
  wide[0] += __builtin_convertvector(half[0], F64V), wide[1] += __builtin_convertvector(half[1], F64V);
}
FASTLOSS_INLINE void widen_into(F64V (&wide)[2], F64V v) { wide[0] += v; }

template <class S>
struct Sum {
  VectorOf<S> now = {};
  F64V wide[2] = {};

  FASTLOSS_INLINE void operator+=(VectorOf<S> v) { now += v; }
  FASTLOSS_INLINE void flush() { widen_into(wide, now), now = VectorOf<S>{}; }
  FASTLOSS_INLINE double total() const { return sum_lanes(wide[0] + wide[1]); }
};

}  // namespace
}  // namespace FASTLOSS_ISA
}  // namespace fastloss
