// Every code and output place that the kernels share with Python, beside the names that Python has for them
// (fastloss/tables.py; each module's tables() is compared with it when it is loaded).
// A code is an enumerator of an enum class: a switch over one has no default, and a case that is missing does
// not compile. Each list makes the enumerators and the names, so that neither can be out of step.
#pragma once

namespace fastloss {

#define FASTLOSS_ENUMERATOR(enumerator, name) enumerator,
#define FASTLOSS_NAME(enumerator, name) name,

// Type's codes from 0, and their names: kTypeNames, names_of(Type()).
#define FASTLOSS_CODES(Type, LIST)                                      \
  enum class Type : int { LIST(FASTLOSS_ENUMERATOR) };                  \
  constexpr const char* const k##Type##Names[] = {LIST(FASTLOSS_NAME)}; \
  constexpr const auto& names_of(Type) { return k##Type##Names; }

// Places of an output, which are indices: plain integers.
#define FASTLOSS_PLACES(Type, kCount, LIST)             \
  enum Type : int { LIST(FASTLOSS_ENUMERATOR) kCount }; \
  constexpr const char* const k##Type##Names[kCount] = {LIST(FASTLOSS_NAME)};

template <int n>
constexpr int count_of(const char* const (&)[n]) {
  return n;
}

// Where no case of a switch over a code returned: the bindings let no other code in.
#define FASTLOSS_UNREACHABLE() __builtin_unreachable()

// --- rows of logits (docs/engine.md) ---

enum Dtype : int { kFloat32, kBFloat16, kFloat16, kFloat64 };
constexpr const char* const kDtypeNames[] = {"float32", "bfloat16", "float16", "float64"};
static_assert(count_of(kDtypeNames) == kFloat64 + 1);
constexpr const auto& names_of(Dtype) { return kDtypeNames; }

constexpr const char* const kStatNames[] = {"logsumexp",        "logprobs",    "entropy",
                                            "log_sum_sq_probs", "mean_logits", "is_top1"};

// --- pairs and single responses (docs/sequences.md) ---

#define FASTLOSS_PAIR_TERMS(X)    \
  X(kSigmoid, "sigmoid")          \
  X(kHinge, "hinge")              \
  X(kIpo, "ipo")                  \
  X(kExoPair, "exo_pair")         \
  X(kNcaPair, "nca_pair")         \
  X(kRobust, "robust")            \
  X(kBcoPair, "bco_pair")         \
  X(kSppoHard, "sppo_hard")       \
  X(kApoZero, "apo_zero")         \
  X(kApoDown, "apo_down")         \
  X(kDiscopop, "discopop")        \
  X(kSft, "sft")                  \
  X(kSigmoidNorm, "sigmoid_norm") \
  X(kSimpo, "simpo")              \
  X(kOrpo, "orpo")                \
  X(kCenter, "center")            \
  X(kSimper, "simper")
FASTLOSS_CODES(PairTerm, FASTLOSS_PAIR_TERMS)

#define FASTLOSS_DIVERGENCES(X)     \
  X(kReverseKl, "reverse_kl")       \
  X(kForwardKl, "forward_kl")       \
  X(kJsDivergence, "js_divergence") \
  X(kAlphaDivergence, "alpha_divergence")
FASTLOSS_CODES(Divergence, FASTLOSS_DIVERGENCES)

#define FASTLOSS_UNPAIRED_TERMS(X)         \
  X(kKto, "kto")                           \
  X(kApoZeroUnpaired, "apo_zero_unpaired") \
  X(kBco, "bco")
FASTLOSS_CODES(UnpairedTerm, FASTLOSS_UNPAIRED_TERMS)

#define FASTLOSS_PAIR_SUMS(X)           \
  X(kPairLoss, "loss")                  \
  X(kChosenReward, "chosen_reward")     \
  X(kRejectedReward, "rejected_reward") \
  X(kAccuracy, "accuracy")              \
  X(kMargin, "margin")                  \
  X(kChosenLogps, "chosen_logps")       \
  X(kRejectedLogps, "rejected_logps")
FASTLOSS_PLACES(PairSum, kPairSums, FASTLOSS_PAIR_SUMS)

#define FASTLOSS_UNPAIRED_SUMS(X)             \
  X(kUnpairedLoss, "loss")                    \
  X(kDesirable, "desirable")                  \
  X(kDesirableReward, "desirable_reward")     \
  X(kUndesirableReward, "undesirable_reward") \
  X(kDesirableLogps, "desirable_logps")       \
  X(kUndesirableLogps, "undesirable_logps")   \
  X(kUnused, "unused")
FASTLOSS_PLACES(UnpairedSum, kUnpairedSums, FASTLOSS_UNPAIRED_SUMS)

// --- policy_loss (docs/sequences.md) ---

namespace policy {

#define FASTLOSS_SURROGATES(X) \
  X(kClip, "clip")             \
  X(kLogprob, "logprob")       \
  X(kCispo, "cispo")           \
  X(kSapo, "sapo")             \
  X(kVespo, "vespo")           \
  X(kRatio, "ratio")
FASTLOSS_CODES(Surrogate, FASTLOSS_SURROGATES)

#define FASTLOSS_LEVELS(X)        \
  X(kToken, "token")              \
  X(kSequence, "sequence")        \
  X(kSequenceSum, "sequence_sum") \
  X(kGeometric, "geometric")
FASTLOSS_CODES(Level, FASTLOSS_LEVELS)

#define FASTLOSS_AGGREGATIONS(X)              \
  X(kTokenMean, "token-mean")                 \
  X(kSeqMeanTokenSum, "seq-mean-token-sum")   \
  X(kSeqMeanTokenMean, "seq-mean-token-mean") \
  X(kSeqMeanTokenSumNorm, "seq-mean-token-sum-norm")
FASTLOSS_CODES(Aggregation, FASTLOSS_AGGREGATIONS)

#define FASTLOSS_KL_KINDS(X) \
  X(kK1, "k1")               \
  X(kK2, "k2")               \
  X(kK3, "k3")               \
  X(kAbs, "abs")             \
  X(kLowVar, "low_var_kl")
FASTLOSS_CODES(KlKind, FASTLOSS_KL_KINDS)

// In this order: those of a sequence are the last two, kNone is 0.
#define FASTLOSS_CORRECTIONS(X)             \
  X(kNone, "none")                          \
  X(kTokenTruncate, "token_truncate")       \
  X(kTokenMask, "token_mask")               \
  X(kSequenceTruncate, "sequence_truncate") \
  X(kSequenceMask, "sequence_mask")
FASTLOSS_CODES(Correction, FASTLOSS_CORRECTIONS)

// The places of out[16], and of a sequence's sums: there kLoss and kPolicy are not scaled, kScale is unused.
#define FASTLOSS_POLICY_OUT(X)      \
  X(kLoss, "loss")                  \
  X(kScale, "scale")                \
  X(kTokens, "tokens")              \
  X(kLowClipped, "low_clipped")     \
  X(kHighClipped, "high_clipped")   \
  X(kDualClipped, "dual_clipped")   \
  X(kK1Sum, "k1")                   \
  X(kK3Sum, "k3")                   \
  X(kKl, "kl")                      \
  X(kEntropy, "entropy")            \
  X(kMinRatio, "min_ratio")         \
  X(kMaxRatio, "max_ratio")         \
  X(kRatioSum, "ratio")             \
  X(kRatioSquared, "ratio_squared") \
  X(kCut, "cut")                    \
  X(kPolicy, "policy")
FASTLOSS_PLACES(Sum, kSums, FASTLOSS_POLICY_OUT)

// The metrics that Python shows, in its order; means over the tokens.
#define FASTLOSS_POLICY_METRICS(X)    \
  X(kPolicyLoss, "policy_loss")       \
  X(kClipLow, "clip_ratio/low")       \
  X(kClipHigh, "clip_ratio/high")     \
  X(kClipRegion, "clip_ratio/region") \
  X(kClipDual, "clip_ratio/dual")     \
  X(kApproxKl, "approx_kl")           \
  X(kApproxKlK3, "approx_kl_k3")      \
  X(kRatioMean, "ratio/mean")         \
  X(kRatioMin, "ratio/min")           \
  X(kRatioMax, "ratio/max")           \
  X(kEss, "ess")                      \
  X(kKlMean, "kl")                    \
  X(kEntropyMean, "entropy")          \
  X(kCutFraction, "importance/cut_fraction")
FASTLOSS_PLACES(Metric, kMetrics, FASTLOSS_POLICY_METRICS)

}  // namespace policy

// The places of value_loss's out: the loss times its scale, that scale, and the metrics.
namespace value {

#define FASTLOSS_VALUE_OUT(X)                 \
  X(kLoss, "loss")                            \
  X(kScale, "scale")                          \
  X(kClipRatio, "clip_ratio")                 \
  X(kExplainedVariance, "explained_variance") \
  X(kMean, "mean")
FASTLOSS_PLACES(Out, kOuts, FASTLOSS_VALUE_OUT)

}  // namespace value

// --- distillation (docs/distillation.md) ---

namespace distillation {

#define FASTLOSS_DISTILLATION_DIVERGENCES(X) \
  X(kForwardKl, "forward_kl")                \
  X(kReverseKl, "reverse_kl")                \
  X(kJsd, "jsd")                             \
  X(kTvd, "tvd")                             \
  X(kSkewedForwardKl, "skewed_forward_kl")   \
  X(kSkewedReverseKl, "skewed_reverse_kl")   \
  X(kAlpha, "alpha")
FASTLOSS_CODES(Divergence, FASTLOSS_DISTILLATION_DIVERGENCES)

#define FASTLOSS_DISTILLATION_SUMS(X)   \
  X(kLoss, "loss")                      \
  X(kKl, "kl")                          \
  X(kReverse, "reverse_kl")             \
  X(kAgreement, "agreement")            \
  X(kEntropy, "entropy")                \
  X(kTeacherEntropy, "teacher_entropy") \
  X(kHardLoss, "hard_loss")             \
  X(kSlope, "slope")
FASTLOSS_PLACES(Sum, kSums, FASTLOSS_DISTILLATION_SUMS)

}  // namespace distillation

#undef FASTLOSS_ENUMERATOR
#undef FASTLOSS_NAME

}  // namespace fastloss
