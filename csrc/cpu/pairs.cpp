// segment_sum, segment_expand, pair_loss and unpaired_loss of docs/sequences.md, sections 4 to 6.
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

struct MaybeReleaseGil {  // releasing the GIL costs about as much as a tiny call
  PyThreadState* saved = nullptr;
  explicit MaybeReleaseGil(int64_t work) {
    if (work >= kSmallWork) saved = PyEval_SaveThread();
  }
  ~MaybeReleaseGil() {
    if (saved) PyEval_RestoreThread(saved);
  }
};

constexpr int64_t kWorkPerPair = 32;  // a pair's logarithms cost about as much as the sum of this many tokens

struct Cpu {
  template <class S>
  using Math = double;

  template <class F>
  static void with_dtype(int dtype, F f) {
    if (dtype == kFloat32) return f(0.0f);
    if (dtype == kFloat64) return f(0.0);
    throw std::invalid_argument("dtype: expected 0 (float32) or 3 (float64)");
  }

  template <class S>
  static void run(const SegmentSum<S>& a, int64_t threads) {
    const Segments& seg = a.segments;
    const int64_t length = mean_length(seg);
    const MaybeReleaseGil gil(seg.count * length);
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
    const MaybeReleaseGil gil(a.n);
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
    const MaybeReleaseGil gil(a.pairs * kWorkPerPair);
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
    const MaybeReleaseGil gil(a.sequences * kWorkPerPair);
    double sums[kSums] = {};
    const double kl = a.kl ? double(*a.kl) : 0.0;
    for (int64_t i = 0; i < a.sequences; ++i) one_sequence(a, kl, i, sums);
    for (int s = 0; s < kSums; ++s) a.sums[s] = S(sums[s]);
  }
};

// pair_loss with numbers for all pairs alone, and the fewest calls from Python around it: options read once,
// the metrics made here.
class PlainPairs {
  PairLoss<float, double> f32_ = {};
  PairLoss<double, double> f64_ = {};

  const PairLoss<float, double>& of(float) const { return f32_; }
  const PairLoss<double, double>& of(double) const { return f64_; }

  template <class S>
  static void set(PairLoss<S, double>& a, const pybind11::sequence& terms, int divergence, double alpha,
                  double beta, double smoothing, double margin, double delta, double tau) {
    set_terms(a, terms), set_divergence(a, divergence, alpha);
    a.beta.number = beta, a.smoothing.number = smoothing, a.margin.number = margin;
    a.weight.number = 1, a.delta.number = delta, a.tau = tau;
  }

 public:
  PlainPairs(const pybind11::sequence& terms, int divergence, double alpha, double beta, double smoothing,
             double margin, double delta, double tau) {
    set(f32_, terms, divergence, alpha, beta, smoothing, margin, delta, tau);
    set(f64_, terms, divergence, alpha, beta, smoothing, margin, delta, tau);
  }

  // `loss` is acc [pairs] with `per_pair`, else their sum. `metrics`: the means of sums[1] to sums[6], and
  // with `extremes` the least and the largest of c and r.
  void run(int dtype, int64_t pairs, Address c, Address r, Address rc, Address rr, bool per_pair,
           Address loss, Address d_c, Address d_r, Address chosen_reward, Address rejected_reward,
           Address metrics, bool extremes) const {
    Cpu::with_dtype(dtype, [&](auto zero) {
      using S = decltype(zero);
      thread_local std::vector<S> losses;
      S sums[kSums];
      PairLoss<S, double> a = of(zero);
      a.c = from<S>(c), a.r = from<S>(r), a.rc = from<S>(rc), a.rr = from<S>(rr), a.pairs = pairs;
      if (!per_pair) losses.resize(size_t(pairs));
      a.loss = per_pair ? from<S>(loss) : losses.data();
      a.d_c = from<S>(d_c), a.d_r = from<S>(d_r), a.sums = sums;
      a.chosen_reward = from<S>(chosen_reward), a.rejected_reward = from<S>(rejected_reward);
      Cpu::run(a, 1);
      if (!per_pair) *from<S>(loss) = sums[0];
      S* const to = from<S>(metrics);
      for (int k = 1; k < kSums; ++k) to[k - 1] = S(double(sums[k]) / double(pairs));
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

}  // namespace

void bind_pairs(pybind11::module_& m) {
  PairBindings<Cpu>::bind(m);
  pybind11::class_<PlainPairs>(m, "PlainPairs", pybind11::module_local())
      .def(pybind11::init<const pybind11::sequence&, int, double, double, double, double, double, double>())
      .def("run", &PlainPairs::run);
}

}  // namespace fastloss
