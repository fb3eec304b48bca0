// The three row functions of docs/engine.md: statistics, gradient from coefficients, cross-entropy with
// gradient. Reads a row once from memory and writes its gradient once; exp(z) waits in the output row or an
// L2-sized scratch. Built three times, -DFASTLOSS_ISA=avx512 (-mavx512f -mavx512bw -mavx512dq -mavx512vl
// -mfma -mf16c -mavx2), avx2
// (-mavx2 -mfma -mf16c) and generic (no flags), each with -O3 -std=c++17 -fno-math-errno -ffp-contract=fast
// -fvisibility=hidden -fopenmp and never -ffast-math; dispatch.cpp chooses at run time.

#ifndef FASTLOSS_ISA
#error "rows.cpp is compiled once per instruction set, with -DFASTLOSS_ISA=avx512, avx2 or generic"
#endif

#include "row_math.h"

namespace fastloss {
namespace FASTLOSS_ISA {
namespace {

constexpr int64_t kAlign = 64;

int64_t rounded(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }
int64_t block_count(int64_t vocab) { return (vocab + kBlock - 1) / kBlock; }

// A thread's scratch, carved from one piece of memory.
template <class T>
struct Scratch {
  using S = typename Acc<T>::S;
  BlockSums* blocks;
  S* z;      // one block
  S* e;      // the whole row where a gradient waits for it, else one block
  S* slope;  // as e; null without softcap
  int64_t bytes;

  // exp(z) waits in the output row itself if it has the dtype for it.
  static bool e_in_scratch(bool gradient) { return gradient && sizeof(T) != sizeof(S); }

