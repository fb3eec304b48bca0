// Runs every kernel on a few rows under ThreadSanitizer: exits 0 if no two threads of a block race.
// With an argument n, the n-th __syncthreads of each launch is left out, and the check must fail.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "args.h"
#include "cuda_emulation.h"
#include "exponentials.h"
#include "reduce.h"
#include "tsan_pairs.h"
#include "tsan_policy.h"

using namespace fastloss::cuda;
using fastloss::kBFloat16;
using fastloss::kFloat16;
using fastloss::kFloat32;

int main(int argc, char** argv) {
  if (argc > 1) emulated::skipped_barrier = std::atoi(argv[1]);
  constexpr int rows = 6;  // more than the blocks: a block goes on to a second row
  for (const int dtype : {kFloat32, kBFloat16, kFloat16}) {
    for (const int vocab : {5, 1031}) {  // 1031: misaligned rows, longer than the shared copy
      const size_t bytes = size_t(rows) * vocab * (dtype == kFloat32 ? 4 : 2);
      for (const bool general : {false, true}) {
        std::vector<uint4> x(bytes / 16 + 1, uint4{0x3c013c02, 0x3c033c04, 0x3c053c06, 0x3c073c08}), grad = x;
        std::vector<int64_t> target = {0, 1, -100, 4, 7777, 2};
        std::vector<float> ones(vocab, 1.0f), out(6 * rows);
        std::vector<uint8_t> top(rows);
        const Logits in = {x.data(), dtype,
                           rows,     vocab,
                           vocab,    target.data(),
                           -100,     general ? ones.data() : nullptr,
                           1.0f,     general ? 30.0f : 0.0f};
        const Stats stats = {out.data(),     &out[rows],
                             &out[2 * rows], general ? &out[3 * rows] : nullptr,
                             nullptr,        general ? &out[4 * rows] : nullptr,
                             top.data()};
        CrossEntropy ce = {general ? ones.data() : nullptr,
                           0,
                           0.9f,
                           general ? 0.1f : 0.0f,
                           1e-4f,
                           1.0f,
                           nullptr,
                           grad.data(),
                           vocab};
        const Coefficients k = {&out[rows], &out[0],  &out[0],
                                &out[0],    &out[0],  general ? ones.data() : nullptr,
                                0,          x.data(), vocab};
        const char* error = row_stats(in, stats, nullptr);
        if (!error) error = row_cross_entropy(in, ce, stats, nullptr);
        ce.grad = x.data();
        if (!error) error = row_cross_entropy(in, ce, stats, nullptr);
        if (!error) error = row_grad(in, k, nullptr);
        std::vector<uint4> logits(bytes / 16 + 1, uint4{0x3c013c02, 0x3c033c04, 0x3c053c06, 0x3c073c08});
        const Logits own = {logits.data(), dtype,
                            rows,          vocab,
                            vocab,         target.data(),
                            -100,          general ? ones.data() : nullptr,
                            1.0f,          general ? 30.0f : 0.0f};
        const Exponentials scaled = {logits.data(),
                                     general ? ones.data() : nullptr,
                                     {1.0f, 0.0f, 1e-4f},
                                     1.0f,
                                     nullptr,
                                     &out[0],
                                     &out[rows],
                                     &out[3 * rows],
                                     &out[4 * rows],
                                     top.data()};
        if (!error && dtype == kBFloat16) error = row_exponentials(own, scaled, nullptr);
        const float half = 0.5f;
        if (!error) error = scale_in_place({x.data(), dtype, rows, vocab, vocab, &half}, nullptr);
        float reduced[2];
        if (!error) error = sum_rows({out.data(), rows, 0.5f, &half, &reduced[0]}, nullptr);
        if (!error) error = reciprocal_count({target.data(), rows, -100, &reduced[1]}, nullptr);
        if (error) return std::printf("%s\n", error), 2;
      }
    }
  }
  if (const char* error = run_pairs()) return std::printf("%s\n", error), 2;
  if (const char* error = run_policy()) return std::printf("%s\n", error), 2;
  return 0;
}
