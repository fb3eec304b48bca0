// policy_loss over threads: sequences are shared out, their sums added up in order in double.
// Reads and writes what docs/sequences.md says.
// Compiled once, without AVX flags; the instruction set is the one that dispatch.cpp chose.

#include <algorithm>
#include <limits>

#include "dispatch.h"
#include "parallel.h"
#include "policy.h"

namespace fastloss {

namespace {

template <class S>
double scale_of(const policy::Call& call, double tokens) {
  double divisor = call.by_tokens ? std::max(tokens, 1.0) : call.divisor;
  if (call.has_normalizer) {
    const S* p = static_cast<const S*>(call.normalizer_ptr);
    divisor = (p ? double(*p) : call.normalizer) * call.normalizer_factor;
  }
  return 1.0 / divisor;
}

template <class S>
void put_metrics(const double (&sum)[policy::kSums], S* to) {
  using namespace policy;
  const double each = 1.0 / std::max(sum[kTokens], 1.0);
  to[kPolicyLoss] = S(sum[kPolicy] * sum[kScale]);
  to[kClipLow] = S(sum[kLowClipped] * each), to[kClipHigh] = S(sum[kHighClipped] * each);
  to[kClipRegion] = S((sum[kLowClipped] + sum[kHighClipped]) * each);
  to[kClipDual] = S(sum[kDualClipped] * each);
  to[kApproxKl] = S(sum[kK1Sum] * each), to[kApproxKlK3] = S(sum[kK3Sum] * each);
  to[kRatioMean] = S(sum[kRatioSum] * each);
  to[kRatioMin] = S(sum[kMinRatio]), to[kRatioMax] = S(sum[kMaxRatio]);
  const double smallest = std::numeric_limits<S>::min();
  to[kEss] = S(sum[kRatioSum] * each * sum[kRatioSum] / std::max(sum[kRatioSquared], smallest));
  to[kKlMean] = S(sum[kKl] * each), to[kEntropyMean] = S(sum[kEntropy] * each);
  to[kCutFraction] = S(sum[kCut] * each);
}

template <class S>
void finish(const policy::Call& call) {
  using namespace policy;
  double total[kSums] = {};
  double min = INFINITY, max = -INFINITY;
  for (int64_t s = 0; s < call.count; ++s) {
    const double* sums = call.sums + s * kSums;
    for (int k = 0; k < kSums; ++k) total[k] += sums[k];
    min = std::min(min, sums[kMinRatio]), max = std::max(max, sums[kMaxRatio]);
  }
  // Comparisons pass over a NaN, sums keep it: ratios are bounded, so only a NaN ratio makes their sum one.
  if (total[kRatioSum] != total[kRatioSum]) min = max = total[kRatioSum];
  total[kScale] = scale_of<S>(call, total[kTokens]);
  total[kLoss] *= total[kScale];
  total[kMinRatio] = total[kTokens] > 0 ? min : 1.0;
  total[kMaxRatio] = total[kTokens] > 0 ? max : 1.0;
  if (S* const out = static_cast<S*>(call.out)) {
    for (int k = 0; k < kSums; ++k) out[k] = S(total[k]);
  }
  if (call.metrics) {
    *static_cast<S*>(call.loss) = S(total[kLoss]);
    put_metrics<S>(total, static_cast<S*>(call.metrics));
  }
}

template <class S>
void run(policy::Call call, int dtype, int64_t threads) {
  const PolicyKernels& k = isa().policies;
  call.grad_scale = 1.0;
  if (call.scales_grad) {
    const bool counts = call.by_tokens && !call.has_normalizer && call.count;
    const int64_t begin = call.offsets ? call.offsets[0] : 0,
                  end = call.offsets ? call.offsets[call.count] : call.n;
    call.grad_scale =
        scale_of<S>(call, counts ? double(k.count_tokens(call.mask + begin, end - begin)) : 0.0);
  }
  const int64_t tokens = call.count ? call.n / call.count + 1 : 0;
  for_rows(call.count, tokens, threads, 0,
           [&](int64_t begin, int64_t end, void*) { k.policy_loss(call, dtype, begin, end); });
  finish<S>(call);
}

}  // namespace

void policy_loss(const policy::Call& call, int dtype, int64_t threads) {
  return dtype == kFloat64 ? run<double>(call, dtype, threads) : run<float>(call, dtype, threads);
}

}  // namespace fastloss
