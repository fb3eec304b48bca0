// value_loss and kl_estimate over threads. The parts of value_loss are the same for any number of threads,
// and are added up in order: so are its bits. Reads and writes what docs/sequences.md says. Compiled once,
// without AVX flags; the instruction set is the one that dispatch.cpp chose.

#include "dispatch.h"
#include "parallel.h"
#include "tokens.h"

namespace fastloss {

void value_loss(const ValueLoss& call, int dtype, int64_t threads) {
  const TokenKernels& k = isa().tokens;
  for_rows(call.count(), kValuePart, threads, 0,
           [&](int64_t begin, int64_t end, void*) { k.value_loss(call, dtype, begin, end); });
  k.finish_value(call, dtype);
}

void kl_estimate(const KlEstimate& call, int dtype, int64_t threads) {
  constexpr int64_t kRun = 4096;  // tokens that a thread takes at once
  for_rows((call.n + kRun - 1) / kRun, kRun, threads, 0, [&](int64_t begin, int64_t end, void*) {
    const int64_t last = end * kRun < call.n ? end * kRun : call.n;
    isa().tokens.kl_estimate(call, dtype, begin * kRun, last);
  });
}

}  // namespace fastloss
