// Where the linear head (head.cpp) keeps what it needs between its products: in one piece of memory.
#pragma once

#include "amx.h"
#include "head.h"

namespace fastloss {
namespace FASTLOSS_ISA {

extern const VocabKernels vocab_kernels;

namespace {

template <class Op>
struct IsTiles {
  static constexpr bool value = Op::kStep > 1;
};

// Elements of type T between rows of a block: an odd number of cache lines, so that a column's lines share no
// set.
template <class T>
constexpr int64_t block_stride(int64_t width) {
  const int64_t lines = (width * int64_t(sizeof(T)) + 63) / 64;
  return (lines | 1) * (64 / int64_t(sizeof(T)));
}

inline constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline constexpr int64_t stripes_of(int64_t rows, int64_t stripe) { return (rows + stripe - 1) / stripe; }

// d hidden alone needs whole segments.
inline int64_t width_of(const HeadCall& c) {
  if (!is_d_hidden_alone(c)) return c.width;
  return c.width < kSegment ? kSegment : c.width / kSegment * kSegment;
}

// Whether a stripe's work is divided too: there are too few of them for the threads.
inline bool is_split(const HeadCall& c, int64_t stripes, int64_t threads) {
  return threads > 1 && stripes < 4 * threads && !is_d_hidden_alone(c);
}

// Columns of hidden that one task of d weight takes: whole lines of its rows, and every thread has some.
template <class Op, class T>
int64_t columns_of_task(const HeadCall& c, int64_t threads) {
  if (Same<T, float>::value) return Op::kPanel;
  int64_t columns = IsTiles<Op>::value ? 2 * Op::kPanel : 4 * Op::kPanel;
  while (columns > Op::kPanel && stripes_of(c.dim, columns) < 2 * threads) columns /= 2;
  return columns;
}

// Rows that d weight sums over in registers.
template <class Op>
constexpr int64_t rows_of_sum() {
  return IsTiles<Op>::value ? 1024 : Op::kStripe;
}

// In bytes from the beginning, and of a thread from the beginning of its own.
struct Areas {
  int64_t counters;
  int64_t sums, segment,
      segment_bytes;  // the forward: of chapters; a packed segment of the weight for each thread
  int64_t packed,
      packed_other;   // a packed block of it, for logits and for d hidden: where the forward's were
  int64_t z_columns;  // dZ of the block and all rows, as d weight reads it
  int64_t z_rows, z_rows_bytes;  // of a stripe, as d hidden reads it: for each thread, or for each stripe
  int64_t lists, list_bytes;     // two lists of rows, their number first
  int64_t threads, thread_bytes, bytes;
  int64_t columns;   // a thread's: logits of a stripe, or dZ converted to floats
  int64_t stripe;    // hidden states of some rows, converted or packed
  int64_t d_weight;  // a task of d weight in float32
  int64_t factors, kernel;
  int64_t done;  // rows of d weight that are in their places
};

template <class Op, class T>
Areas areas_of(const HeadCall& c, int64_t threads) {
  constexpr bool tiles = IsTiles<Op>::value, floats = Same<T, float>::value;
  const int64_t unit = sizeof(typename Op::Unit), panel = Op::kPanel, width = width_of(c);
  const int64_t dim = round_up(c.dim, panel), stripes = stripes_of(c.logits.rows, Op::kStripe);
  const bool alone = is_d_hidden_alone(c), gradients = alone || wants_gradients(c), columns = sums_rows(c);
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    at += round_up(bytes, 64);
    return at - round_up(bytes, 64);
  };
  Areas a;
  a.counters = take((3 * threads + 1) * 64);
  // d hidden alone has its sums beside the packed block.
  if (alone) a.sums = take(vocab_kernels.sums_bytes(c, 1));
  const int64_t begin = at;
  if (!alone)
    a.sums = take(is_backward(c) ? 0 : vocab_kernels.sums_bytes(c, stripes_of(c.logits.vocab, kChapter)));
  a.segment_bytes = alone || is_backward(c) ? 0 : round_up(kSegment * units_of<Op>(c.dim) * unit, 64);
  a.segment = take(threads * a.segment_bytes);
  const int64_t end = at;
  at = begin;
  a.packed = take(gradients ? width * units_of<Op>(c.dim) * unit : 0);
  a.packed_other = take(gradients && c.d_hidden ? dim * units_of<Op>(width) * unit : 0);
  const int64_t z_stride = tiles ? width : block_stride<typename Op::Unit>(width);
  const int64_t z_units = Op::kElements == 2 ? stripes * Op::kStripe / 2 : stripes * Op::kStripe;
  const bool narrow = Op::kElements == 1 && !floats;  // bfloat16 in rows, floats only for a while
  a.z_columns = take(columns ? z_units * (narrow ? block_stride<T>(width) * 2 : z_stride * unit) + 512 : 0);
  // Floats are read by both from the same place.
  a.z_rows_bytes = (floats && columns) || !gradients ? 0
                   : Op::kElements == 1              ? Op::kStripe * block_stride<float>(width) * 4
                                                     : Op::kStripe * block_stride<T>(width) * 2;
  int64_t slots = is_split(c, stripes, threads) ? stripes : threads;
  if (c.mass) slots = least(stripes, 4 * threads) > threads ? least(stripes, 4 * threads) : threads;
  a.z_rows = take(a.z_rows_bytes * slots + 128);
  at = at > end ? at : end;
  a.list_bytes = c.mass ? round_up(8 + c.logits.rows * 4 + 4, 64) : 0;
  a.lists = take(2 * a.list_bytes);
  a.threads = at;
  at = 0;
  const int64_t widest = width > kSegment || !gradients ? (gradients ? width : kSegment) : kSegment;
  a.columns = take(Op::kStripe * block_stride<float>(widest) * 4 + 64);
  const int64_t stripe =
      least(rows_of_sum<Op>(), stripes * Op::kStripe) / Op::kElements * columns_of_task<Op, T>(c, threads);
  const int64_t hidden = Op::kStripe * units_of<Op>(c.dim) * unit;
  a.stripe = take(columns && stripe * unit > hidden ? stripe * unit : hidden);
  const bool once = tiles && c.logits.rows <= rows_of_sum<Op>();
  a.d_weight = take(columns && !floats ? (once ? 32 : width) * columns_of_task<Op, T>(c, threads) * 4 : 0);
  a.factors = take(Op::kStripe * 4);
  // d bias sums a block's columns in double there, a vector at a time.
  const int64_t sums = (width + W) * 8;
  a.kernel = take(vocab_kernels.scratch_bytes > sums ? vocab_kernels.scratch_bytes : sums);
  a.done = take(c.order && c.stored ? c.logits.vocab : 0);
  a.thread_bytes = round_up(at, 4096) + 4096 + 64;  // apart, so that the sets of the cache differ
  a.bytes = a.threads + threads * a.thread_bytes;
  return a;
}

}  // namespace
}  // namespace FASTLOSS_ISA
}  // namespace fastloss
