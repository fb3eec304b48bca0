// The row kernel of clusters under ThreadSanitizer, a cluster's blocks all at once: exits 0 if no two race
// and every row's logsumexp and gradient are those computed here. With an argument something is left out, and
// the check must fail: "cluster barriers", "arrivals" (the waits for bulk copies and gifts), "gifts" (those
// for gifts alone), "block barrier".
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cluster.h"
#include "cluster_rows.h"

using namespace fastloss;

namespace {

const char* run(int64_t vocab) {
  constexpr int64_t rows = 7;
  const int64_t stride = (vocab + 3) / 4 * 4;
  const size_t count = size_t(rows * stride);
  float* x = static_cast<float*>(std::aligned_alloc(16, count * 4));
  std::vector<float> before(count), lse(rows);
  std::vector<int64_t> target(rows);
  for (size_t i = 0; i < count; ++i) x[i] = before[i] = float(i * 7919 % 1009) / 128 - float(i % 3);
  for (int64_t r = 0; r < rows; ++r) target[r] = r * 31 % vocab;
  cuda::Logits in = {};
  in.x = x, in.dtype = kFloat32, in.rows = rows, in.vocab = vocab, in.row_stride = stride, in.scale = 1;
  in.target = target.data(), in.ignore_index = -100;
  cuda::CrossEntropy ce = {};
  ce.terms.keep = 1, ce.grad_scale = 1, ce.grad = x, ce.grad_row_stride = stride;
  cuda::Stats out = {};
  out.logsumexp = lse.data();
  bool took = false;
  if (const char* error = cuda::cluster_cross_entropy(in, ce, out, nullptr, &took)) return error;
  if (!took) return "not taken";
  const char* fault = nullptr;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = before.data() + r * stride;
    double sum = 0;
    for (int64_t v = 0; v < vocab; ++v) sum += std::exp(double(row[v]));
    if (!(std::fabs(lse[r] - std::log(sum)) < 1e-4)) fault = "wrong logsumexp";
    for (int64_t v = 0; v < vocab; ++v) {
      const double want = std::exp(double(row[v])) / sum - (v == target[r]);
      if (!(std::fabs(x[r * stride + v] - want) < 1e-5)) fault = "wrong gradient";
    }
  }
  std::free(x);
  return fault;
}

}  // namespace

int main(int argc, char** argv) {
  setenv("FASTLOSS_CLUSTER_ROWS", "1", 1);
  const char* left_out = argc > 1 ? argv[1] : "";
  emulated::no_cluster_barriers = std::strcmp(left_out, "cluster barriers") == 0;
  emulated::no_arrivals = std::strcmp(left_out, "arrivals") == 0;
  emulated::no_gifts = std::strcmp(left_out, "gifts") == 0;
  // A row has three: two of the sums over the block, and the one before its stage is copied over.
  if (std::strcmp(left_out, "block barrier") == 0) emulated::skipped_barrier = 2;
  for (const int64_t vocab : {3, 500, 1031, 2051, 3500}) {
    if (const char* error = run(vocab)) return std::printf("%s\n", error), 2;
  }
  return 0;
}
