// Where the linear head (head.cpp) keeps what it needs between its products: one piece of memory for each
// thread.
#pragma once

#include "head.h"
#include "tile.h"

namespace fastloss {
namespace FASTLOSS_ISA {

extern const VocabKernels vocab_kernels;

namespace {

// Elements of type T between rows of a block: an odd number of cache lines, so that a column's lines share no
// set.
template <class T>
constexpr int64_t block_stride(int64_t width) {
  const int64_t lines = (width * int64_t(sizeof(T)) + 63) / 64;
  return (lines | 1) * (64 / int64_t(sizeof(T)));
}

// A thread's scratch, in bytes from its beginning.
struct Areas {
  int64_t panels;   // a packed block of the weight, or its gradient in float32
  int64_t second;   // the block packed the other way, where both are needed at once
  int64_t stripe;   // hidden states of some rows, converted or packed
  int64_t columns;  // their logits or dZ, in float32 or as columns
  int64_t z;        // dZ of all rows
  int64_t states;   // of a stripe
  int64_t kernel, bytes;
};

Areas areas_of(const HeadCall& c) {
  const int64_t dim = round_up(c.dim, kPanel), rows = c.logits.rows;
  const bool converts = c.weight_dtype != kFloat32;
  const int64_t z_bytes = converts ? block_stride<BF16>(c.width) * 2 : block_stride<float>(c.width) * 4;
  const int64_t z_rows = c.d_weight || c.given.lse ? rows : kStripe;
  Areas a;
  a.panels = 0;
  a.second = a.panels + round_up(c.width * dim * 4, 64);
  const bool alone = is_d_hidden_alone(c);
  a.stripe = a.second + (alone ? round_up(c.width * dim * 4, 64) : 0);
  a.columns = a.stripe + round_up(kStripe / (c.pairs ? 2 : 1) * dim * 4, 64);
  a.z = a.columns + (converts ? round_up(kStripe * block_stride<float>(c.width) * 4, 64) : 0);
  a.states = a.z + round_up((z_rows < kStripe ? kStripe : z_rows) * z_bytes + 64, 64);
  a.kernel = a.states + (alone ? kStripe * sizeof(RowState) : 0);
  // d bias sums a block's columns in double there, a vector at a time.
  const int64_t sums = (c.width + W) * 8;
  a.bytes = a.kernel + round_up(vocab_kernels.scratch_bytes > sums ? vocab_kernels.scratch_bytes : sums, 64);
  return a;
}

}  // namespace
}  // namespace FASTLOSS_ISA
}  // namespace fastloss
