// What a row needs to know of its logits, a block of the vocabulary at a time, all rows at once: so the
// linear head sees every logit without ever holding all of them. Reads rows of float32 logits; the gradient
// is written in the weight's dtype, in place if it may. The order of
// all sums over the vocabulary is fixed, whatever the blocks and threads: the exponentials of a segment
// relative to its maximum, segments in their order to a chapter, chapters in theirs to the row.
#pragma once

#include "args.h"

namespace fastloss {

struct HeadCall;

constexpr int64_t kSegment = 256, kChapter = 2048;
static_assert(kChapter % kSegment == 0 && kSegment <= kBlock, "segments do not cross chapters");

struct RowState {
  double max, sum, entropy, square;  // sums relative to max
  double z_target, slope_target, sum_z, sum_w, sum_wz;
  double log_sum, a, b, c, d;  // set by finish or by set_coefficients; a to d include the gradient's scale
  double kind;                 // 0 normal, 1 ignored, 2 bad
  double best;                 // where the largest logit is
  double d_hidden_max;         // what d hidden's sum is relative to, where it is made with the statistics
};

// Of a chapter, [rows] each; null where nobody asks.
struct ChapterSums {
  double *max, *sum, *entropy, *square, *sum_z, *sum_w, *sum_wz, *best;
};

// Logits of rows [begin, end): of columns [start, start + width), the rows `stride` apart. They may be
// overwritten up to a vector beyond their end.
// With `rows` those are places in it, and rows[i] is the row.
struct StripeOfLogits {
  float* z;
  int64_t stride, start, width, begin, end;
  const int32_t* rows = nullptr;

  int64_t row(int64_t i) const { return rows ? rows[i] : i; }
};

struct VocabKernels {
  int64_t scratch_bytes;
  int64_t (*sums_bytes)(const HeadCall&, int64_t chapters);
  ChapterSums (*sums_of)(const HeadCall&, void* memory, int64_t chapter);
  // A segment's, added to its chapter's sums; the logits that the call wants kept are.
  void (*add)(const HeadCall&, const ChapterSums&, const StripeOfLogits&, void* scratch);
  // A chapter's, added to the rows'.
  void (*merge)(const HeadCall&, const ChapterSums&, bool first, int64_t begin, int64_t end);
  void (*finish)(const HeadCall&, int64_t begin, int64_t end);
  // Of each finished row the segments with the least probability, as many as the call's `skip` allows and
  // never the target's: most of them are left out (head.h). Reads from `mass` the logarithms of their sums,
  // which `add` left there, and writes what its gradients are multiplied by.
  void (*leave_out)(const HeadCall&, int64_t begin, int64_t end);
  // In place of all of these: what row_grad is given. The vector w is CrossEntropy's.
  void (*set_coefficients)(const HeadCall&, int64_t begin, int64_t end);
  // out has the weight's dtype; zeros follow up to the next 32 columns. `kept`: the logits are read where the
  // forward left them.
  void (*gradient)(const HeadCall&, const StripeOfLogits&, bool kept, void* out, int64_t out_stride,
                   void* scratch);
  // exp(z - m) of logits that `add` has seen, without the target's; m is the largest so far (in `sums`, if
  // not null, and the state), `factor` of a row what sums relative to the m before must be multiplied with.
  void (*exponentials)(const HeadCall&, const ChapterSums* sums, const StripeOfLogits&, void* out,
                       int64_t out_stride, float* factor, void* scratch);
};

}  // namespace fastloss
