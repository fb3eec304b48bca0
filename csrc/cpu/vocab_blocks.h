// Cross-entropy over a block of the vocabulary at a time, all rows at once: what the linear head needs to see
// every logit without ever holding all of them. Reads [rows, width] logits; the backward writes their
// gradient, in place if it may. float32 and bfloat16. Between the blocks 128 bytes a row (RowState) are kept.
#pragma once

#include "args.h"

namespace fastloss {

struct RowState {
  double max, sum, entropy, square;  // over the blocks so far; sums relative to max
  double z_target, slope_target, sum_z, sum_w, sum_wz;
  double log_sum, a, b, c, d;  // set by finish or by set_coefficients; a to d include the gradient's scale
  double kind;                 // 0 normal, 1 ignored, 2 bad
  double unused;
};

// logits.x is the block's first logit, logits.vocab the whole vocabulary.
struct VocabBlock {
  int64_t start, width;  // width <= kBlock
  bool first;            // of those that a RowState sees
};

struct VocabKernels {
  int64_t scratch_bytes;
  void (*forward)(const Logits&, const VocabBlock&, const CrossEntropy&, const Stats& wanted, RowState*,
                  int64_t begin, int64_t end, void* scratch);
  // Adds the sums of other blocks of the same rows, seen by `from`, to `into`.
  void (*merge)(const Logits&, const CrossEntropy&, const Stats& wanted, RowState* into,
                const RowState* from);
  void (*finish)(const Logits&, const CrossEntropy&, const Stats&, RowState*, int64_t begin, int64_t end);
  // In place of forward and finish: what row_grad is given. The vector w is CrossEntropy's.
  void (*set_coefficients)(const Logits&, const CrossEntropy&, const Coefficients&, RowState*);
  void (*backward)(const Logits&, const VocabBlock&, const CrossEntropy&, const RowState*, int64_t begin,
                   int64_t end, void* scratch);
};

}  // namespace fastloss
