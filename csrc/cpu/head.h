// Cross-entropy of the linear head, forward and backward in one call, without the logits of all rows: the
// vocabulary goes by in blocks of columns, every block with all rows (docs/engine.md says why).
#pragma once

#include "vocab_blocks.h"

namespace fastloss {

struct HeadCall {
  Logits logits;  // x is null; rows are those that carry a target
  CrossEntropy ce;
  Stats stats;
  Coefficients given;   // lse not null: no forward, the backward alone from these; else unused
  RowState* state;      // [shares, rows]
  const int64_t* keep;  // [rows] where a row lies in hidden and d_hidden, or null: in its place
  int64_t dim;
  const void* hidden;  // rows hidden_stride apart
  int hidden_dtype;
  int64_t hidden_stride;
  const void* weight;  // [vocab, dim], rows weight_stride apart
  int weight_dtype;    // the logits' too, where they are kept
  int64_t weight_stride;
  void* d_weight;  // [vocab, dim] of the weight's dtype, or null. Until a block of it is written, that memory
                   // holds the block's logits of the first `stored` rows
  int64_t stored;  // at most dim
  float* d_hidden;       // float32 sums, or null
  float* d_hidden_rest;  // where rows from `split` on have theirs
  int64_t split;
  bool spread;        // d_hidden's rows lie as hidden's, undivided; else densely
  float* d_bias;      // [vocab] or null
  int64_t width;      // columns of a block
  int64_t* finished;  // [stripes] blocks that a stripe's d hidden has
  bool pairs;         // multiply bfloat16 pairs, not floats
};

inline bool is_d_hidden_alone(const HeadCall& c) { return c.d_hidden && !c.d_weight && !c.given.lse; }

// Rows that are taken together: their hidden states and their part of a block stay in L2.
constexpr int64_t kStripe = 96;

// Three kinds of call: d_weight (and more) is wanted; d_hidden alone is; nothing but losses and statistics
// is.
struct HeadKernels {
  int64_t panel;  // a block's width must be a multiple
  int64_t (*scratch_bytes)(const HeadCall&);
  // Blocks [begin, end) of the vocabulary: adds to the share's state, stores logits. Then, once, finish.
  void (*forward)(const HeadCall&, RowState* state, int64_t begin, int64_t end, void* scratch);
  void (*finish)(const HeadCall&, int64_t shares);
  void (*set_coefficients)(const HeadCall&);
  // One block; blocks are begun in their order. Waits for the block before to add to d hidden, so its bits
  // depend on nothing.
  void (*backward)(const HeadCall&, int64_t block, void* scratch);
  // d hidden alone, of rows [begin, end): all of them, forward and backward. The gradient may have no term
  // over the whole vocabulary other than b·p.
  void (*d_hidden_alone)(const HeadCall&, int64_t begin, int64_t end, void* scratch);
};

}  // namespace fastloss
