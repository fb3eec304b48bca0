// The kernels of pairs.cu for the race check in tsan_main.cpp: more pairs than threads, more sequences than
// blocks.
#pragma once

#include <vector>

#include "pairs.h"

inline const char* run_pairs() {
  using namespace fastloss;
  constexpr int64_t pairs = 100, sequences = 5, length = 137;
  std::vector<float> in(sequences * length, -0.5f), out(sequences * length), sums(kSums);
  std::vector<uint8_t> desirable(pairs, 1);
  float* const o = out.data();
  const float* const x = in.data();
  const Segments segments = {nullptr, length, sequences};
  const char* error = cuda::segment_sum({x, x, segments, o}, nullptr);
  if (!error) error = cuda::segment_expand({x, x, segments, sequences * length, o}, nullptr);
  PairLoss<float, float> a = {};
  a.c = x, a.r = x, a.pairs = pairs, a.lc = x;
  a.terms = 2, a.code[0] = PairTerm::kSigmoid, a.code[1] = PairTerm::kSft,
  a.term_weight[0] = a.term_weight[1] = 1;
  a.beta.number = a.weight.number = a.tau = 1, a.log1mexp_limit = -1e-7f;
  a.loss = o, a.d_c = o + pairs, a.d_r = o + 2 * pairs, a.chosen_reward = o + 3 * pairs;
  a.rejected_reward = o + 4 * pairs, a.sums = sums.data();
  if (!error) error = cuda::pair_loss(a, nullptr);
  const UnpairedLoss<float, float> u = {
      x,    pairs, nullptr, nullptr, desirable.data(), nullptr,       UnpairedTerm::kKto,
      1.0f, 1.0f,  1.0f,    o,       o + pairs,        o + 2 * pairs, sums.data()};
  return error ? error : cuda::unpaired_loss(u, nullptr);
}
