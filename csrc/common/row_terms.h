// Cross-entropy of a row from its sums (docs/engine.md), once for CPU and CUDA: the loss, and the
// coefficients of its gradient. Registers only. T: double on the CPU, float on a GPU.
#pragma once

#include "common/row_arguments.h"
#include "common/space.h"

namespace fastloss {
namespace FASTLOSS_SPACE {

// `w_target` is the weight of an index target's class. Without one, w has the classes' probabilities, and the
// whole loss is `spread`, which is -Σ w_v log p_v; `w_sum` is Σ w_v.
template <class T>
FASTLOSS_TERM T cross_entropy_loss(const LossTermsOf<T>& terms, bool index_target, T w_target,
                                   T minus_log_p_target, T spread, T lse) {
  T loss = index_target ? terms.keep * w_target * minus_log_p_target : spread;
  if (index_target && terms.smooth != 0) loss = multiply_add(terms.smooth, spread, loss);
  if (terms.z_loss != 0) loss = multiply_add(terms.z_loss * lse, lse, loss);
  return loss;
}

template <class T>
struct CrossEntropyCoefficients {
  T a, b, d;  // dz_v = a [v = target] + b p_v + d w_v
};

template <class T>
FASTLOSS_TERM CrossEntropyCoefficients<T> cross_entropy_coefficients(const LossTermsOf<T>& terms,
                                                                     bool index_target, T w_target, T w_sum,
                                                                     T lse) {
  const T hit = terms.keep * w_target;
  T b = index_target ? multiply_add(terms.smooth, w_sum, hit) : w_sum;
  b = multiply_add(T(2) * terms.z_loss, lse, b);
  return {index_target ? -hit : T(0), b, index_target ? -terms.smooth : T(-1)};
}

}  // namespace FASTLOSS_SPACE
}  // namespace fastloss
