// The blocks of head.h on one thread. forward: Z = H Wᵀ of a block, a stripe of rows at a time, its sums, and
// the logits that are kept. backward: the block's dZ of all rows, then dW = dZᵀ H, finished at once, then dH
// += dZ W. Logits and dZ are rounded to the weight's dtype, as PyTorch's would be; sums over K are float32.

#ifndef FASTLOSS_ISA
#error "head.cpp is compiled once per instruction set, with -DFASTLOSS_ISA=avx512, avx2 or generic"
#endif

#include "head.h"

#include <sched.h>

#include "block.h"
#include "head_scratch.h"
#include "tile.h"

namespace fastloss {
namespace FASTLOSS_ISA {

namespace {

template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};

int64_t place(const HeadCall& c, int64_t row) { return c.keep ? c.keep[row] : row; }

template <class T>
void to_float(const T* x, int64_t n, float* out) {
  write_block(out, n, [=](int64_t i, int64_t count) { return load_upto(x + i, count); });
}
template <class T>
void from_float(const float* x, int64_t n, T* out) {
  write_block(out, n, [=](int64_t i, int64_t count) { return load_upto(x + i, count); });
}

// T: of the weight, its gradient and the logits.
template <class Op, class T>
class Block {
  typedef typename Op::Unit Unit;
  static constexpr bool kIsUnit =
      Op::kElements == 2 || Same<T, float>::value;  // T's rows can be A as they lie

  const HeadCall& c_;
  const int64_t index_, start_, w_;  // of the block: its first column and its columns
  const int64_t z_stride_, columns_stride_;
  Unit *panels_, *second_, *stripe_, *columns_;
  T* z_;
  RowState* states_;
  void* kernel_;

 public:
  Block(const HeadCall& c, int64_t index, char* scratch)
      : c_(c),
        index_(index),
        start_(index * c.width),
        w_(c.logits.vocab - start_ < c.width ? c.logits.vocab - start_ : c.width),
        z_stride_(block_stride<T>(c.width)),
        columns_stride_(block_stride<float>(c.width)) {
    const Areas a = areas_of(c);
    panels_ = reinterpret_cast<Unit*>(scratch + a.panels),
    second_ = reinterpret_cast<Unit*>(scratch + a.second);
    states_ = reinterpret_cast<RowState*>(scratch + a.states),
    stripe_ = reinterpret_cast<Unit*>(scratch + a.stripe);
    columns_ = reinterpret_cast<Unit*>(scratch + a.columns), z_ = reinterpret_cast<T*>(scratch + a.z);
    kernel_ = scratch + a.kernel;
  }

  void forward(RowState* state, bool first) {
    pack_transposed<Op>(weight(), c_.weight_stride, w_, c_.dim, panels_);
    for (int64_t row = 0, end; row < c_.logits.rows; row = end) {
      const bool stored = row < c_.stored;
      end = stripe_end(row, stored ? c_.stored : c_.logits.rows);
      T* const z = stored ? stored_logits() + row * w_ : z_;
      const int64_t stride = stored ? w_ : z_stride_;
      make_logits(row, end, z, stride);
      vocab_kernels.forward(logits_at(z, row, stride), {start_, w_, first}, c_.ce, c_.stats, state, row, end,
                            kernel_);
    }
  }

  // For d hidden alone, of rows [begin, end).
  void add_exponentials(int64_t begin, int64_t end) {
    pack_transposed<Op>(weight(), c_.weight_stride, w_, c_.dim, panels_);
    pack_weight(second_);
    CrossEntropy ce = c_.ce;
    ce.grad = z_, ce.grad_row_stride = z_stride_;
    for (int64_t row = begin, stop; row < end; row = stop) {
      stop = stripe_end(row, end);
      make_logits(row, stop, z_, z_stride_);
      const Logits l = logits_at(z_, row, z_stride_);
      for (int64_t i = row; i < stop; ++i) states_[i - row] = c_.state[i];
      vocab_kernels.forward(l, {start_, w_, index_ == 0}, c_.ce, c_.stats, c_.state, row, stop, kernel_);
      for (int64_t i = row; i < stop; ++i) {
        RowState& s = states_[i - row];
        const double old = s.max;
        s = RowState{};
        s.kind = c_.logits.target[i] == c_.logits.ignore_index;
        s.max = c_.state[i].max, s.b = 1;  // its gradient is exp(z - max)
        if (index_ > 0 && old != s.max) scale_row(sum_row(i), float(__builtin_exp(old - s.max)));
      }
      ce.grad = reinterpret_cast<void*>(uintptr_t(z_) - row * z_stride_ * sizeof(T));
      vocab_kernels.backward(l, {start_, w_, false}, ce, states_ - row, row, stop, kernel_);
      zero_second_of_last_pair(z_, stop - row);
      // The target's own term is small where p is near 1: it comes at the end.
      for (int64_t i = row; i < stop; ++i) {
        const int64_t t = c_.logits.target[i] - start_;
        if (t >= 0 && t < w_) z_[(i - row) * z_stride_ + t] = T{};
      }
      add_product(row, stop, z_, second_);
    }
  }

