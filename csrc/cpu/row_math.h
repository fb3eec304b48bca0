// What the row kernels (rows.cpp) and the kernels over blocks of the vocabulary (vocab_blocks.cpp) share: the
// sums of a block, the statistics, loss and coefficients of a row (docs/engine.md).
// Reads up to kBlock logits, writes one number per row and output.
// Inline, in the ISA's namespace: each of the two files is compiled once per instruction set.
#pragma once

#include "block.h"
#include "common/row_terms.h"

namespace fastloss {
namespace FASTLOSS_ISA {
namespace {

struct BlockSums {
  double max, sum, entropy, square;
  double weight;  // exp(max - the row's max)
};

enum class RowKind { normal, ignored, bad };

RowKind kind_of(const Logits& l, int64_t row) {
  if (!l.target) return RowKind::normal;
  const int64_t t = l.target[row];
  if (t == l.ignore_index) return RowKind::ignored;
  return t < 0 || t >= l.vocab ? RowKind::bad : RowKind::normal;
}

template <class S>
void put(void* p, int64_t row, double value) {
  if (p) static_cast<S*>(p)[row] = S(value);
}

template <class S>
double get(const void* p, int64_t row) {
  return p ? double(static_cast<const S*>(p)[row]) : 0.0;
}

template <class T>
void fill_row(T* out, int64_t n, typename Acc<T>::S value) {
  using S = typename Acc<T>::S;
  write_block(out, n, [=](int64_t, int64_t) { return typename Lanes<S>::V{} + value; });
}

// What the first pass over a row finds out.
struct RowSums {
  double max = 0, sum = 0, log_sum = 0, lse = 0;  // sum = Σ exp(z - max)
  double z_target = 0, slope_target = 1;
  double origin = 0;  // of the next: Σ (z - origin), Σ w, Σ w (z - origin)
  double sum_z = 0, sum_w = 0, sum_wz = 0;
  double entropy = 0, log_sum_sq = 0;
  bool is_top1 = false;
};

struct Wanted {
  bool entropy, square, sum_z, sum_w;
};

// Whether a row of bfloat16 goes the shorter way of max_block, exp_even_odd and write_even_odd. No statistic
// decides it: the loss has the same bits with and without them.
template <class T, class S>
FASTLOSS_INLINE bool is_even_odd(const Transform<T>& f, const S* w) {
  return Same<T, BF16>::value && f.plain && !w;
}

// One block: its maximum, and with exp(z - max) in e its sums. What a row needs of the block's z itself goes
// into r. e may be x itself, so everything that needs z comes before exp_block writes. w is the block's.
template <class T, class S = typename Acc<T>::S>
FASTLOSS_INLINE void block_pass(const Transform<T>& f, const T* x, int64_t start, int64_t n, int64_t t,
                                const S* w, Wanted want, S* z_scratch, S* slope, S* e, uintptr_t next,
                                uintptr_t next_out, BlockSums* sums, RowSums* r) {
  if constexpr (Same<T, BF16>::value) {
    if (is_even_odd(f, w)) {
      if (t >= start && t < start + n) r->z_target = load_n(x + (t - start), 1)[0];
      sums->max = max_block(x, n);
      if (start == 0 && sums->max - sums->max == 0) r->origin = sums->max;
      sums->sum = exp_even_odd(x, n, float(sums->max), e, next, next_out);
      if (sums->sum < 2) sums->sum = sum_block(e, n);
      if (want.entropy || want.sum_z) {
        widen_even_odd(x, n, z_scratch);
        if (want.sum_z) r->sum_z += sum_block(z_scratch, n, r->origin);
        if (want.entropy) sums->entropy = entropy_block(z_scratch, e, n, float(sums->max));
      }
      if (want.square) sums->square = square_block(e, n);
      return;
    }
  }
  S max;
  const S* z = load_block(f, x, start, n, z_scratch, slope, &max);
  if (t >= start && t < start + n) {
    r->z_target = z[t - start];
    if (slope) r->slope_target = slope[t - start];
  }
  // So that an offset of all logits, however large, is no part of the sums.
  if (start == 0 && max - max == 0) r->origin = max;
  if (want.sum_z) r->sum_z += sum_block(z, n, r->origin);
  if (w) {
    r->sum_w += sum_block(w, n);
    r->sum_wz += dot_block(w, z, n, r->origin);
  }
  if (want.entropy && z == e) {  // in place: exp_block would overwrite the z that entropy_block needs
    memcpy(z_scratch, z, n * sizeof(S));
    z = z_scratch;
  }
  sums->max = max;
  sums->sum = exp_block<T>(z, n, max, e, next, next_out);
  // Where one logit dominates, its 1 swallows the low bits of its float lane; they are 1 - p, so add in
  // double.
  if (sums->sum < 2) sums->sum = sum_block(e, n);
  if (want.entropy) sums->entropy = entropy_block(z, e, n, max);
  if (want.square) sums->square = square_block(e, n);
}

// From the sums over the whole row; entropy = Σ e (z - max), square = Σ e².
inline void finish_sums(Wanted want, double entropy, double square, RowSums* r) {
  const bool all_minus_inf = r->sum == 0;
  r->is_top1 = all_minus_inf || (r->z_target >= r->max && (r->sum == r->sum || r->max > 1.8e308L));
  if (all_minus_inf) r->sum = __builtin_nan("");
  r->log_sum = __builtin_log(r->sum);
  r->lse = r->max + r->log_sum;
  if (want.entropy) r->entropy = r->log_sum - entropy / r->sum;
  if (want.square) r->log_sum_sq = __builtin_log(square) - 2 * r->log_sum;
}

template <class S>
void write_stats(const Stats& s, int64_t row, const RowSums& r, double vocab, bool bad) {
  put<S>(s.logsumexp, row, r.lse);
  put<S>(s.logprobs, row, bad ? __builtin_nan("") : (r.z_target - r.max) - r.log_sum);
  put<S>(s.entropy, row, r.entropy);
  put<S>(s.log_sum_sq_probs, row, r.log_sum_sq);
  put<S>(s.mean_logits, row, r.origin + r.sum_z / vocab);
  if (s.is_top1) s.is_top1[row] = !bad && r.is_top1;
  put<S>(s.lse_parts, 2 * row, r.max);
  put<S>(s.lse_parts, 2 * row + 1, r.log_sum);
}

template <class S>
void write_ignored(const Stats& s, int64_t row) {
  put<S>(s.loss, row, 0);
  put<S>(s.logsumexp, row, 0);
  put<S>(s.logprobs, row, 0);
  put<S>(s.entropy, row, 0);
  put<S>(s.log_sum_sq_probs, row, 0);
  put<S>(s.mean_logits, row, 0);
  if (s.is_top1) s.is_top1[row] = 0;
  put<S>(s.lse_parts, 2 * row, 0);
  put<S>(s.lse_parts, 2 * row + 1, 0);
}

inline Wanted wanted(const Stats& s) {
  return {s.entropy != nullptr, s.log_sum_sq_probs != nullptr, s.mean_logits != nullptr, false};
}

// Σ w and Σ w z (Σ z where there is no w) are terms of the loss.
inline Wanted wanted(const Stats& s, const Logits& l, const CrossEntropy& c) {
  Wanted want = wanted(s);
  want.sum_w = !l.target || (c.terms.smooth > 0 && c.w);
  if (c.terms.smooth > 0 && l.target && !c.w) want.sum_z = true;
  return want;
}

struct RowLoss {
  double loss, a, b, d, w_t;
};

// t and w_t are of an index target; sums without label smoothing may be 0.
template <class S>
RowLoss loss_of_row(const CrossEntropy& c, bool index_target, int64_t t, const S* w, double vocab,
                    const RowSums& r) {
  const double w_t = index_target && w ? double(w[t]) : 1.0;
  const bool weighted = w || !index_target;
  const double w_sum = weighted ? r.sum_w : vocab, wz_sum = weighted ? r.sum_wz : r.sum_z;
  const double minus_log_p = r.log_sum - (r.z_target - r.max),
               spread = w_sum * ((r.max - r.origin) + r.log_sum) - wz_sum;
  const auto k = cross_entropy_coefficients(c.terms, index_target, w_t, w_sum, r.lse);
  return {cross_entropy_loss(c.terms, index_target, w_t, minus_log_p, spread, r.lse), k.a, k.b,
          k.d + 0.0,  // -0 is 0
          w_t};
}

}  // namespace
}  // namespace FASTLOSS_ISA
}  // namespace fastloss
