// policy_loss of a range of sequences: each token's loss by csrc/policy.h, its gradient, its sequence's sums.
// Reads each input once (twice where the sequence has a weight of its own: the second time from the cache),
// writes the gradient. Vectors of tokens; sums of 256 tokens in lanes, beyond that in double, in order.

#include "policy.h"

#include "../policy.h"
#include "args.h"

namespace fastloss {
namespace FASTLOSS_ISA {
namespace {

constexpr int64_t kTokens = 256;  // added up in float before the sums go to double

template <int bytes>
struct ByteVector {
  typedef uint8_t type __attribute__((vector_size(bytes)));
};

// The inputs with their type.
template <class S>
struct Reader {
  using V = typename Lanes<S>::V;
  using U = typename Lanes<S>::U;
  using Mask = MaskOf<V>;
  static constexpr int64_t L = Lanes<S>::n;

  const policy::Call& call;
  const Options<S>& o;
  S advantage;       // of the sequence
  int64_t i, count;  // the vector's place and length
  Mask live;

  // False if the whole vector is masked.
  FASTLOSS_INLINE bool move_to(int64_t place, int64_t end) {
    i = place, count = end - place < L ? end - place : L;
    uint8_t bytes[L] = {}, none[L] = {};
    memcpy(bytes, call.mask + i, count);
    live = lanes_of(bytes);
    return memcmp(bytes, none, L) != 0;
  }
  FASTLOSS_INLINE static Mask lanes_of(const uint8_t* bytes) {
    return __builtin_convertvector(load_raw<typename ByteVector<L>::type>(bytes), U) != 0;
  }
  FASTLOSS_INLINE V at(const void* p) const {
    const V v = load_upto(static_cast<const S*>(p) + i, count);
    return live ? v : V{};
  }
  FASTLOSS_INLINE V advantages() const {
    return call.advantage_of_sequence ? (live ? V{} + advantage : V{}) : at(call.advantages);
  }
  // old - logprob before the clamp, negated.
  FASTLOSS_INLINE V log_ratio(V logprob) const {
    return call.old ? logprob - at(call.old) : logprob - logprob;
  }
  FASTLOSS_INLINE V old_or(V logprob) const { return call.old ? at(call.old) : logprob; }
  FASTLOSS_INLINE V mismatch(V logprob) const { return zero_nan(old_or(logprob) - at(call.sampler), S(0)); }
  FASTLOSS_INLINE V off_policy(V logprob) const {
    return zero_nan((call.sampler ? at(call.sampler) : old_or(logprob)) - logprob, S(0));
  }

  FASTLOSS_INLINE Token<V> token() const {
    Token<V> t;
    t.logprob = at(call.logprobs);
    t.advantage = advantages();
    const V raw = log_ratio(t.logprob);
    t.lr = clamped(raw, S(-kMaxLogRatio), S(kMaxLogRatio));
    t.lr_slope = within(raw, S(-kMaxLogRatio), S(kMaxLogRatio));
    t.ref = call.ref ? at(call.ref) : V{};
    t.entropy = call.entropy ? at(call.entropy) : V{};
    t.weight = call.token_weight ? at(call.token_weight) : V{};
    t.d = o.correction ? mismatch(t.logprob) : V{};
    t.selected = live;
    if (call.select) {
      uint8_t bytes[L] = {};
      memcpy(bytes, call.select + i, count);
      t.selected = live & lanes_of(bytes);
    }
    return t;
  }

