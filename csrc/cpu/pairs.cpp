// segment_sum, segment_expand, pair_loss and unpaired_loss of docs/sequences.md.
// Reads each input once and writes each output once: 4 or 8 bytes per token or per pair and array.
// Plain C++, computed in double: pairs are few, sums of tokens are bound by memory. Sequences over threads.

#include <vector>

#include "common/pair_bindings.h"
#include "parallel.h"

namespace fastloss {
namespace {

// Partial sums of every kLanes-th position, so that the compiler may use vectors; combined in a fixed order.
constexpr int kLanes = 8;

template <class Term>
double sum_of(int64_t n, Term term) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += term(i + k);
  }
  for (int k = 0; i < n; ++i, ++k) lanes[k] += term(i);
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// Looking at each weight would cost the vectors: it is done where the plain sum shows that a NaN or an inf is
// there.
template <class S>
double sum_of(const S* values, const S* weights, int64_t n) {
  if (!weights) return sum_of(n, [=](int64_t i) { return double(values[i]); });
  const double plain = sum_of(n, [=](int64_t i) { return double(weights[i]) * double(values[i]); });
  return std::isfinite(plain) ? plain : sum_of(n, [=](int64_t i) { return weighted(values, weights, i); });
}

int64_t mean_length(const Segments& s) {
  if (!s.offsets || s.count == 0) return s.length;
  return (s.offsets[s.count] - s.offsets[0]) / s.count + 1;
}

constexpr int64_t kWorkPerPair = 32;  // a pair's logarithms cost about as much as the sum of this many tokens

struct Cpu {
  template <class S>
  using Math = double;

  template <class F>
  static void with_dtype(int dtype, F f) {
    return expect_accumulation_dtype(dtype) == kFloat64 ? f(0.0) : f(0.0f);
  }

  template <class S>
  static void run(const SegmentSum<S>& a, int64_t threads) {
    const Segments& seg = a.segments;
    const int64_t length = mean_length(seg);
    const ReleaseGil gil(seg.count * length >= kSmallWork);
    for_rows(seg.count, length, threads, 0, [&](int64_t first, int64_t last, void*) {
      for (int64_t s = first; s < last; ++s) {
        const int64_t begin = seg.begin(s), n = seg.begin(s + 1) - begin;
        a.out[s] = S(sum_of(a.values + begin, a.weights ? a.weights + begin : nullptr, n));
      }
    });
  }

  template <class S>
  static void run(const SegmentExpand<S>& a, int64_t threads) {
    const Segments& seg = a.segments;
    const ReleaseGil gil(a.n >= kSmallWork);
    for (int64_t i = 0; i < seg.begin(0); ++i) a.out[i] = S(0);
    for (int64_t i = seg.begin(seg.count); i < a.n; ++i) a.out[i] = S(0);
    for_rows(seg.count, mean_length(seg), threads, 0, [&](int64_t first, int64_t last, void*) {
      for (int64_t s = first; s < last; ++s) {
        const int64_t end = seg.begin(s + 1);
        const S g = a.upstream[s];
        if (!a.weights) {
          for (int64_t i = seg.begin(s); i < end; ++i) a.out[i] = g;
        } else if (std::isfinite(g)) {
          for (int64_t i = seg.begin(s); i < end; ++i) a.out[i] = a.weights[i] * g;
        } else {
          for (int64_t i = seg.begin(s); i < end; ++i) a.out[i] = a.weights[i] == 0 ? S(0) : a.weights[i] * g;
        }
      }
    });
  }

  template <class S>
  static void run(const PairLoss<S, double>& a, int64_t) {
    const ReleaseGil gil(a.pairs * kWorkPerPair >= kSmallWork);
    double tokens = double(a.pairs), sums[kSums] = {};
    if (a.needs_tokens()) {
      tokens = 0;
      for (int64_t i = 0; i < a.pairs; ++i) tokens += double(a.lc[i]);
    }
    const PairConstants<double> k = pair_constants(a, tokens);
    for (int64_t i = 0; i < a.pairs; ++i) one_pair(a, k, i, sums);
    for (int s = 0; s < kSums; ++s) a.sums[s] = S(sums[s]);
  }