  Scratch(const Logits& l, bool gradient, void* memory) {
    const int64_t row = rounded((l.vocab + kBlock) * sizeof(S)), block = kBlock * sizeof(S);
    char* p = static_cast<char*>(memory);
    auto take = [&p](int64_t n) { return (p += n) - n; };
    blocks = reinterpret_cast<BlockSums*>(take(rounded((block_count(l.vocab) + 1) * sizeof(BlockSums))));
    z = reinterpret_cast<S*>(take(block));
    e = reinterpret_cast<S*>(take(e_in_scratch(gradient) ? row : block));
    slope = l.softcap > 0 ? reinterpret_cast<S*>(take(gradient ? row : block)) : nullptr;
    bytes = p - static_cast<char*>(memory);
  }
};

template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

// Pass one. e receives exp(z - its block's max): the whole row if keep, else block after block in the same
// place. e may be the row x itself, so everything that needs z comes before exp_block writes.
template <class T, class S = typename Acc<T>::S>
RowSums first_pass(const Logits& l, const Transform<T>& f, const T* x, int64_t t, const S* w, Wanted want,
                   const Scratch<T>& scratch, S* e, const T* grad) {
  const bool keep = grad != nullptr;
  RowSums r;
  const int64_t nblocks = block_count(l.vocab);
  r.max = lowest_finite<S>();
  for (int64_t k = 0; k < nblocks; ++k) {
    const int64_t start = k * kBlock, n = l.vocab - start < kBlock ? l.vocab - start : kBlock;
    S* const e_block = keep ? e + start : e;
    S* const slope = scratch.slope && keep ? scratch.slope + start : scratch.slope;
    BlockSums& sums = scratch.blocks[k];
    const uintptr_t ahead = (start + kBlock) * sizeof(T);
    block_pass<T>(f, x + start, start, n, t, w ? w + start : nullptr, want, scratch.z, slope, e_block,
                  reinterpret_cast<uintptr_t>(x) + ahead,
                  grad && grad != x ? reinterpret_cast<uintptr_t>(grad) + ahead : 0, &sums, &r);
    if (sums.max > r.max) r.max = sums.max;
  }
  double entropy = 0, square = 0;
  for (int64_t k = 0; k < nblocks; ++k) {
    BlockSums& sums = scratch.blocks[k];
    const double below = sums.max - r.max;
    sums.weight = __builtin_exp(below);
    r.sum += sums.weight * sums.sum;
    if (want.square) square += sums.weight * sums.weight * sums.square;
    if (want.entropy && sums.weight != 0) entropy += sums.weight * (sums.entropy + sums.sum * below);
  }
  finish_sums(want, entropy, square, &r);
  return r;
}

template <class T>
void row_stats(const Logits& l, const Stats& s, int64_t begin, int64_t end, void* memory) {
  using S = typename Acc<T>::S;
  const Scratch<T> scratch(l, false, memory);
  const Transform<T> f(l);
  for (int64_t row = begin; row < end; ++row) {
    const RowKind kind = kind_of(l, row);
    if (kind == RowKind::ignored) {
      write_ignored<S>(s, row);
      continue;
    }
    const int64_t t = kind == RowKind::normal && l.target ? l.target[row] : -1;
    const T* x = static_cast<const T*>(l.x) + row * l.row_stride;
    const RowSums r = first_pass<T>(l, f.of_row(l, row), x, t, static_cast<const S*>(nullptr), wanted(s),
                                    scratch, scratch.e, nullptr);
    write_stats<S>(s, row, r, double(l.vocab), kind == RowKind::bad);
  }
}

// Pass two: b·p + d·w, times slope, over e = exp(z - its block's max), in the order of `even_odd` where that
// is how it was written (weights that are in no sum have d = 0 beside them). From the last block, the
// warmest, to the first.
template <class T, class S = typename Acc<T>::S>
void second_pass(const Logits& l, const Scratch<T>& scratch, const S* e, bool even_odd, double b_over_sum,
                 S d, const S* w, T* out) {
  for (int64_t k = block_count(l.vocab) - 1; k >= 0; --k) {
    const int64_t start = k * kBlock, n = l.vocab - start < kBlock ? l.vocab - start : kBlock;
    const S factor = S(b_over_sum * scratch.blocks[k].weight);
    const S* const e_block = e + start;
    if constexpr (Same<T, BF16>::value) {
      if (even_odd) {
        write_even_odd(out + start, e_block, n, factor, d);
        continue;
      }
    }
    gradient_block(out + start, n, d, w ? w + start : nullptr,
                   scratch.slope ? scratch.slope + start : nullptr,
                   [=](int64_t i, int64_t count)
                       __attribute__((always_inline)) { return factor * load_upto(e_block + i, count); });
  }
}

template <class T>
void row_cross_entropy(const Logits& l, const CrossEntropy& c, const Stats& s, int64_t begin, int64_t end,
                       void* memory) {
  using S = typename Acc<T>::S;
  const Scratch<T> scratch(l, c.grad != nullptr, memory);
  const Transform<T> f(l);
  const double vocab = double(l.vocab);
  const Wanted want = wanted(s, l, c);
  for (int64_t row = begin; row < end; ++row) {
    const RowKind kind = kind_of(l, row);
    T* const grad = c.grad ? static_cast<T*>(c.grad) + row * c.grad_row_stride : nullptr;
    if (kind == RowKind::ignored) {
      write_ignored<S>(s, row);
      if (grad) fill_row<T>(grad, l.vocab, 0);
      continue;
    }
    const bool bad = kind == RowKind::bad;
    const int64_t t = l.target && !bad ? l.target[row] : -1;
    const S* const w = c.w ? static_cast<const S*>(c.w) + row * c.w_row_stride : nullptr;
    S* e = scratch.e;
    if constexpr (sizeof(T) == sizeof(S)) {
      if (grad) e = grad;
    }
    const Transform<T> own = f.of_row(l, row);
    const S* const w_of_sums = want.sum_w ? w : nullptr;
    const RowSums r = first_pass<T>(l, own, static_cast<const T*>(l.x) + row * l.row_stride, t, w_of_sums,
                                    want, scratch, e, grad);
    write_stats<S>(s, row, r, vocab, bad);
    if (bad) {
      put<S>(s.loss, row, __builtin_nan(""));
      if (grad) fill_row<T>(grad, l.vocab, S(__builtin_nanf("")));
      continue;
    }
    const RowLoss g = loss_of_row(c, l.target != nullptr, t, w, vocab, r);
    put<S>(s.loss, row, g.loss);
    if (!grad) continue;
    const double k = c.grad_scale * scale_of<S>(l, row);
    second_pass<T>(l, scratch, e, is_even_odd(own, w_of_sums), g.b * k / r.sum, S(g.d * k), w, grad);
    if (l.target) {
      const double p = __builtin_exp(r.z_target - r.max) / r.sum;
      store_one(grad + t, S((g.a + g.b * p + (g.d != 0 ? g.d * g.w_t : 0.0)) * k * r.slope_target));
    }
  }
}

template <class T>
void row_grad(const Logits& l, const Coefficients& c, int64_t begin, int64_t end, void* memory) {
  using S = typename Acc<T>::S;
  const Scratch<T> scratch(l, false, memory);
  const Transform<T> f(l);
  for (int64_t row = begin; row < end; ++row) {
    const RowKind kind = kind_of(l, row);
    T* const out = static_cast<T*>(c.out) + row * c.out_row_stride;
    if (kind != RowKind::normal) {
      fill_row<T>(out, l.vocab, kind == RowKind::bad ? S(__builtin_nanf("")) : S(0));
      continue;
    }
    const int64_t t = l.target ? l.target[row] : -1;
    const T* const x = static_cast<const T*>(l.x) + row * l.row_stride;
    const S* const w = c.w ? static_cast<const S*>(c.w) + row * c.w_row_stride : nullptr;
    const double largest = get<S>(c.lse_parts, 2 * row), log_sum = get<S>(c.lse_parts, 2 * row + 1),
                 ra = get<S>(c.a, row), rb = get<S>(c.b, row), rc = get<S>(c.c, row), rd = get<S>(c.d, row);
    const double scale = scale_of<S>(l, row);
    const S b = S(rb * scale), cc = S(rc * scale), d = S(rd * scale);
    const Transform<T> own = f.of_row(l, row);
    for (int64_t start = 0; start < l.vocab; start += kBlock) {
      const int64_t n = l.vocab - start < kBlock ? l.vocab - start : kBlock;
      S max;
      const S* const z = load_block(own, x + start, start, n, scratch.z, scratch.slope, &max);
      const bool here = t >= start && t < start + n;
      const double z_target = here ? double(z[t - start]) : 0.0;  // read before out overwrites it
      const S* const w_block = w ? w + start : nullptr;
      // As in exp_block: the next block comes while the arithmetic of this one runs.
      const uintptr_t next = reinterpret_cast<uintptr_t>(x) + (start + kBlock) * sizeof(T);
      const uintptr_t next_out = reinterpret_cast<uintptr_t>(out) + (start + kBlock) * sizeof(T);
      const auto write = [&](auto with_c) __attribute__((always_inline)) {
        gradient_block(out + start, n, d, w_block, scratch.slope,
                       [=](int64_t i, int64_t) __attribute__((always_inline)) {
                         __builtin_prefetch(reinterpret_cast<const void*>(next + i * sizeof(T)));
                         __builtin_prefetch(reinterpret_cast<const void*>(next_out + i * sizeof(T)), 1);
                         return gradient_from_z<T, decltype(with_c)::value>(z + i, S(largest), S(log_sum), b,
                                                                            cc);
                       });
      };
      if (c.c) {
        write(Constant<true>{});
      } else {
        write(Constant<false>{});
      }
      if (!here) continue;
      const double log_p = (z_target - largest) - log_sum, p = __builtin_exp(log_p),
                   w_t = w ? double(w[t]) : 1.0;
      const double g = ra + rb * p + (c.c && p != 0 ? rc * p * log_p : 0.0) + (rd != 0 ? rd * w_t : 0.0);
      store_one(out + t, S(g * scale * (scratch.slope ? double(scratch.slope[t - start]) : 1.0)));
    }
  }
}

template <class From, class To>
void convert_as(const void* src, void* dst, int64_t begin, int64_t end) {
  const From* const from = static_cast<const From*>(src) + begin;
  write_block(static_cast<To*>(dst) + begin, end - begin,
              [=](int64_t i, int64_t count)
                  __attribute__((always_inline)) { return load_upto(from + i, count); });
}

void convert(const void* src, int src_dtype, void* dst, int dst_dtype, int64_t begin, int64_t end) {
  if (src_dtype == kBFloat16) return convert_as<BF16, float>(src, dst, begin, end);
  if (src_dtype == kFloat16) return convert_as<F16, float>(src, dst, begin, end);
  if (dst_dtype == kBFloat16) return convert_as<float, BF16>(src, dst, begin, end);
  convert_as<float, F16>(src, dst, begin, end);
}

template <class F>
auto with_dtype(int dtype, F&& f) {
  switch (Dtype(dtype)) {
    case kBFloat16:
      return f(BF16{});
    case kFloat16:
      return f(F16{});
    case kFloat64:
      return f(double{});
    case kFloat32:
      return f(float{});
  }
  FASTLOSS_UNREACHABLE();
}

int64_t scratch_bytes(const Logits& l, bool gradient) {
  return with_dtype(l.dtype, [&](auto type) { return Scratch<decltype(type)>(l, gradient, nullptr).bytes; });
}
void stats_of(const Logits& l, const Stats& s, int64_t begin, int64_t end, void* m) {
  with_dtype(l.dtype, [&](auto type) { row_stats<decltype(type)>(l, s, begin, end, m); });
}
void grad_of(const Logits& l, const Coefficients& c, int64_t begin, int64_t end, void* m) {
  with_dtype(l.dtype, [&](auto type) { row_grad<decltype(type)>(l, c, begin, end, m); });
}
void cross_entropy_of(const Logits& l, const CrossEntropy& c, const Stats& s, int64_t begin, int64_t end,
                      void* m) {
  with_dtype(l.dtype, [&](auto type) { row_cross_entropy<decltype(type)>(l, c, s, begin, end, m); });
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {scratch_bytes, stats_of, grad_of, cross_entropy_of, convert};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