  FASTLOSS_INLINE void put(void* p, V v) const {
    S* const to = static_cast<S*>(p) + i;
    if (count == L) {
      store(to, v);
    } else {
      store_n(to, v, count);
    }
  }
};

template <class S>
SequenceSums<double> sums_of(Reader<S> in, int64_t begin, int64_t end, S* first_advantage) {
  using V = typename Lanes<S>::V;
  SequenceSums<double> sums = {};
  bool first = true;
  for (int64_t block = begin; block < end; block += kTokens) {
    const int64_t stop = block + kTokens < end ? block + kTokens : end;
    V n{}, lr_sum{}, g_sum{}, d_sum{}, log_c{}, off{};
    for (int64_t i = block; i < stop; i += in.L) {
      if (!in.move_to(i, stop)) continue;
      const V logprob = in.at(in.call.logprobs), a = in.advantages();
      for (int64_t k = 0; first && k < in.L; ++k) {
        if (in.live[k]) *first_advantage = a[k], first = false;
      }
      n += in.live ? V{} + S(1) : V{};
      const V lr = clamped(in.log_ratio(logprob), S(-kMaxLogRatio), S(kMaxLogRatio));
      lr_sum += lr;
      if (in.o.level == policy::kGeometric) {
        MaskOf<V> slope;
        g_sum += one_sided(in.o, lr, a, &slope);
      }
      if (in.o.correction) {
        const V d = in.mismatch(logprob);
        d_sum += d;
        log_c += in.live ? log_correction(in.o, d) : V{};
      }
      if (in.o.off_policy_threshold < S(INFINITY)) off += in.off_policy(logprob);
    }
    sums.n += sum_lanes(n), sums.lr += sum_lanes(lr_sum), sums.g += sum_lanes(g_sum);
    sums.d += sum_lanes(d_sum), sums.log_c += sum_lanes(log_c), sums.off_policy += sum_lanes(off);
  }
  return sums;
}

// grad += common · dw/dlogprob_t, for a weight that all tokens share.
template <class S>
void add_common(Reader<S> in, int64_t begin, int64_t end, S common) {
  using V = typename Lanes<S>::V;
  for (int64_t i = begin; i < end; i += in.L) {
    if (!in.move_to(i, end)) continue;
    const V raw = in.log_ratio(in.at(in.call.logprobs));
    MaskOf<V> slope = within(raw, S(-kMaxLogRatio), S(kMaxLogRatio)) & in.live;
    if (in.o.level == policy::kGeometric) {
      MaskOf<V> lets_through;
      one_sided(in.o, clamped(raw, S(-kMaxLogRatio), S(kMaxLogRatio)), in.advantages(), &lets_through);
      slope &= lets_through;
    }
    in.put(in.call.grad,
           load_upto(static_cast<const S*>(in.call.grad) + i, in.count) + (slope ? V{} + common : V{}));
  }
}

template <class S>
void one_sequence(const policy::Call& call, const Options<S>& o, int64_t index, double* sums) {
  using V = typename Lanes<S>::V;
  const int64_t begin = begin_of(call, index), end = end_of(call, index);
  Reader<S> in{call, o, call.advantage_of_sequence ? static_cast<const S*>(call.advantages)[index] : S(0)};
  S first_advantage = 0;
  SequenceSums<double> prelude = {};
  if (needs_sums(o, call.agg)) prelude = sums_of(in, begin, end, &first_advantage);
  const Sequence<S> sequence = sequence_of(o, prelude, first_advantage);

  for (int k = 0; k < policy::kSums; ++k) sums[k] = 0;
  double common = 0;
  V min = V{} + S(INFINITY), max = V{} - S(INFINITY);
  for (int64_t block = begin; block < end; block += kTokens) {
    const int64_t stop = block + kTokens < end ? block + kTokens : end;
    V sum[policy::kSums] = {}, common_sum{};
    for (int64_t i = block; i < stop; i += in.L) {
      if (!in.move_to(i, stop)) {
        in.put(call.grad, V{});
        if (call.grad_entropy) in.put(call.grad_entropy, V{});
        continue;
      }
      const Token<V> token = in.token();
      const Terms<V> terms = terms_of(o, call, sequence, token);
      const V one = V{} + S(1), zero = V{};
      const V share = call.agg ? in.at(call.agg) : in.live ? zero + sequence.share : zero;
      V slope = terms.dlogprob;
      if (o.level == policy::kToken) {
        slope += token.lr_slope ? terms.dw : zero;
      } else {
        common_sum += share * terms.dw;
      }
      in.put(call.grad, in.live ? share * slope : zero);
      if (call.grad_entropy) in.put(call.grad_entropy, -o.entropy_coef * share);

      const V rho = in.live ? terms.rho : zero;
      sum[policy::kLoss] += share * terms.loss;
      sum[policy::kPolicy] += share * terms.policy;
      sum[policy::kTokens] += in.live ? one : zero;
      sum[policy::kLowClipped] += terms.low ? one : zero;
      sum[policy::kHighClipped] += terms.high ? one : zero;
      sum[policy::kDualClipped] += terms.dual ? one : zero;
      sum[policy::kCut] += terms.cut & in.live ? one : zero;
      sum[policy::kK1Sum] -= token.lr;
      sum[policy::kK3Sum] += terms.k3;
      sum[policy::kKl] += terms.kl;
      sum[policy::kEntropy] += token.entropy;
      sum[policy::kRatioSum] += rho;
      sum[policy::kRatioSquared] += rho * rho;
      min = in.live & (terms.rho < min) ? terms.rho : min;
      max = in.live & (terms.rho > max) ? terms.rho : max;
    }
    for (int k = 0; k < policy::kSums; ++k) sums[k] += sum_lanes(sum[k]);
    common += sum_lanes(common_sum);
  }
  double least = min[0], most = max[0];
  for (int64_t k = 1; k < in.L; ++k) {
    least = min[k] < least ? min[k] : least;
    most = max[k] > most ? max[k] : most;
  }
  sums[policy::kMinRatio] = least, sums[policy::kMaxRatio] = most;
  if (o.level != policy::kToken) add_common(in, begin, end, S(common * double(sequence.w_slope)));
}

template <class S>
void sequences(const policy::Call& call, int64_t begin, int64_t end) {
  const Options<S> o = call.options.as<S>();
  for (int64_t s = begin; s < end; ++s) {
    one_sequence(call, o, s, call.sums + s * policy::kSums);
  }
}

void policy_loss(const policy::Call& call, int dtype, int64_t begin, int64_t end) {
  return dtype == kFloat64 ? sequences<double>(call, begin, end) : sequences<float>(call, begin, end);
}

}  // namespace

#define FASTLOSS_STRING_OF(x) #x
#define FASTLOSS_STRING(x) FASTLOSS_STRING_OF(x)
extern const PolicyKernels policy_kernels;
const PolicyKernels policy_kernels = {FASTLOSS_STRING(FASTLOSS_ISA), policy_loss};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