  template <class S>
  static void run(const UnpairedLoss<S, double>& a, int64_t) {
    const ReleaseGil gil(a.sequences * kWorkPerPair >= kSmallWork);
    double sums[kSums] = {};
    const double kl = a.kl ? double(*a.kl) : 0.0;
    for (int64_t i = 0; i < a.sequences; ++i) one_sequence(a, kl, i, sums);
    for (int s = 0; s < kSums; ++s) a.sums[s] = S(sums[s]);
  }
};

// pair_loss with numbers for all pairs alone, and the fewest calls from Python around it: options read once,
// the metrics made here.
class DirectPairs {
  PairLoss<float, double> f32_ = {};
  PairLoss<double, double> f64_ = {};

  const PairLoss<float, double>& of(float) const { return f32_; }
  const PairLoss<double, double>& of(double) const { return f64_; }

 public:
  explicit DirectPairs(const pybind11::object& options) {
    set_options(f32_, Record(options)), set_options(f64_, Record(options));
  }

  // `loss` is acc [pairs] with `per_pair`, else their sum. `metrics`: the means of all PairSum but the loss,
  // and with `extremes` the least and the largest of chosen and rejected.
  void run(int dtype, int64_t pairs, Address chosen, Address rejected, Address ref_chosen,
           Address ref_rejected, bool per_pair, Address loss, Address d_chosen, Address d_rejected,
           Address chosen_reward, Address rejected_reward, Address metrics, bool extremes) const {
    Cpu::with_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      thread_local std::vector<S> losses;
      S sums[kSums];
      PairLoss<S, double> a = of(zero);
      a.c = required<S>("chosen", chosen), a.r = required<S>("rejected", rejected);
      a.rc = at<S>(ref_chosen), a.rr = at<S>(ref_rejected), a.pairs = pairs;
      if (!per_pair) losses.resize(size_t(pairs));
      S* const out = required<S>("loss", loss);
      a.loss = per_pair ? out : losses.data();
      a.d_c = required<S>("d_chosen", d_chosen), a.d_r = required<S>("d_rejected", d_rejected);
      a.chosen_reward = required<S>("chosen_reward", chosen_reward);
      a.rejected_reward = required<S>("rejected_reward", rejected_reward);
      a.sums = sums;
      S* const to = required<S>("metrics", metrics);
      Cpu::run(a, 1);
      if (!per_pair) *out = sums[kPairLoss];
      for (int k = kPairLoss + 1; k < kSums; ++k) to[k - 1] = S(double(sums[k]) / double(pairs));
      if (!extremes) return;
      S least = a.c[0], most = a.c[0];
      for (int64_t i = 0; i < pairs; ++i) {
        for (const S x : {a.c[i], a.r[i]}) {
          least = x < least || x != x ? x : least, most = x > most || x != x ? x : most;
        }
      }
      to[kSums - 1] = least, to[kSums] = most;
    });
  }
};

// unpaired_loss with the fewest calls from Python around it: options read once, the shift (KTO's KL, BCO's
// delta) and the metrics made here.
class DirectUnpaired {
  const UnpairedTerm term_;
  const double beta_, desirable_weight_, undesirable_weight_;

  template <class S>
  static double mean_difference(const S* x, const S* y, int64_t n) {
    const double sum = sum_of(n, [=](int64_t i) { return double(x[i]) - double(y[i]); });
    return n ? sum / double(n) : 0.0;
  }

 public:
  explicit DirectUnpaired(const pybind11::object& options)
      : term_(Record(options).code<UnpairedTerm>("term")),
        beta_(Record(options).number("beta")),
        desirable_weight_(Record(options).number("desirable_weight")),
        undesirable_weight_(Record(options).number("undesirable_weight")) {}