  void finish_d_hidden(int64_t begin, int64_t end) {
    const T* const weight = static_cast<const T*>(c_.weight);
    for (int64_t i = begin; i < end; ++i) {
      const RowState& s = c_.state[i];
      float* const row = sum_row(i);
      const double k = s.kind == 0 ? s.b / s.sum : s.kind == 1 ? 0.0 : __builtin_nan("");
      scale_row(row, float(k));
      if (s.kind != 0) continue;
      const double p = __builtin_exp((s.z_target - s.max) - s.log_sum);
      add_row(row, weight + c_.logits.target[i] * c_.weight_stride, float((s.a + s.b * p) * s.slope_target));
    }
  }

  void backward() {
    make_gradient();
    if (c_.d_bias) add_bias();
    if (c_.d_weight) make_d_weight();
    if (c_.d_hidden) add_d_hidden();
  }

 private:
  const T* weight() const { return static_cast<const T*>(c_.weight) + start_ * c_.weight_stride; }
  T* d_weight() const { return static_cast<T*>(c_.d_weight) + start_ * c_.dim; }
  T* stored_logits() const { return d_weight(); }  // [stored, w_] in the memory of [w_, dim]

  static int64_t stripe_end(int64_t row, int64_t limit) {
    return limit - row < kStripe ? limit : row + kStripe;
  }

  // z is where `row` has the block's first logit.
  Logits logits_at(const T* z, int64_t row, int64_t stride) const {
    Logits l = c_.logits;
    l.x = reinterpret_cast<const void*>(uintptr_t(z) - row * stride * sizeof(T)), l.row_stride = stride;
    return l;
  }

  template <class F>
  void with_hidden(F&& f) const {
    if constexpr (Op::kElements == 2) {
      f(static_cast<const BF16*>(c_.hidden));
    } else if (c_.hidden_dtype == kBFloat16) {
      f(static_cast<const BF16*>(c_.hidden));
    } else {
      f(static_cast<const float*>(c_.hidden));
    }
  }

  // z = H Wᵀ of rows [row, end), from the packed block.
  void make_logits(int64_t row, int64_t end, T* z, int64_t stride) {
    const Unit* dense = nullptr;  // the rows' units, where they had to be converted
    if (Op::kElements == 1 && c_.hidden_dtype != kFloat32) {
      with_hidden([&](auto* x) {
        float* const to = reinterpret_cast<float*>(stripe_);
        for (int64_t i = row; i < end; ++i)
          to_float(x + place(c_, i) * c_.hidden_stride, c_.dim, to + (i - row) * c_.dim);
      });
      dense = stripe_;
    }
    const char* const hidden = static_cast<const char*>(c_.hidden);
    const int64_t bytes = c_.hidden_stride * (Op::kElements == 2 ? 2 : 4);
    const auto a = [&](int64_t i) {
      return dense ? dense + i * c_.dim : reinterpret_cast<const Unit*>(hidden + place(c_, row + i) * bytes);
    };
    constexpr bool kDirect = Same<T, float>::value;
    float* const out = kDirect ? reinterpret_cast<float*>(z) : reinterpret_cast<float*>(columns_);
    const int64_t out_stride = kDirect ? stride : columns_stride_, units = c_.dim / Op::kElements;
    for (int64_t k = 0; k < units; k += kDepth) {
      multiply<Op, false>(
          end - row, w_, units - k < kDepth ? units - k : kDepth, [&](int64_t i) { return a(i) + k; }, 1,
          panels_ + k * kPanel, units * kPanel, [&](int64_t i) { return out + i * out_stride; }, k > 0);
    }
    if constexpr (!kDirect) {
      for (int64_t i = 0; i < end - row; ++i) from_float(out + i * out_stride, w_, z + i * stride);
    }
  }

