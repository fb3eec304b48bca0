// policy_loss of a range of sequences: each token's loss by csrc/common/policy_terms.h, its gradient, its
// sequence's sums. Reads each input once (twice where the sequence has a weight of its own: the second time
// from the cache, or the mask alone), writes the gradient. Vectors of tokens; sums of 256 tokens in lanes,
// beyond that in double.

#include "policy.h"

#include "policy_lanes.h"

namespace fastloss {
namespace FASTLOSS_ISA {
namespace {

// Whether all tokens of a sequence have the same terms, so that one token's are enough.
template <class S>
bool is_uniform(const policy::Call& call, const Options<S>& o) {
  const bool by_ratio = o.surrogate == policy::Surrogate::kClip || o.surrogate == policy::Surrogate::kSapo ||
                        o.surrogate == policy::Surrogate::kRatio;
  return o.level != policy::Level::kToken && by_ratio && call.advantage_of_sequence &&
         o.correction == policy::Correction::kNone && !call.ref && !call.entropy && !call.token_weight &&
         !call.select && !call.agg;
}

template <class S>
struct Prelude {
  SequenceSums<double> sums = {};
  S first_advantage = 0;
  // For a uniform sequence alone:
  double k3 = 0, low = 0, high = 0;
  bool flat = true;  // no clamp took a gradient away
};

template <class S>
void sums_of(const policy::Call& call, const Options<S>& o, S advantage, int64_t begin, int64_t end,
             Prelude<S>* out) {
  using V = VectorOf<S>;
  const Inputs<S> in{call, o, advantage};
  const bool geometric = o.level == policy::Level::kGeometric,
             off_policy = o.off_policy_threshold < S(INFINITY);
  bool first = !call.advantage_of_sequence;
  out->first_advantage = advantage;
  Count<S> n;
  Sum<S> lr_sum, g_sum, d_sum, log_c, off;
  walk_blocks(
      in, begin, end,
      [&](const auto& at) FASTLOSS_ALWAYS {
        if (!at.any) return;
        const V logprob = at.at(call.logprobs);
        const V lr = clamped(at.log_ratio(logprob), S(-kMaxLogRatio), S(kMaxLogRatio));
        n += at.live;
        lr_sum += lr;
        if (first || geometric) {
          const V a = at.advantages();
          for (int64_t k = 0; first && k < at.L; ++k) {
            if (at.live[k]) out->first_advantage = a[k], first = false;
          }
          MaskOf<V> slope;
          if (geometric) g_sum += one_sided(o, lr, a, &slope);
        }
        if (o.correction != policy::Correction::kNone) {
          const V d = at.mismatch(logprob);
          d_sum += d;
          log_c += at.live ? log_correction(o, d) : V{};
        }
        if (off_policy) off += at.off_policy(logprob);
      },
      [&]() FASTLOSS_ALWAYS {
        lr_sum.flush();
        if (geometric) g_sum.flush();
        if (o.correction != policy::Correction::kNone) d_sum.flush(), log_c.flush();
        if (off_policy) off.flush();
      });
  out->sums = {n.total(), lr_sum.total(), g_sum.total(), d_sum.total(), log_c.total(), off.total()};
}

// The same of a uniform sequence, and what else its sums need of each token.
template <class S>
void sums_of_uniform(const policy::Call& call, const Options<S>& o, S advantage, int64_t begin, int64_t end,
                     Prelude<S>* out) {
  using V = VectorOf<S>;
  const Inputs<S> in{call, o, advantage};
  const bool geometric = o.level == policy::Level::kGeometric,
             off_policy = o.off_policy_threshold < S(INFINITY);
  const V a = splat<V>(advantage);
  MaskOf<V> outside = {};
  Count<S> n, low, high;
  Sum<S> lr_sum, g_sum, off, k3_sum;
  walk_blocks(
      in, begin, end,
      [&](const auto& at) FASTLOSS_ALWAYS {
        if (!at.any) return;
        const V logprob = at.at(call.logprobs);
        V lr = at.log_ratio(logprob), k3;
        if (any_lane((lr > S(1)) | (lr < S(-1)) | (lr != lr))) {
          const V raw = lr;
          lr = clamped(raw, S(-kMaxLogRatio), S(kMaxLogRatio));
          outside |= lr != raw;
          exponential_and_k3(lr, &k3);
        } else {
          k3 = k3_near_zero(lr);
        }
        n += at.live;
        lr_sum += lr;
        k3_sum += k3;
        if (geometric) {
          MaskOf<V> slope;
          const V g = one_sided(o, lr, a, &slope);
          g_sum += at.live ? g : V{};
          low += (lr < -o.clip_low) & (a < V{}), high += (lr > o.clip_high) & (a > V{});
        }
        if (off_policy) off += at.off_policy(logprob);
      },
      [&]() FASTLOSS_ALWAYS {
        lr_sum.flush(), k3_sum.flush();
        if (geometric) g_sum.flush();
        if (off_policy) off.flush();
      });
  out->first_advantage = advantage;
  out->sums = {n.total(), lr_sum.total(), g_sum.total(), 0, 0, off.total()};
  out->k3 = k3_sum.total(), out->low = low.total(), out->high = high.total();
  out->flat = !geometric && !any_lane(outside);
}

// The gradient (plus what is there, with `add`) of a weight that all tokens share: common · dw/dlogprob_t.
template <class S, bool add>
void put_common(const policy::Call& call, const Options<S>& o, S advantage, int64_t begin, int64_t end,
                S common, bool flat) {
  using V = VectorOf<S>;
  const Inputs<S> in{call, o, advantage};
  walk(in, begin, end, [&](const auto& at) FASTLOSS_ALWAYS {
    MaskOf<V> slope = at.live;
    if (!flat && at.any) {
      const V raw = at.log_ratio(at.at(call.logprobs)), lr = clamped(raw, S(-kMaxLogRatio), S(kMaxLogRatio));
      slope &= lr == raw;
      if (o.level == policy::Level::kGeometric) {
        MaskOf<V> lets_through;
        one_sided(o, lr, at.advantages(), &lets_through);
        slope &= lets_through;
      }
    }
    const V grad = slope ? splat<V>(common) : V{};
    at.put(call.grad, add ? at.at(call.grad) + grad : grad);
  });
}

// Terms, gradients and sums of all tokens. Inlined into callers that know some of the options, whose branches
// are gone there. Returns Σ share · dloss/dw for weights that the sequence shares.
template <class S>
FASTLOSS_INLINE double put_terms(const policy::Call& call, const Options<S>& o, const Sequence<S>& sequence,
                                 S advantage, int64_t begin, int64_t end, double* sums) {
  using V = VectorOf<S>;
  const Inputs<S> in{call, o, advantage};
  const bool with_kl = call.ref, with_entropy = call.entropy, beside = with_kl || with_entropy;
  const bool of_token = o.level == policy::Level::kToken, dual = o.dual_clip < S(INFINITY);
  const S scale = S(call.grad_scale), scaled_share = S(call.grad_scale * double(sequence.share));
  Sum<S> loss, policy_sum, k1, k3, kl, entropy, rho_sum, rho_squared, common;
  Count<S> tokens, low, high, dual_clipped, cut;
  V min = splat<V>(S(INFINITY)), max = -min;
  walk_blocks(
      in, begin, end,
      [&](const auto& at) FASTLOSS_ALWAYS {
        const V zero = V{};
        if (!at.any) {
          at.put(call.grad, zero);
          if (call.grad_entropy) at.put(call.grad_entropy, zero);
          return;
        }
        const Token<V> token = at.token();
        const Terms<V> terms = terms_of(o, call, sequence, token);
        const V share = call.agg ? at.at(call.agg) : at.live ? splat<V>(sequence.share) : zero;
        V slope = terms.dlogprob;
        if (of_token) {
          slope += token.lr_slope ? terms.dw : zero;
        } else {
          common += share * terms.dw;
        }
        const V scaled = call.agg ? share * scale : splat<V>(scaled_share);
        at.put(call.grad, at.live ? scaled * slope : zero);
        if (call.grad_entropy) at.put(call.grad_entropy, at.live ? -o.entropy_coef * scaled : zero);

        loss += share * terms.loss;
        k1 += token.lr, k3 += terms.k3;
        tokens += at.live, low += terms.low, high += terms.high;
        if (dual) dual_clipped += terms.dual;
        if (o.correction != policy::Correction::kNone) cut += terms.cut & at.live;
        if (beside) policy_sum += share * terms.policy;
        if (with_kl) kl += terms.kl;
        if (with_entropy) entropy += token.entropy;
        const V rho = at.live ? terms.rho : zero;
        rho_sum += rho, rho_squared += rho * rho;
        min = min_or_second(at.live ? terms.rho : min, min);
        max = max_or_second(at.live ? terms.rho : max, max);
      },
      [&]() FASTLOSS_ALWAYS {
        loss.flush(), k1.flush(), k3.flush(), rho_sum.flush(), rho_squared.flush();
        if (beside) policy_sum.flush();
        if (with_kl) kl.flush();
        if (with_entropy) entropy.flush();
        if (!of_token) common.flush();
      });
  sums[policy::kLoss] = loss.total(), sums[policy::kPolicy] = beside ? policy_sum.total() : loss.total();
  sums[policy::kTokens] = tokens.total();
  sums[policy::kLowClipped] = low.total(), sums[policy::kHighClipped] = high.total();
  sums[policy::kDualClipped] = dual_clipped.total(), sums[policy::kCut] = cut.total();
  sums[policy::kK1Sum] = -k1.total(), sums[policy::kK3Sum] = k3.total();
  sums[policy::kKl] = kl.total(), sums[policy::kEntropy] = entropy.total();
  sums[policy::kRatioSum] = rho_sum.total(), sums[policy::kRatioSquared] = rho_squared.total();
  double least = min[0], most = max[0];
  for (int64_t k = 1; k < Lanes<S>::n; ++k) {
    least = min[k] < least ? min[k] : least;
    most = max[k] > most ? max[k] : most;
  }
  sums[policy::kMinRatio] = least, sums[policy::kMaxRatio] = most;
  return common.total();
}

// Any options.
template <class S>
double any_terms(const policy::Call& call, const Options<S>& o, const Sequence<S>& sequence, S advantage,
                 int64_t begin, int64_t end, double* sums) {
  return put_terms(call, o, sequence, advantage, begin, end, sums);
}

// The commonest: log-probs, old ones and an advantage of the sequence, nothing else.
template <class S, policy::Surrogate surrogate>
double bare_terms(const policy::Call& given, const Options<S>& options, const Sequence<S>& sequence,
                  S advantage, int64_t begin, int64_t end, double* sums) {
  policy::Call call = given;
  Options<S> o = options;
  call.ref = call.entropy = call.sampler = call.token_weight = call.agg = call.grad_entropy = nullptr;
  call.select = nullptr, call.advantage_of_sequence = true;
  o.surrogate = surrogate, o.level = policy::Level::kToken, o.correction = policy::Correction::kNone;
  return put_terms(call, o, sequence, advantage, begin, end, sums);
}

template <class S>
auto terms_for(const policy::Call& call, const Options<S>& o) {
  const bool bare = o.level == policy::Level::kToken && call.advantage_of_sequence &&
                    o.correction == policy::Correction::kNone && !call.ref && !call.entropy &&
                    !call.token_weight && !call.select && !call.agg;
  if (bare && o.surrogate == policy::Surrogate::kClip) return &bare_terms<S, policy::Surrogate::kClip>;
  if (bare && o.surrogate == policy::Surrogate::kLogprob) return &bare_terms<S, policy::Surrogate::kLogprob>;
  if (bare && o.surrogate == policy::Surrogate::kCispo) return &bare_terms<S, policy::Surrogate::kCispo>;
  if (bare && o.surrogate == policy::Surrogate::kSapo) return &bare_terms<S, policy::Surrogate::kSapo>;
  return &any_terms<S>;
}

// Of a uniform sequence.
template <class S>
void put_uniform(const policy::Call& call, const Options<S>& o, const Prelude<S>& prelude,
                 const Sequence<S>& sequence, S advantage, int64_t begin, int64_t end, double* sums) {
  using V = VectorOf<S>;
  Token<V> token = {};
  token.advantage = splat<V>(advantage);
  const Terms<V> terms = terms_of(o, call, sequence, token);
  const double n = prelude.sums.n, share = double(sequence.share), rho = double(sequence.rho);
  const bool geometric = o.level == policy::Level::kGeometric;
  sums[policy::kLoss] = sums[policy::kPolicy] = n > 0 ? n * share * double(terms.loss[0]) : 0;
  sums[policy::kTokens] = n;
  sums[policy::kLowClipped] = geometric ? prelude.low : terms.low[0] ? n : 0;
  sums[policy::kHighClipped] = geometric ? prelude.high : terms.high[0] ? n : 0;
  sums[policy::kDualClipped] = terms.dual[0] ? n : 0;
  sums[policy::kK1Sum] = -prelude.sums.lr, sums[policy::kK3Sum] = prelude.k3;
  sums[policy::kRatioSum] = n > 0 ? n * rho : 0, sums[policy::kRatioSquared] = n > 0 ? n * rho * rho : 0;
  if (n > 0 && rho == rho) sums[policy::kMinRatio] = sums[policy::kMaxRatio] = rho;
  const double common = n * share * double(terms.dw[0]) * double(sequence.w_slope) * call.grad_scale;
  put_common<S, false>(call, o, advantage, begin, end, S(common), prelude.flat);
}

template <class S>
void one_sequence(const policy::Call& call, const Options<S>& o, int64_t index, double* sums) {
  const int64_t begin = begin_of(call, index), end = end_of(call, index);
  const S advantage = call.advantage_of_sequence ? static_cast<const S*>(call.advantages)[index] : S(0);
  for (int k = 0; k < policy::kSums; ++k) sums[k] = 0;
  sums[policy::kMinRatio] = INFINITY, sums[policy::kMaxRatio] = -INFINITY;

  Prelude<S> prelude;
  const bool uniform = is_uniform(call, o);
  if (uniform) {
    sums_of_uniform(call, o, advantage, begin, end, &prelude);
  } else if (needs_sums(o, call.agg)) {
    if (needs_more_than_a_count(o)) {
      sums_of(call, o, advantage, begin, end, &prelude);
    } else {
      prelude.sums.n = double(count_tokens(call.mask + begin, end - begin));
    }
  }
  const Sequence<S> sequence = sequence_of(o, prelude.sums, prelude.first_advantage);
  if (uniform) return put_uniform(call, o, prelude, sequence, advantage, begin, end, sums);
  const double common = terms_for(call, o)(call, o, sequence, advantage, begin, end, sums);
  if (o.level != policy::Level::kToken) {
    put_common<S, true>(call, o, advantage, begin, end,
                        S(common * double(sequence.w_slope) * call.grad_scale), false);
  }
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

extern const PolicyKernels policy_kernels;
const PolicyKernels policy_kernels = {count_tokens, policy_loss};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
