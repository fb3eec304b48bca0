// The arguments of policy_loss (docs/sequences.md) as plain structs, shared by the CPU's and CUDA's
// kernels. Reads and writes nothing: every pointer is the caller's memory. The names of the options are
// those of fastloss/losses/policy_options.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/codes.h"

namespace fastloss {
namespace policy {

template <class S>
struct Options {
  Surrogate surrogate;
  Level level;
  KlKind kl_kind;
  Correction correction;
  Aggregation aggregation;
  bool kl_unbiased;
  S ratio_low, ratio_high;  // 1 - clip_low, 1 + clip_high
  S clip_low, clip_high, delta, dual_clip, cispo_low, cispo_high, sapo_pos, sapo_neg;
  S vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg, kl_cov_coef, beta, entropy_coef;
  S cap, floor, log_cap, log_floor, off_policy_threshold, max_length;

  template <class R>
  Options<R> as() const {
    return {surrogate,       level,
            kl_kind,         correction,
            aggregation,     kl_unbiased,
            R(ratio_low),    R(ratio_high),
            R(clip_low),     R(clip_high),
            R(delta),        R(dual_clip),
            R(cispo_low),    R(cispo_high),
            R(sapo_pos),     R(sapo_neg),
            R(vespo_k_pos),  R(vespo_lambda_pos),
            R(vespo_k_neg),  R(vespo_lambda_neg),
            R(kl_cov_coef),  R(beta),
            R(entropy_coef), R(cap),
            R(floor),        R(log_cap),
            R(log_floor),    R(off_policy_threshold),
            R(max_length)};
  }
};

struct Call {
  const void *logprobs, *old, *advantages;  // acc [n]; old may be null; advantages [n], or [count]
  bool advantage_of_sequence;
  const uint8_t* mask;                                 // [n]
  const void *ref, *entropy, *sampler, *token_weight;  // acc [n] or null
  const uint8_t* select;                               // [n] or null
  const void* agg;                                     // acc [n] or null
  const int64_t* offsets;                              // [count + 1] or null
  int64_t n, length, count;
  Options<double> options;
  // The loss is divided by normalizer (the number, or the one in memory) times normalizer_factor where there
  // is one, else by the tokens, or by `divisor`: sequences, times max_length if the aggregation wants it.
  bool has_normalizer, by_tokens;
  double normalizer, normalizer_factor, divisor;
  const void* normalizer_ptr;  // acc [1] or null
  void *grad, *grad_entropy;   // acc [n]; grad_entropy may be null
  bool scales_grad;            // the gradient is wanted times the scale (a CPU alone knows it in time)
  double grad_scale;           // that scale, or 1: the CPU's own
  void* out;                   // acc [16] or null
  void *loss, *metrics;        // acc [1], acc [kMetrics]: in place of out, on a CPU
  double* sums;                // [count, 16]
  unsigned* ticket;            // a GPU's: 0 before and after a launch
};

}  // namespace policy
}  // namespace fastloss