  void make_gradient() {
    CrossEntropy ce = c_.ce;
    ce.grad = z_, ce.grad_row_stride = z_stride_;
    if (c_.stored < c_.logits.rows) pack_transposed<Op>(weight(), c_.weight_stride, w_, c_.dim, panels_);
    for (int64_t row = 0, end; row < c_.logits.rows; row = end) {
      const bool stored = row < c_.stored;
      end = stripe_end(row, stored ? c_.stored : c_.logits.rows);
      T* const z = stored ? stored_logits() + row * w_ : z_ + row * z_stride_;
      const int64_t stride = stored ? w_ : z_stride_;
      if (!stored) make_logits(row, end, z, stride);
      vocab_kernels.backward(logits_at(z, row, stride), {start_, w_, false}, ce, c_.state, row, end, kernel_);
      zero_second_of_last_pair(z_ + row * z_stride_, end - row);
    }
  }

  void add_bias() {
    double* const sum = static_cast<double*>(kernel_);
    for (int64_t j = 0; j < w_; ++j) sum[j] = 0;
    for (int64_t i = 0; i < c_.logits.rows; ++i) {
      for (int64_t j = 0; j < w_; j += W) {
        float z[W];
        store(z, load_upto(z_ + i * z_stride_ + j, w_ - j));
        store(sum + j, load(sum + j) + widen(z));
        store(sum + j + W / 2, load(sum + j + W / 2) + widen(z + W / 2));
      }
    }
    for (int64_t j = 0; j < w_; ++j) c_.d_bias[start_ + j] = float(sum[j]);
  }

  void make_d_weight() {
    constexpr bool kDirect = Same<T, float>::value;
    float* const out = kDirect ? reinterpret_cast<float*>(d_weight()) : reinterpret_cast<float*>(panels_);
    for (int64_t row = 0; row < c_.logits.rows; row += kStripe) {
      const int64_t count = stripe_end(row, c_.logits.rows) - row;
      const int64_t units = (count + Op::kElements - 1) / Op::kElements;
      with_hidden([&](auto* x) {
        pack_rows<Op, typename Element<decltype(x)>::type>(
            [&](int64_t i) { return x + place(c_, row + i) * c_.hidden_stride; }, c_.dim, count, stripe_,
            kPanel, units * kPanel);
      });
      const Unit* a = reinterpret_cast<const Unit*>(z_ + row * z_stride_);
      int64_t a_step = z_stride_;
      if constexpr (!kDirect) {
        pack_rows<Op, T>([&](int64_t i) { return z_ + (row + i) * z_stride_; }, w_, count, columns_,
                         columns_stride_, 0);
        a = columns_, a_step = columns_stride_;
      }
      multiply<Op, true>(
          w_, c_.dim, units, [&](int64_t i) { return a + i; }, a_step, stripe_, units * kPanel,
          [&](int64_t i) { return out + i * c_.dim; }, row > 0);
    }
    if constexpr (!kDirect) from_float(out, w_ * c_.dim, d_weight());
  }

  void zero_second_of_last_pair(T* z, int64_t rows) {
    if (Op::kElements == 1 || w_ % 2 == 0) return;
    for (int64_t i = 0; i < rows; ++i) z[i * z_stride_ + w_] = T{};
  }

  // Of columns, as units of K of dH = dZ W.
  int64_t units() const { return (w_ + Op::kElements - 1) / Op::kElements; }

  void pack_weight(Unit* out) {
    pack_rows<Op, T>([&](int64_t i) { return weight() + i * c_.weight_stride; }, c_.dim, w_, out, kPanel,
                     units() * kPanel);
  }

  float* sum_row(int64_t row) const {
    if (c_.spread) return c_.d_hidden + place(c_, row) * c_.dim;
    return row < c_.split ? c_.d_hidden + row * c_.dim : c_.d_hidden_rest + (row - c_.split) * c_.dim;
  }

