// The kernels of policy.cu and scan.cu for the race check in tsan_main.cpp: more sequences than blocks, more
// tokens than a tile.
#pragma once

#include <cmath>
#include <vector>

#include "policy.h"

inline const char* run_policy() {
  using namespace fastloss;
  constexpr int64_t count = 5, length = 517, n = count * length;
  std::vector<float> in(n, -0.5f), out(2 * n), statistics(policy::kSums);
  std::vector<double> sums(count * policy::kSums);
  std::vector<uint8_t> mask(n, 1);
  for (int64_t i = 0; i < n; i += 3) mask[i] = 0;
  unsigned ticket = 0;
  const char* error = nullptr;
  for (const policy::Level level : {policy::Level::kToken, policy::Level::kGeometric}) {
    policy::Call call = {};
    call.logprobs = call.old = call.advantages = call.ref = call.entropy = call.sampler = in.data();
    call.mask = mask.data();
    call.n = n, call.length = length, call.count = count;
    policy::Options<double>& o = call.options;
    o.level = level, o.correction = level != policy::Level::kToken ? policy::Correction::kSequenceMask
                                                                   : policy::Correction::kTokenMask;
    o.ratio_low = 0.8, o.ratio_high = 1.2, o.delta = o.dual_clip = INFINITY, o.cap = 1, o.beta = 0.1;
    o.off_policy_threshold = level != policy::Level::kToken ? 0.1 : INFINITY;
    call.by_tokens = true;
    call.grad = out.data(), call.grad_entropy = out.data() + n, call.out = statistics.data();
    call.sums = sums.data(), call.ticket = &ticket;
    if (!error) error = cuda::policy_loss(call, nullptr);
  }
  for (const float* values : {static_cast<const float*>(in.data()), static_cast<const float*>(nullptr)}) {
    const Scan a = {in.data(),     values, mask.data(), nullptr, n,
                    length,        count,  0.9,         0.9,     values ? out.data() : nullptr,
                    out.data() + n};
    if (!error) error = cuda::scan(a, nullptr);
  }
  return error ? error : ticket != 0 ? "the ticket is not back at 0" : nullptr;
}
