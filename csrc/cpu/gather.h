// gathered_dots and gathered_sums on the CPU: their arguments, and what one ISA exports.
// Reads and writes nothing: every pointer is the caller's memory.
// Plain structs, because gather.cpp is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace fastloss {

// Segment s has the entries [offsets[s], offsets[s + 1]); entry j names row index[j] of a matrix [.., dim],
// or none (negative). `dtype` is that of x, m and out; dots and weights are in its accumulation dtype.
struct GatheredDots {
  int dtype;
  const void* x;  // [segments, dim]
  int64_t x_row_stride;
  const void* m;
  int64_t m_row_stride;
  int64_t dim;
  const int64_t* index;
  const int64_t* offsets;
  int64_t segments;
  void* out;  // one for each entry; -inf where it names no row
};

struct GatheredSums {
  int dtype;
  const void* m;
  int64_t m_row_stride;
  int64_t dim;
  const int64_t* index;
  const void* weights;  // one for each entry; 0 reads no row
  const int64_t* offsets;
  int64_t segments;
  void* out;  // [segments, dim]; 0 where a segment is empty
  int64_t out_row_stride;
};

// Segments [begin, end) with `scratch` of at least scratch_bytes(dim), 64-byte aligned.
struct GatherKernels {
  int64_t (*scratch_bytes)(int64_t dim);
  void (*dots)(const GatheredDots&, int64_t begin, int64_t end);
  void (*sums)(const GatheredSums&, int64_t begin, int64_t end, void* scratch);
};

void gathered_dots(const GatheredDots&, int64_t entries, int64_t threads);
void gathered_sums(const GatheredSums&, int64_t entries, int64_t threads);

}  // namespace fastloss
