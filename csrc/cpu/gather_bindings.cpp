// gathered_dots and gathered_sums in fastloss._cpu.
// Reads and writes nothing itself.
// Apart from bindings.cpp, which has the row functions.
#include "common/bindings.h"
#include "gather.h"
#include "parallel.h"

namespace fastloss {
namespace {

void dots(int dtype, Address x, int64_t x_row_stride, Address m, int64_t m_row_stride, int64_t dim,
          Address index, int64_t entries, Address offsets, int64_t segments, Address out, int64_t context) {
  if (!entries || !segments) return;
  const GatheredDots a = {code_of<Dtype>("dtype", dtype),
                          required("x", x),
                          x_row_stride,
                          required("m", m),
                          m_row_stride,
                          dim,
                          required<int64_t>("index", index),
                          required<int64_t>("offsets", offsets),
                          segments,
                          required("out", out)};
  const ReleaseGil gil(entries * dim >= kSmallWork);
  gathered_dots(a, entries, context);
}

void sums(int dtype, Address m, int64_t m_row_stride, int64_t dim, Address index, Address weights,
          int64_t entries, Address offsets, int64_t segments, Address out, int64_t out_row_stride,
          int64_t context) {
  if (!segments || !dim) return;
  const GatheredSums a = {code_of<Dtype>("dtype", dtype),
                          at(m),
                          m_row_stride,
                          dim,
                          at<int64_t>(index),
                          at(weights),
                          required<int64_t>("offsets", offsets),
                          segments,
                          required("out", out),
                          out_row_stride};
  if (entries) required("m", m), required("index", index), required("weights", weights);
  const ReleaseGil gil((entries + segments) * dim >= kSmallWork);
  gathered_sums(a, entries, context);
}

}  // namespace

void bind_gather(pybind11::module_& m) {
  define(m, "gathered_dots", &dots, "dtype", "x", "x_row_stride", "m", "m_row_stride", "dim", "index",
         "entries", "offsets", "segments", "out", "context");
  define(m, "gathered_sums", &sums, "dtype", "m", "m_row_stride", "dim", "index", "weights", "entries",
         "offsets", "segments", "out", "out_row_stride", "context");
}

}  // namespace fastloss
