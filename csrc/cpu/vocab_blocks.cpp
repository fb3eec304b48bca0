// The loss of docs/engine.md, statistics and gradient of all rows, from logits that come a block of the
// vocabulary at a time. forward: reads the block, adds to the row's running sums (rescaled where the maximum
// rises). finish: loss, statistics, coefficients. backward: dz = a·[v = target] + b·p + c·p·log p + d·w over
// the block's logits, p from the final sums.

#ifndef FASTLOSS_ISA
#error "vocab_blocks.cpp is compiled once per instruction set, with -DFASTLOSS_ISA=avx512, avx2 or generic"
#endif

#include "vocab_blocks.h"

#include "row_math.h"

namespace fastloss {
namespace FASTLOSS_ISA {
namespace {

template <class S>
struct BlockScratch {
  S *z, *e, *slope;
  explicit BlockScratch(void* memory)
      : z(static_cast<S*>(memory)), e(z + kBlock + W), slope(e + kBlock + W) {}
};
constexpr int64_t kScratch = 3 * (kBlock + W) * sizeof(float);

template <class S>
const S* weights_of(const CrossEntropy& c, int64_t row) {
  return c.w ? static_cast<const S*>(c.w) + row * c.w_row_stride : nullptr;
}

// Sums relative to their own maximum, added to those so far: one of the two factors is 1.
inline void add_sums(Wanted want, double block_max, double sum, double entropy, double square, RowState* to) {
  RowState& so_far = *to;
  const double max = block_max > so_far.max ? block_max : so_far.max;
  const double below = so_far.max - max, block_below = block_max - max;
  const double keep = below == 0 ? 1.0 : __builtin_exp(below);
  const double add = block_below == 0 ? 1.0 : __builtin_exp(block_below);
  if (want.entropy) {  // Σ e (z - max), before the sums it needs change
    const double old = keep != 0 ? keep * (so_far.entropy + so_far.sum * below) : 0.0;
    so_far.entropy = old + (add != 0 ? add * (entropy + sum * block_below) : 0.0);
  }
  if (want.square) so_far.square = keep * keep * so_far.square + add * add * square;
  so_far.sum = keep * so_far.sum + add * sum;
  so_far.max = max;
}

template <class T>
void forward(const Logits& l, const VocabBlock& block, const CrossEntropy& c, const Stats& s, RowState* state,
             int64_t begin, int64_t end, void* memory) {
  using S = typename Acc<T>::S;
  const BlockScratch<S> scratch(memory);
  const Transform<T> f(l);
  const Wanted want = wanted(s, l, c);
  for (int64_t row = begin; row < end; ++row) {
    RowState& so_far = state[row];
    if (block.first) {
      so_far = RowState{};
      so_far.max = lowest_finite<S>();
      so_far.slope_target = 1;
    }
    const RowKind kind = kind_of(l, row);
    if (kind == RowKind::ignored) continue;
    const int64_t t = kind == RowKind::normal && l.target ? l.target[row] : -1;
    const T* const x = static_cast<const T*>(l.x) + row * l.row_stride;
    const S* const w = want.sum_w ? weights_of<S>(c, row) : nullptr;
    RowSums r;
    r.z_target = so_far.z_target, r.slope_target = so_far.slope_target;
    BlockSums sums;
    block_pass<T>(f, x, block.start, block.width, t, w ? w + block.start : nullptr, want, scratch.z,
                  l.softcap > 0 ? scratch.slope : nullptr, scratch.e,
                  reinterpret_cast<uintptr_t>(x + l.row_stride), 0, &sums, &r);
    so_far.z_target = r.z_target, so_far.slope_target = r.slope_target;
    so_far.sum_z += r.sum_z, so_far.sum_w += r.sum_w, so_far.sum_wz += r.sum_wz;
    add_sums(want, sums.max, sums.sum, sums.entropy, sums.square, &so_far);
  }
}

void merge(const Logits& l, const CrossEntropy& c, const Stats& s, RowState* into, const RowState* from) {
  const Wanted want = wanted(s, l, c);
  for (int64_t row = 0; row < l.rows; ++row) {
    RowState& so_far = into[row];
    const RowState& more = from[row];
    // The target is in one block: the others have 0 and 1.
    so_far.z_target += more.z_target, so_far.slope_target *= more.slope_target;
    so_far.sum_z += more.sum_z, so_far.sum_w += more.sum_w, so_far.sum_wz += more.sum_wz;
    add_sums(want, more.max, more.sum, more.entropy, more.square, &so_far);
  }
}

void finish(const Logits& l, const CrossEntropy& c, const Stats& s, RowState* state, int64_t begin,
            int64_t end) {
  using S = float;
  const Wanted want = wanted(s, l, c);
  const double k = c.grad_scale * l.scale;
  for (int64_t row = begin; row < end; ++row) {
    RowState& so_far = state[row];
    const RowKind kind = kind_of(l, row);
    so_far.kind = double(kind);
    if (kind == RowKind::ignored) {
      write_ignored<S>(s, row);
      continue;
    }
    const bool bad = kind == RowKind::bad;
    RowSums r;
    r.max = so_far.max, r.sum = so_far.sum, r.z_target = so_far.z_target,
    r.slope_target = so_far.slope_target;
    r.sum_z = so_far.sum_z, r.sum_w = so_far.sum_w, r.sum_wz = so_far.sum_wz;
    finish_sums(want, so_far.entropy, so_far.square, &r);
    write_stats<S>(s, row, r, double(l.vocab), bad);
    if (bad) {
      put<S>(s.loss, row, __builtin_nan(""));
      continue;
    }
    const RowLoss g = loss_of_row(c, l.target != nullptr, l.target ? l.target[row] : -1,
                                  weights_of<S>(c, row), double(l.vocab), r);
    put<S>(s.loss, row, g.loss);
    so_far.log_sum = r.log_sum;
    so_far.a = (g.a + (g.d != 0 ? g.d * g.w_t : 0.0)) * k, so_far.b = g.b * k, so_far.d = g.d * k;
  }
}

void set_coefficients(const Logits& l, const CrossEntropy& ce, const Coefficients& g, RowState* state) {
  for (int64_t row = 0; row < l.rows; ++row) {
    RowState& s = state[row];
    s = RowState{};
    const RowKind kind = kind_of(l, row);
    s.kind = double(kind);
    if (kind != RowKind::normal) continue;
    s.max = get<float>(g.lse, row);  // p = exp(z - lse)
    const float* const w = weights_of<float>(ce, row);
    s.b = get<float>(g.b, row) * l.scale, s.c = get<float>(g.c, row) * l.scale,
    s.d = get<float>(g.d, row) * l.scale;
    s.a = get<float>(g.a, row) * l.scale;
    if (l.target && s.d != 0) s.a += s.d * (w ? double(w[l.target[row]]) : 1.0);
  }
}

template <class T>
void backward(const Logits& l, const VocabBlock& block, const CrossEntropy& c, const RowState* state,
              int64_t begin, int64_t end, void* memory) {
  using S = typename Acc<T>::S;
  const BlockScratch<S> scratch(memory);
  const Transform<T> f(l);
  for (int64_t row = begin; row < end; ++row) {
    const RowState& so_far = state[row];
    const T* const x = static_cast<const T*>(l.x) + row * l.row_stride;
    T* const out = static_cast<T*>(c.grad) + row * c.grad_row_stride;
    if (so_far.kind != 0) {
      fill_row<T>(out, block.width, so_far.kind == double(RowKind::bad) ? S(__builtin_nanf("")) : S(0));
      continue;
    }
    S max;
    S* const slope = l.softcap > 0 ? scratch.slope : nullptr;
    const S* const z = load_block(f, x, block.start, block.width, scratch.z, scratch.slope, &max);
    const int64_t t = l.target ? l.target[row] - block.start : -1;
    const double z_target = t >= 0 && t < block.width ? double(z[t]) : 0.0;  // read before it is overwritten
    const S* const w = weights_of<S>(c, row);
    const S ref = S(so_far.max), log_sum = S(so_far.log_sum), b = S(so_far.b), entropy = S(so_far.c);
    const auto write = [&](auto main) __attribute__((always_inline)) {
      gradient_block(out, block.width, S(so_far.d), w ? w + block.start : nullptr, slope, main);
    };
    if (so_far.c == 0) {
      write([=](int64_t i, int64_t) __attribute__((always_inline)) {
        return gradient_from_z<false>(z + i, ref, log_sum, b, S(0));
      });
    } else {
      write([=](int64_t i, int64_t) __attribute__((always_inline)) {
        return gradient_from_z<true>(z + i, ref, log_sum, b, entropy);
      });
    }
    if (t < 0 || t >= block.width) continue;
    const double log_p = (z_target - so_far.max) - so_far.log_sum, p = __builtin_exp(log_p);
    const double c_term = so_far.c != 0 && p != 0 ? so_far.c * p * log_p : 0.0;
    store_one(out + t, S((so_far.a + so_far.b * p + c_term) * (slope ? double(slope[t]) : 1.0)));
  }
}

template <class F>
auto with_dtype(int dtype, F&& f) {
  return dtype == kBFloat16 ? f(BF16{}) : f(float{});
}

void forward_of(const Logits& l, const VocabBlock& block, const CrossEntropy& c, const Stats& s,
                RowState* state, int64_t begin, int64_t end, void* m) {
  with_dtype(l.dtype, [&](auto type) { forward<decltype(type)>(l, block, c, s, state, begin, end, m); });
}
void backward_of(const Logits& l, const VocabBlock& block, const CrossEntropy& c, const RowState* state,
                 int64_t begin, int64_t end, void* m) {
  with_dtype(l.dtype, [&](auto type) { backward<decltype(type)>(l, block, c, state, begin, end, m); });
}

}  // namespace

extern const VocabKernels vocab_kernels;
const VocabKernels vocab_kernels = {kScratch, forward_of, merge, finish, set_coefficients, backward_of};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
