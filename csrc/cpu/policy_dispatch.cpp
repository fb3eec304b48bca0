// policy_loss over threads: sequences are shared out, their sums added up in order in double.
// Reads and writes what docs/sequences.md, 7, says.
// Compiled once, without AVX flags; the instruction set is the one that dispatch.cpp chose.

#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "parallel.h"
#include "policy.h"

namespace fastloss {

#if defined(__x86_64__)
namespace avx512 {
extern const PolicyKernels policy_kernels;
}
namespace avx2 {
extern const PolicyKernels policy_kernels;
}
#endif
namespace generic {
extern const PolicyKernels policy_kernels;
}
#if defined(FASTLOSS_W16_TEST)
namespace wide16 {
extern const PolicyKernels policy_kernels;
}
#endif

namespace {

const PolicyKernels& chosen() {
  const char* isa = kernels().name;
#if defined(__x86_64__)
  if (!std::strcmp(isa, "avx512")) return avx512::policy_kernels;
  if (!std::strcmp(isa, "avx2")) return avx2::policy_kernels;
#endif
#if defined(FASTLOSS_W16_TEST)
  if (!std::strcmp(isa, "wide16")) return wide16::policy_kernels;
#endif
  return generic::policy_kernels;
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
  double divisor = call.by_tokens ? std::max(total[kTokens], 1.0) : call.divisor;
  if (call.has_normalizer) {
    const S* p = static_cast<const S*>(call.normalizer_ptr);
    divisor = (p ? double(*p) : call.normalizer) * call.normalizer_factor;
  }
  total[kScale] = 1.0 / divisor;
  total[kLoss] *= total[kScale];
  total[kMinRatio] = total[kTokens] > 0 ? min : 1.0;
  total[kMaxRatio] = total[kTokens] > 0 ? max : 1.0;
  for (int k = 0; k < kSums; ++k) static_cast<S*>(call.out)[k] = S(total[k]);
}

}  // namespace

void policy_loss(const policy::Call& call, int dtype, int64_t threads) {
  const PolicyKernels& k = chosen();
  const int64_t tokens = call.count ? call.n / call.count + 1 : 0;
  for_rows(call.count, tokens, threads, 0,
           [&](int64_t begin, int64_t end, void*) { k.policy_loss(call, dtype, begin, end); });
  return dtype == kFloat64 ? finish<double>(call) : finish<float>(call);
}

}  // namespace fastloss