  void scale_row(float* x, float factor) const {
    write_block(x, c_.dim, [=](int64_t i, int64_t n) { return load_upto(x + i, n) * factor; });
  }
  void add_row(float* x, const T* y, float factor) const {
    write_block(x, c_.dim,
                [=](int64_t i, int64_t n) { return load_upto(x + i, n) + factor * load_upto(y + i, n); });
  }

  // dH (+)= Z W of rows [row, end), whose block is at z; the first block of the vocabulary begins the sum.
  void add_product(int64_t row, int64_t end, const T* z, const Unit* packed) {
    const Unit* a = reinterpret_cast<const Unit*>(z);
    int64_t a_stride = z_stride_ / Op::kElements;
    if constexpr (!kIsUnit) {
      float* const to = reinterpret_cast<float*>(columns_);
      for (int64_t i = 0; i < end - row; ++i) to_float(z + i * z_stride_, w_, to + i * columns_stride_);
      a = columns_, a_stride = columns_stride_;
    }
    multiply<Op, false>(
        end - row, c_.dim, units(), [&](int64_t i) { return a + i * a_stride; }, 1, packed, units() * kPanel,
        [&](int64_t i) { return sum_row(row + i); }, index_ > 0);
  }

  void add_d_hidden() {
    pack_weight(panels_);
    for (int64_t row = 0, stripe = 0; row < c_.logits.rows; row += kStripe, ++stripe) {
      while (__atomic_load_n(c_.finished + stripe, __ATOMIC_ACQUIRE) != index_) sched_yield();
      add_product(row, stripe_end(row, c_.logits.rows), z_ + row * z_stride_, panels_);
      __atomic_store_n(c_.finished + stripe, index_ + 1, __ATOMIC_RELEASE);
    }
  }

  template <class P>
  struct Element;
  template <class E>
  struct Element<const E*> {
    typedef E type;
  };
};

template <class F>
void with_block(const HeadCall& c, int64_t index, void* scratch, F&& f) {
  char* const memory = static_cast<char*>(scratch);
  if (c.pairs) {
    Block<BFloat16Pairs, BF16> block(c, index, memory);
    f(block);
  } else if (c.weight_dtype == kBFloat16) {
    Block<FloatUnits, BF16> block(c, index, memory);
    f(block);
  } else {
    Block<FloatUnits, float> block(c, index, memory);
    f(block);
  }
}

int64_t scratch_bytes(const HeadCall& c) { return areas_of(c).bytes; }

void forward(const HeadCall& c, RowState* state, int64_t begin, int64_t end, void* scratch) {
  for (int64_t index = begin; index < end; ++index) {
    with_block(c, index, scratch, [&](auto& block) { block.forward(state, index == begin); });
  }
}

void finish(const HeadCall& c, int64_t shares) {
  for (int64_t share = 1; share < shares; ++share) {
    vocab_kernels.merge(c.logits, c.ce, c.stats, c.state, c.state + share * c.logits.rows);
  }
  vocab_kernels.finish(c.logits, c.ce, c.stats, c.state, 0, c.logits.rows);
}

void set_coefficients(const HeadCall& c) { vocab_kernels.set_coefficients(c.logits, c.ce, c.given, c.state); }

void backward(const HeadCall& c, int64_t index, void* scratch) {
  with_block(c, index, scratch, [](auto& block) { block.backward(); });
}

void d_hidden_alone(const HeadCall& c, int64_t begin, int64_t end, void* scratch) {
  const int64_t blocks = (c.logits.vocab + c.width - 1) / c.width;
  for (int64_t index = 0; index < blocks; ++index) {
    with_block(c, index, scratch, [&](auto& block) { block.add_exponentials(begin, end); });
  }
  vocab_kernels.finish(c.logits, c.ce, c.stats, c.state, begin, end);
  with_block(c, 0, scratch, [&](auto& block) { block.finish_d_hidden(begin, end); });
}

}  // namespace

extern const HeadKernels head_kernels;
const HeadKernels head_kernels = {kPanel,           scratch_bytes, forward,       finish,
                                  set_coefficients, backward,      d_hidden_alone};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
