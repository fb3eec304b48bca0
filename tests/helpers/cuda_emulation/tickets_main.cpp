// The kernels whose last block adds up what the others left, all blocks at once, under ThreadSanitizer: exits
// 0 if no two blocks race, the sums are those of the same numbers added here, and the ticket is back at 0.
// With an argument
// __threadfence does nothing, and the check must fail.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cuda_emulation.h"
#include "policy.h"

using namespace fastloss;

namespace {

const char* run_policy_loss() {
  constexpr int64_t count = 11, length = 70, n = count * length;
  std::vector<float> logprobs(n), grad(n), out(policy::kSums);
  std::vector<double> sums(count * policy::kSums);
  std::vector<uint8_t> mask(n, 1);
  for (int64_t i = 0; i < n; ++i) logprobs[i] = -0.5f - float(i % 13) / 16;
  unsigned ticket = 0;
  policy::Call call = {};
  call.logprobs = call.old = call.advantages = logprobs.data();
  call.mask = mask.data(), call.n = n, call.length = length, call.count = count;
  policy::Options<double>& o = call.options;
  o.ratio_low = 0.8, o.ratio_high = 1.2, o.delta = o.dual_clip = o.off_policy_threshold = INFINITY, o.cap = 1;
  call.by_tokens = true;
  call.grad = grad.data(), call.out = out.data(), call.sums = sums.data(), call.ticket = &ticket;
  if (const char* error = cuda::policy_loss(call, nullptr)) return error;
  if (ticket != 0) return "policy_loss: the ticket is not back at 0";
  return out[policy::kTokens] == float(n) ? nullptr : "policy_loss: some tokens are not counted";
}

const char* run_value_loss() {
  constexpr int64_t n = 9000;  // five parts
  std::vector<float> values(n), targets(n), grad(n), out(16);
  std::vector<uint8_t> mask(n, 1);
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    values[i] = float(i % 7) / 4, targets[i] = 1;
    total += values[i];
  }
  unsigned ticket = 0;
  ValueLoss call = {};
  call.values = values.data(), call.returns = targets.data(), call.mask = mask.data(), call.n = n;
  call.grad = grad.data(), call.out = out.data(), call.ticket = &ticket;
  std::vector<ValuePart> parts(call.count());
  call.parts = parts.data();
  if (const char* error = cuda::value_loss(call, nullptr)) return error;
  if (ticket != 0) return "value_loss: the ticket is not back at 0";
  const bool is_right = std::fabs(out[value::kMean] - total / n) < 1e-6;
  return is_right ? nullptr : "value_loss: the mean of the values is wrong";
}

}  // namespace

int main(int argc, char**) {
  emulated::no_fences = argc > 1;
  for (int i = 0; i < 10; ++i) {
    const char* error = run_policy_loss();
    if (!error) error = run_value_loss();
    if (error) return std::printf("%s\n", error), 2;
  }
  return 0;
}
