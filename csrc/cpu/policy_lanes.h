// Tokens in vectors: the inputs of policy_loss at a place of a sequence, walks over a range of places, and
// sums over them. Reads the call's inputs where the mask is set, zeros elsewhere. Inline, in the ISA's
// namespace.
#pragma once

#include "args.h"
#include "common/policy_terms.h"
#include "lane_sums.h"

namespace fastloss {
namespace FASTLOSS_ISA {
namespace {

constexpr int64_t kTokens = 256;  // added up in float before the sums go to double

// The inputs of a sequence.
template <class S>
struct Inputs {
  const policy::Call& call;
  const Options<S>& o;
  S advantage;  // of the sequence
};

// A vector of tokens; the last of a sequence may be partial.
template <class S, bool whole>
struct Place {
  using V = VectorOf<S>;
  using U = typename Lanes<S>::U;
  using Mask = MaskOf<V>;
  static constexpr int64_t L = Lanes<S>::n;

  const Inputs<S>& in;
  int64_t i, count;
  Mask live;
  bool any;

  FASTLOSS_INLINE Place(const Inputs<S>& inputs, int64_t place, int64_t left)
      : in(inputs), i(place), count(left) {
    uint8_t bytes[L] = {}, none[L] = {};
    memcpy(bytes, in.call.mask + i, whole ? L : count);
    live = lanes_of(bytes);
    any = memcmp(bytes, none, L) != 0;
  }
  FASTLOSS_INLINE static Mask lanes_of(const uint8_t* bytes) { return Mask(widen_bytes<U>(bytes)) > 0; }
  FASTLOSS_INLINE V at(const void* p) const {
    const S* const from = static_cast<const S*>(p) + i;
    const V v = whole ? load(from) : load_n(from, count);
    return live ? v : V{};
  }
  FASTLOSS_INLINE V advantages() const {
    return in.call.advantage_of_sequence ? (live ? splat<V>(in.advantage) : V{}) : at(in.call.advantages);
  }
  // Before the clamp.
  FASTLOSS_INLINE V log_ratio(V logprob) const {
    return in.call.old ? logprob - at(in.call.old) : logprob - logprob;
  }
  FASTLOSS_INLINE V old_or(V logprob) const { return in.call.old ? at(in.call.old) : logprob; }
  FASTLOSS_INLINE V mismatch(V logprob) const {
    return zero_nan(old_or(logprob) - at(in.call.sampler), S(0));
  }
  FASTLOSS_INLINE V off_policy(V logprob) const {
    return zero_nan((in.call.sampler ? at(in.call.sampler) : old_or(logprob)) - logprob, S(0));
  }

  FASTLOSS_INLINE Token<V> token() const {
    const policy::Call& call = in.call;
    Token<V> t;
    t.logprob = at(call.logprobs);
    t.advantage = advantages();
    const V raw = log_ratio(t.logprob);
    t.lr = clamped(raw, S(-kMaxLogRatio), S(kMaxLogRatio));
    t.lr_slope = t.lr == raw;
    t.ref = call.ref ? at(call.ref) : V{};
    t.entropy = call.entropy ? at(call.entropy) : V{};
    t.weight = call.token_weight ? at(call.token_weight) : V{};
    t.d = in.o.correction != policy::Correction::kNone ? mismatch(t.logprob) : V{};
    t.selected = live;
    if (call.select) {
      uint8_t bytes[L] = {};
      memcpy(bytes, call.select + i, whole ? L : count);
      t.selected = live & lanes_of(bytes);
    }
    return t;
  }

  FASTLOSS_INLINE void put(void* p, V v) const {
    S* const to = static_cast<S*>(p) + i;
    if (whole) {
      store(to, v);
    } else {
      store_n(to, v, count);
    }
  }
};

// run(place) over the vectors of [begin, end).
template <class S, class Run>
FASTLOSS_INLINE void walk(const Inputs<S>& in, int64_t begin, int64_t end, Run run) {
  constexpr int64_t L = Lanes<S>::n;
  int64_t i = begin;
  for (; i + L <= end; i += L) run(Place<S, true>(in, i, L));
  if (i < end) run(Place<S, false>(in, i, end - i));
}

// The same in blocks of kTokens tokens, after each of which what was added up in S goes to double.
template <class S, class Run, class Flush>
FASTLOSS_INLINE void walk_blocks(const Inputs<S>& in, int64_t begin, int64_t end, Run run, Flush flush) {
  for (int64_t block = begin; block < end; block += kTokens) {
    walk(in, block, block + kTokens < end ? block + kTokens : end, run);
    flush();
  }
}
#define FASTLOSS_ALWAYS __attribute__((always_inline))

// Of masks, whose lanes are 0 or -1.
template <class S>
struct Count {
  MaskOf<VectorOf<S>> now = {};

  FASTLOSS_INLINE void operator+=(MaskOf<VectorOf<S>> mask) { now -= mask; }
  FASTLOSS_INLINE double total() const { return sum_lanes(now); }
};

int64_t count_tokens(const uint8_t* mask, int64_t n) {
  using Bytes = ByteVector<kBytes>::type;
  int64_t sum = 0, i = 0;
  while (i + kBytes <= n) {
    Bytes counts = {};
    for (int k = 0; k < 255 && i + kBytes <= n; ++k, i += kBytes) {
      counts -= Bytes(load_raw<Bytes>(mask + i) != 0);
    }
    for (int k = 0; k < kBytes; ++k) sum += counts[k];
  }
  for (; i < n; ++i) sum += mask[i] != 0;
  return sum;
}

}  // namespace
}  // namespace FASTLOSS_ISA
}  // namespace fastloss