  // The shift is `number`, or the one number at `shift`, or, with `kl_logps`, the mean difference of kl_count
  // mismatched responses, at least 0; BCO without either takes its rewards' mean. `metrics`: the mean rewards
  // of desirable and undesirable responses, their difference (0 where a kind has none), the mean log-probs of
  // both, how many there are of each, the shift.
  void run(int dtype, int64_t count, Address logps, Address ref, Address desirable,
           const pybind11::object& number, Address shift, Address kl_logps, Address ref_kl_logps,
           int64_t kl_count, bool per_response, Address loss, Address d_logps, Address reward,
           Address metrics) const {
    Cpu::with_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      thread_local std::vector<S> losses;
      S sums[kSums];
      if (!per_response) losses.resize(size_t(count));
      S* const out = required<S>("loss", loss);
      UnpairedLoss<S, double> a = {};
      a.logps = required<S>("logps", logps), a.sequences = count, a.ref = at<S>(ref);
      a.desirable = required<uint8_t>("desirable", desirable);
      S kl = S(number.is_none() ? 0.0 : number.cast<double>());
      if (shift) {
        kl = *at<S>(shift);
      } else if (kl_logps) {
        const double mean =
            mean_difference(at<S>(kl_logps), required<S>("ref_kl_logps", ref_kl_logps), kl_count);
        kl = S(mean < 0 ? 0.0 : mean);
      } else if (number.is_none() && term_ == UnpairedTerm::kBco) {
        const S *x = a.logps, *r = a.ref;
        const double sum = sum_of(count, [=](int64_t i) { return double(x[i]) - (r ? double(r[i]) : 0.0); });
        kl = S(beta_ * sum / double(count));
      }
      a.kl = &kl, a.code = term_, a.beta = beta_;
      a.desirable_weight = desirable_weight_, a.undesirable_weight = undesirable_weight_;
      a.loss = per_response ? out : losses.data(), a.d = required<S>("d_logps", d_logps);
      a.reward = required<S>("reward", reward), a.sums = sums;
      Cpu::run(a, 1);
      if (!per_response) *out = sums[kUnpairedLoss];
      S* const to = required<S>("metrics", metrics);
      const double good = double(sums[kDesirable]), bad = double(count) - good;
      const auto mean = [](double sum, double n) { return sum / (n < 1 ? 1.0 : n); };
      const double chosen = mean(sums[kDesirableReward], good),
                   rejected = mean(sums[kUndesirableReward], bad);
      to[0] = S(chosen), to[1] = S(rejected), to[2] = S(good > 0 && bad > 0 ? chosen - rejected : 0.0);
      to[3] = S(mean(sums[kDesirableLogps], good)), to[4] = S(mean(sums[kUndesirableLogps], bad));
      to[5] = S(good), to[6] = S(bad), to[7] = kl;
    });
  }
};

}  // namespace

void bind_pairs(pybind11::module_& m) {
  PairBindings<Cpu>::bind(m);
  // By position: naming each argument would cost more than the kernel.
  using pybind11::arg;
  pybind11::class_<DirectPairs>(m, "DirectPairs", pybind11::module_local())
      .def(pybind11::init<const pybind11::object&>(), arg("options"))
      .def("run", &DirectPairs::run, arg("dtype"), arg("pairs"), arg("chosen"), arg("rejected"),
           arg("ref_chosen"), arg("ref_rejected"), arg("per_pair"), arg("loss"), arg("d_chosen"),
           arg("d_rejected"), arg("chosen_reward"), arg("rejected_reward"), arg("metrics"), arg("extremes"));
  pybind11::class_<DirectUnpaired>(m, "DirectUnpaired", pybind11::module_local())
      .def(pybind11::init<const pybind11::object&>(), arg("options"))
      .def("run", &DirectUnpaired::run, arg("dtype"), arg("count"), arg("logps"), arg("ref"),
           arg("desirable"), arg("number"), arg("shift"), arg("kl_logps"), arg("ref_kl_logps"),
           arg("kl_count"), arg("per_response"), arg("loss"), arg("d_logps"), arg("reward"), arg("metrics"));
}

}  // namespace fastloss
