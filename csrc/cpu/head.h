// The linear head without the logits of all rows: the vocabulary goes by in blocks of columns, every block
// with all rows (docs/engine.md says why). One call is statistics and cross-entropy's loss, or those and the
// gradients at once, or the gradients from coefficients that a loss made of an earlier call's statistics.
#pragma once

#include "vocab_blocks.h"

namespace fastloss {

struct HeadCall {
  Logits logits;  // x is null; rows are those that carry a target
  CrossEntropy ce;
  Stats stats;
  int64_t* argmax;            // [rows] or null: the first column of the largest logit
  const float* token_weight;  // [rows] factors of loss and gradient, or null
  Coefficients given;         // lse not null: the backward alone, from these; else unused
  const int32_t* selected;    // [rows, selected_count] or null: some classes of each row, ascending; from the
                              // vocabulary's size on padding
  int64_t selected_count;
  float* selected_logits;          // [rows, selected_count]: theirs, as the loss sees them
  float* selected_logprobs;        // theirs; null: they are left out of the row's sums
  const float* selected_gradient;  // what the gradient of their raw logits is; of a class, its first entry
  RowState* state;                 // [rows]
  const int64_t* keep;             // [rows] where a row lies in hidden and d_hidden, or null: in its place
  int64_t dim;
  const void* hidden;  // rows hidden_stride apart
  int hidden_dtype;
  int64_t hidden_stride;
  const void* weight;  // [vocab, dim], rows weight_stride apart
  int weight_dtype;    // the kept logits' too
  int64_t weight_stride;
  void* d_weight;  // [vocab, dim] of the weight's dtype, or null. Until a block of it is written, that memory
                   // holds the block's logits of the first `stored` rows
  float* d_weight_sum;  // [vocab, dim] or null: d weight goes there instead, unrounded; d_weight keeps logits
  bool adds_to_sum;     // to what it holds; else that is not read
  int64_t stored;       // at most dim; with `given`: those that an earlier call left there
  void* more_logits;    // [vocab, more] of the weight's dtype, for those of the next `more` rows
  int64_t more;
  float* origins;   // [segments of the vocabulary, stored + more]: what kept bfloat16 logits are relative to
  bool stats_only;  // no gradients: d_weight only keeps logits, for a later call
  double skip;      // with mass: by how much a row's gradients may err, of their coefficient b
  float* mass;  // [segments of the vocabulary, rows] or null: what their gradients are multiplied by; where
                // that is kLeftOut they are not made. A segment is a block then
  bool keeps_order;      // d_weight's rows stay in the order of the blocks, for who adds up several
  const int64_t* order;  // [vocab] or null: column j, wherever one is spoken of here, is row order[j] of the
                         // weight and of its gradient
  float* d_hidden;       // float32 sums, or null
  float* d_hidden_rest;  // where rows from `split` on have theirs
  int64_t split;
  bool spread;           // d_hidden's rows lie as hidden's, undivided; else densely
  float* d_bias;         // [vocab] or null
  int64_t width;         // columns of a block of the gradients
  int64_t* finished;     // unused
  bool pairs;            // multiply bfloat16 pairs, not floats
  bool tiles;            // in AMX tiles: pairs must be set, too
  bool emulate;          // those in memory
  bool rounds_natively;  // to bfloat16, with AVX512_BF16
};

inline bool is_backward(const HeadCall& c) { return c.given.lse_parts != nullptr; }
inline bool wants_gradients(const HeadCall& c) { return is_backward(c) || (c.d_weight && !c.stats_only); }
inline bool is_d_hidden_alone(const HeadCall& c) {
  return c.d_hidden && !c.d_weight && !is_backward(c) && !c.stats_only;
}
inline bool leaves_out_selected(const HeadCall& c) { return c.selected_logits && !c.selected_logprobs; }
// Whether a gradient sums over rows.
inline bool sums_rows(const HeadCall& c) { return wants_gradients(c) && (c.d_weight || c.d_bias); }

// Kept logits of a few columns lie together, row after row, in the rows of d_weight that those columns have:
// a block of any width is then free for its gradient when it has read its own logits.
constexpr int64_t kKept = 64;
static_assert(kSegment % kKept == 0, "kept columns share an origin");

// Of `row` and the kKept columns from `column` on, a multiple of kKept.
template <class T>
T* kept_logits(const HeadCall& c, int64_t row, int64_t column) {
  const int64_t left = c.logits.vocab - column, width = left < kKept ? left : kKept;
  if (row < c.stored) return static_cast<T*>(c.d_weight) + column * c.dim + row * width;
  return static_cast<T*>(c.more_logits) + column * c.more + (row - c.stored) * width;
}

// Of a row's segments with the least probability one in kOneIn counts kOneIn times, at random, and the others
// are left out: what is expected of the gradient is all of it.
constexpr float kLeftOut = 0;
constexpr int kOneIn = 4;

inline float* kept_origin(const HeadCall& c, int64_t row, int64_t column) {
  return c.origins + column / kSegment * (c.stored + c.more) + row;
}

// The most rows that any kind of product takes together.
constexpr int64_t kStripe = 96;

struct HeadKernels {
  int64_t (*scratch_bytes)(const HeadCall&, int64_t threads);
  // Bytes of scratch that must be zero at the start, from its beginning.
  int64_t (*counter_bytes)(int64_t threads);
  // What each thread of an OpenMP team does.
  void (*run)(const HeadCall&, void* scratch, int64_t thread, int64_t threads);
};

}  // namespace fastloss
