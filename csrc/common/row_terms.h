// Cross-entropy of a row from its sums (docs/engine.md), once for CPU and CUDA: the loss, and the
// coefficients of its gradient. Registers only. T: double on the CPU, float on a GPU.
#pragma once

#include "common/space.h"

namespace fastloss {
namespace FASTLOSS_SPACE {

// `hit` is the weight of the target's own log-probability: (1 - label_smoothing) w_target; `smooth` that of
// each class's: label_smoothing / vocab. Without an index target both are unused, and w has the classes'
// probabilities. `spread` is -Σ w_v log p_v, `w_sum` is Σ w_v.
template <class T>
FASTLOSS_TERM T cross_entropy_loss(bool index_target, T hit, T smooth, T z_loss, T minus_log_p_target,
                                   T spread, T lse) {
  T loss = index_target ? hit * minus_log_p_target : spread;
  if (index_target && smooth != 0) loss = multiply_add(smooth, spread, loss);
  if (z_loss != 0) loss = multiply_add(z_loss * lse, lse, loss);
  return loss;
}

template <class T>
struct CrossEntropyCoefficients {
  T a, b, d;  // dz_v = a [v = target] + b p_v + d w_v
};

template <class T>
FASTLOSS_TERM CrossEntropyCoefficients<T> cross_entropy_coefficients(bool index_target, T hit, T smooth,
                                                                     T z_loss, T w_sum, T lse) {
  T b = index_target ? multiply_add(smooth, w_sum, hit) : w_sum;
  b = multiply_add(T(2) * z_loss, lse, b);
  return {index_target ? -hit : T(0), b, index_target ? -smooth : T(-1)};
}

}  // namespace FASTLOSS_SPACE
}  // namespace fastloss
