// The arguments of the row functions of docs/engine.md as plain structs. Reads and writes nothing: every
// pointer is the caller's memory. `Value` is what statistics and coefficients are in memory (void where the
// logits' dtype decides), `Number` what a number is.
// Plain structs: they are compiled once per instruction set, and must share no std template with the rest.
#pragma once

#include <cstdint>

#include "common/codes.h"

namespace fastloss {

template <class Value, class Number>
struct LogitsOf {
  const void* x;
  int dtype;
  int64_t rows, vocab, row_stride;
  const int64_t* target;  // [rows] or null
  int64_t ignore_index;
  const Value* bias;  // acc [vocab] or null
  Number scale, softcap;
  const Value* row_scale;  // acc [rows] or null: a factor of `scale` for each row, one over its temperature
};

template <class Value>
struct StatsOf {  // each acc [rows] or null
  Value *loss, *logsumexp, *logprobs, *entropy, *log_sum_sq_probs, *mean_logits;
  uint8_t* is_top1;
  Value* lse_parts;  // acc [rows, 2] or null: the largest logit, and log of the sum of exps relative to it
};
static_assert(sizeof(StatsOf<void>) == sizeof(void*) * (count_of(kStatNames) + 2));

// What the options of cross-entropy are to a row's arithmetic (row_terms.h), made in row_bindings.h.
template <class Number>
struct LossTermsOf {
  Number keep, smooth;  // 1 - label_smoothing, label_smoothing / vocab: divided in double
  Number z_loss;
};

template <class Value>
struct CoefficientsOf {
  const Value* lse_parts;      // acc [rows, 2]
  const Value *a, *b, *c, *d;  // acc [rows]; null: 0
  const Value* w;
  int64_t w_row_stride;
  void* out;
  int64_t out_row_stride;
};

}  // namespace fastloss
