// gae and discounted_returns: A_t = r_t + γ V_next - V_t + γλ A_next, G_t = r_t + γ G_next, backwards in
// double. Reads rewards, values and mask once, writes advantages and returns once. Sequences over threads;
// each is a chain of dependent steps, a few nanoseconds long, so no vectors.

#include "scan.h"

#include "args.h"
#include "parallel.h"

namespace fastloss {
namespace {

template <class S>
void one_sequence(const Scan& a, int64_t s) {
  const int64_t begin = a.offsets ? a.offsets[s] : s * a.length;
  const int64_t end = a.offsets ? a.offsets[s + 1] : begin + a.length;
  const S *rewards = static_cast<const S*>(a.rewards), *values = static_cast<const S*>(a.values);
  S *advantages = static_cast<S*>(a.advantages), *returns = static_cast<S*>(a.returns);
  const double decay = a.gamma * a.lam;
  double value_next = 0, next = 0;
  for (int64_t t = end - 1; t >= begin; --t) {
    if (!a.mask[t]) {
      returns[t] = 0;
      if (values) advantages[t] = 0;
    } else if (values) {
      const double value = values[t];
      next = (rewards[t] + a.gamma * value_next - value) + decay * next;
      value_next = value;
      advantages[t] = S(next), returns[t] = S(next + value);
    } else {
      next = rewards[t] + a.gamma * next;
      returns[t] = S(next);
    }
  }
}

}  // namespace

void scan(const Scan& a, int dtype, int64_t threads) {
  const int64_t tokens = a.count ? a.n / a.count + 1 : 0;
  for_rows(a.count, tokens, threads, 0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t s = begin; s < end; ++s) {
      dtype == kFloat64 ? one_sequence<double>(a, s) : one_sequence<float>(a, s);
    }
  });
}

}  // namespace fastloss
